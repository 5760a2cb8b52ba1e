"""The requests of OpenAI's API, from a JSON object to a dataclass whose every field is checked.

What a model's server has beyond OpenAI's fields, and others have too, keeps the names of vLLM:
top_k, min_p, repetition_penalty, chat_template_kwargs.

lorakit does not have all of the API. A field that would change the answer and is not here gets a
400 that names it, unless its value changes nothing.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.inference.request import MOST_LOGPROBS
from lorakit.inference.sampling import Sampling
from lorakit.models.chat_template import REASONING
from lorakit.serving.fields import Fields

MOST_TEXTS = 128
"""Most texts that one request may ask for; OpenAI's `n` has the same bound."""
_MOST_STOPS, _LONGEST_STOP = 16, 256  # the end of a text is compared with each after every token
_MOST_BIASES = 1024
_LEAST_TOP_P = 1e-6  # of 0, which OpenAI allows: the likeliest token alone is left
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEMPLATES_OWN = ("self", "messages", "tools", "documents", "add_generation_prompt", "tokenize")

# Fields that lorakit does not have, and the values of them that change nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "prompt_logprobs": (),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "use_beam_search": (False,),
}
_NEUTRAL_IN_CHATS = {
    **_NEUTRAL,
    "audio": (),
    "add_generation_prompt": (True,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_NEUTRAL_IN_COMPLETIONS = {
    **_NEUTRAL,
    "prompt_embeds": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}

JsonFormat = dict[str, Any] | Literal["json_object"] | None
"""The form that a text must have: a JSON schema, any JSON object, or none."""


@dataclass(frozen=True)
class Generation:
    """What a request says of the texts to make, whether they answer a chat or continue a text."""

    model: str
    """The name of the model or the adapter."""
    n: int
    """How many texts each prompt gets."""
    max_tokens: int | None
    """Most tokens of a text; None: as many as there is room for."""
    sampling: Sampling
    """How tokens are picked."""
    stop: list[str]
    """Strings before which a text ends."""
    seed: int | None
    """The seed of the draws; None: a new one each time."""
    logit_bias: dict[int, float]
    """What is added to the logits of some tokens, by their ids."""
    logprobs: int | None
    """How many of the likeliest tokens are told at each position; None: no log-probabilities."""
    stream: bool
    """Whether the answer comes piece by piece."""
    include_usage: bool
    """Whether the stream ends with the count of tokens."""


@dataclass(frozen=True)
class Chat:
    """A request to answer a chat."""

    generation: Generation
    messages: list[dict[str, Any]]
    """The turns, as templates take them."""
    tools: list[dict[str, Any]] | None
    """The tools that the model may call."""
    variables: dict[str, Any]
    """Other variables of the chat template."""
    form: JsonFormat
    """The form that the answer must have."""


@dataclass(frozen=True)
class Completion:
    """A request to continue texts."""

    generation: Generation
    prompts: list[str | list[int]]
    """The texts, or their token ids."""
    echo: bool
    """Whether the answer begins with the prompt."""


# ---- what both have ----


def _generation(fields: Fields, logprobs: int | None, max_tokens: int | None) -> Generation:
    n = fields.whole("n", 1, MOST_TEXTS)
    stream = fields.flag("stream")
    options = Fields(fields.take("stream_options", dict) or {}, "stream_options.")
    if options.values and not stream:
        raise fields.refusal(
            "stream_options", "'stream_options' is only allowed when 'stream' is true."
        )
    seed = fields.whole("seed", -(2**63), 2**63 - 1)
    return Generation(
        model=fields.needed("model", str),
        n=1 if n is None else n,
        max_tokens=max_tokens,
        sampling=_sampling(fields),
        stop=_stop(fields),
        seed=None if seed is None else seed % 2**63,
        logit_bias=_logit_bias(fields),
        logprobs=logprobs,
        stream=stream,
        include_usage=options.flag("include_usage"),
    )


def _sampling(fields: Fields) -> Sampling:
    number = fields.number
    top_k = fields.whole("top_k", -1, 2**31 - 1)
    return Sampling(
        temperature=number("temperature", 0, 2, 1.0),
        top_k=top_k if top_k is not None and top_k > 0 else None,
        top_p=max(number("top_p", 0, 1, 1.0), _LEAST_TOP_P),
        min_p=number("min_p", 0, 1, 0.0),
        repetition_penalty=number("repetition_penalty", 1e-6, 1e6, 1.0),
        frequency_penalty=number("frequency_penalty", -2, 2, 0.0),
        presence_penalty=number("presence_penalty", -2, 2, 0.0),
    )


def _logit_bias(fields: Fields) -> dict[int, float]:
    """Return what `logit_bias` adds to the logits of tokens, whose ids are the object's names."""
    given = Fields(fields.take("logit_bias", dict) or {}, "logit_bias.")
    ids = [token for token in given.values if re.fullmatch("[0-9]{1,9}", token)]
    if len(ids) < len(given.values) or len(ids) > _MOST_BIASES:
        raise fields.refusal(
            "logit_bias", f"Invalid 'logit_bias': expected at most {_MOST_BIASES} ids of tokens."
        )
    return {int(token): given.number(token, -100, 100, 0.0) for token in ids}


def _stop(fields: Fields) -> list[str]:
    """Return the strings of `stop`, which is a string or an array of some."""
    fields.known.add("stop")
    given = fields.values.get("stop")
    if given is None:
        return []
    strings = [given] if isinstance(given, str) else given
    if not isinstance(strings, list) or not all(isinstance(each, str) for each in strings):
        raise fields.wrong_type("stop", str, list)
    if len(strings) > _MOST_STOPS or not all(0 < len(s) <= _LONGEST_STOP for s in strings):
        raise fields.refusal(
            "stop",
            f"Invalid 'stop': expected at most {_MOST_STOPS} strings of 1 to {_LONGEST_STOP} "
            "characters.",
        )
    return strings


# ---- chats ----


def parse_chat(values: dict[str, Any]) -> Chat:
    """Return the request to answer a chat that a JSON object is.

    Raises:
        Refusal: A field is missing, of a wrong type or out of its range, or lorakit lacks it.
    """
    fields = Fields(values)
    limits = [fields.whole(name, 1, 2**31) for name in ("max_completion_tokens", "max_tokens")]
    given = [limit for limit in limits if limit is not None]
    likeliest = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    wanted = fields.flag("logprobs")
    if likeliest and not wanted:
        raise fields.refusal("top_logprobs", "'top_logprobs' needs 'logprobs' to be true.")
    generation = _generation(
        fields, (likeliest or 0) if wanted else None, min(given) if given else None
    )
    tools = _tools(fields)
    chat = Chat(
        generation, _messages(fields), tools, _variables(fields), _form(fields, tools is not None)
    )
    fields.neutral(_NEUTRAL_IN_CHATS)
    fields.finish()
    return chat


def _messages(fields: Fields) -> list[dict[str, Any]]:
    messages = fields.needed("messages", list)
    if not messages:
        raise fields.refusal("messages", "Invalid 'messages': expected at least one message.")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise Fields({"messages": message}).wrong_type("messages", dict)
        found.append(_message(Fields(message, f"messages[{i}].")))
    return found


def _message(fields: Fields) -> dict[str, Any]:
    """Return a message as templates take it: text as one string, arguments as objects."""
    role = fields.needed("role", str)
    if role not in _ROLES:
        raise fields.refusal(
            "role",
            f"Invalid '{fields.where}role': expected one of {', '.join(_ROLES)}, but got "
            f"{role[:50]!r}.",
        )
    message: dict[str, Any] = {
        "role": "system" if role == "developer" else role
    }  # no template knows developer
    calls = fields.take("tool_calls", list) if role == "assistant" else None
    text = _text(fields)
    if text is None and not calls:
        raise fields.missing("content")
    message["content"] = "" if text is None else text
    if calls:
        message["tool_calls"] = [
            _call(fields, each, f"{fields.where}tool_calls[{i}].") for i, each in enumerate(calls)
        ]
    for name in ("name", "tool_call_id", *REASONING):
        value = fields.take(name, str)
        if value is not None:
            message[name] = value
    return message


def _text(fields: Fields) -> str | None:
    """Return the text of a message, whose parts are joined by a newline, as vLLM does."""
    fields.known.add("content")
    content = fields.values.get("content")
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise fields.wrong_type("content", str, list)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict):
            raise fields.wrong_type("content", str, list)
        parts = Fields(part, f"{fields.where}content[{i}].")
        kind = parts.needed("type", str)
        if kind not in ("text", "input_text", "output_text"):
            raise parts.refusal(
                "type", f"Only parts of type 'text' are supported here, not {kind[:50]!r}."
            )
        texts.append(parts.needed("text", str))
    return "\n".join(texts)


def _call(fields: Fields, given: object, where: str) -> dict[str, Any]:
    """Return a call of a tool with its arguments as an object, which templates write as JSON."""
    if not isinstance(given, dict):
        raise fields.wrong_type("tool_calls", list)
    call = Fields(given, where)
    function = Fields(call.needed("function", dict), f"{where}function.")
    name, text = function.needed("name", str), function.needed("arguments", str)
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise function.refusal(
            "arguments", f"Invalid '{where}function.arguments': expected a JSON object as a string."
        )
    found = {"type": "function", "function": {"name": name, "arguments": arguments}}
    identity = call.take("id", str)
    return found if identity is None else {"id": identity, **found}


def _tools(fields: Fields) -> list[dict[str, Any]] | None:
    """Return the tools that the model may call, None if there are none, or it may not."""
    tools = fields.take("tools", list)
    fields.known.add("tool_choice")
    choice = fields.values.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise fields.refusal(
            "tool_choice",
            'Unsupported value: \'tool_choice\' may be "auto" or "none" here.',
            "unsupported_value",
        )
    for i, tool in enumerate(tools or []):
        if not isinstance(tool, dict):
            raise fields.wrong_type("tools", list)
        each = Fields(tool, f"tools[{i}].")
        if each.needed("type", str) != "function":
            raise each.refusal("type", "Only tools of type 'function' are supported here.")
        function = Fields(each.needed("function", dict), f"tools[{i}].function.")
        function.needed("name", str)
        function.take("description", str)
        function.take("parameters", dict)
    return None if choice == "none" else tools or None


def _variables(fields: Fields) -> dict[str, Any]:
    """Return the other variables of the chat template."""
    variables = fields.take("chat_template_kwargs", dict) or {}
    for name in variables:
        if name in (*_TEMPLATES_OWN, "chat_template"):
            raise fields.refusal(
                "chat_template_kwargs", f"'chat_template_kwargs' may not set {name!r}."
            )
    return variables


def _form(fields: Fields, tools: bool) -> JsonFormat:
    """Return the form that the answer must have."""
    given = Fields(fields.take("response_format", dict) or {"type": "text"}, "response_format.")
    kind = given.needed("type", str)
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise given.refusal(
            "type",
            "Invalid 'response_format.type': expected one of text, json_object, json_schema, but "
            f"got {kind[:50]!r}.",
        )
    if tools:
        raise given.refusal(
            "type",
            "'response_format' and 'tools' cannot be used together here.",
            "unsupported_value",
        )
    if kind == "json_object":
        return "json_object"
    inner = Fields(given.needed("json_schema", dict), "response_format.json_schema.")
    return inner.needed("schema", dict)


# ---- texts ----


def parse_completion(values: dict[str, Any]) -> Completion:
    """Return the request to continue texts that a JSON object is.

    Raises:
        Refusal: A field is missing, of a wrong type or out of its range, or lorakit lacks it.
    """
    fields = Fields(values)
    max_tokens = fields.whole("max_tokens", 1, 2**31)
    logprobs = fields.whole("logprobs", 0, MOST_LOGPROBS)
    generation = _generation(fields, logprobs, 16 if max_tokens is None else max_tokens)
    prompts = _prompts(fields)
    if len(prompts) * generation.n > MOST_TEXTS:
        raise fields.refusal(
            "n",
            f"{len(prompts)} prompts and n={generation.n} are more than {MOST_TEXTS} texts: send "
            "several requests.",
        )
    echo = fields.flag("echo")
    if echo and logprobs is not None:
        raise fields.refusal(
            "echo",
            "'echo' with 'logprobs' is not supported here: log-probabilities are those of new "
            "tokens.",
            "unsupported_value",
        )
    best = fields.whole("best_of", 1, MOST_TEXTS)
    if best not in (None, generation.n):
        raise fields.refusal(
            "best_of", "'best_of' is not supported here: leave it out.", "unsupported_parameter"
        )
    fields.neutral(_NEUTRAL_IN_COMPLETIONS)
    fields.finish()
    return Completion(generation, prompts, echo)


def _prompts(fields: Fields) -> list[str | list[int]]:
    """Return the prompts: a text, an array of texts, of token ids, or of arrays of these."""
    fields.known.add("prompt")
    given = fields.values.get("prompt")
    if given is None:
        raise fields.missing("prompt")
    if isinstance(given, str) or _is_ids(given):
        return [given]
    if isinstance(given, list) and given and all(isinstance(e, str) or _is_ids(e) for e in given):
        return given
    raise fields.refusal(
        "prompt",
        "Invalid 'prompt': expected a string, an array of strings, an array of token ids, or an "
        "array of such arrays.",
        "invalid_type",
    )


def _is_ids(given: object) -> bool:
    """Return whether something is a list of token ids, and not an empty one."""
    return isinstance(given, list) and bool(given) and all(type(e) is int and e >= 0 for e in given)
