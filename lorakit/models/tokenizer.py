"""Text to token ids and back: the `tokenizers` library, plus the model's own chat template.

A Hugging Face directory gives tokenizer.json as it is. From a GGUF file the tokenizer is built that
gives llama.cpp's ids. There are two kinds:

- "gpt2", byte-level BPE: the file holds vocabulary, merges and the name of a pre-tokenizer.
- "llama", SentencePiece's BPE: the file holds a score for each token, and of all neighbours in the
  text those two are joined next whose union scores highest. So the merges are every split of every
  token into two others, in the order of the scores. Spaces are written "▁", and a character that is
  no token becomes tokens of single bytes. Two things that no trained vocabulary has would be cut
  another way than by llama.cpp: two tokens with the same score, of which it joins the leftmost, and
  a character that is no token within a longer one that is.

Chat templates are programs that come with the model, so they run in jinja2's immutable sandbox,
with the settings that transformers uses (trim_blocks, lstrip_blocks, loop controls, `tojson`,
`raise_exception`, `strftime_now`). A rendered chat already holds its special tokens: it is
tokenized without adding any.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from . import hub
from .config import LorakitError
from .files import as_path, read_json, read_text, write_json, write_text
from .gguf import read_header

Messages = list[dict[str, Any]]

# How text is cut before BPE, by GGUF's tokenizer.ggml.pre: regexes applied in turn. The first is
# GPT-2's own (openai/gpt-2, encoder.py), "default" is what llama.cpp does where a file names none,
# the others are the ones in the models' tokenizer.json.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "default": [
        r"[\p{P}\$\+<=>\^~\|]+",
        _GPT2.removesuffix(r"|\s+"),
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ],
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "llama-bpe": [_LLAMA3],
    "qwen2": [_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")],
}
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's field
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # GGUF token types


class Tokenizer:
    """A model's tokenizer. `special_tokens` maps "bos_token", "eos_token", ... to their text."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | Mapping[str, str] | None = None,
    ):
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens that the model puts around it by default.

        Raises LorakitError for what is not Unicode text.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise LorakitError(f"not valid Unicode text: {ascii(text)[:60]}") from None

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text` as it stands, and from which character to which each reaches.

        Raises LorakitError for what is not Unicode text.
        """
        try:
            encoding = self.backend.encode(text, add_special_tokens=False)
        except TypeError:
            raise LorakitError(f"not valid Unicode text: {ascii(text)[:60]}") from None
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, name: str) -> int | None:
        """The id of a special token by its name ("bos_token", ...), or None where there is none.

        Raises LorakitError if the vocabulary does not hold its text.
        """
        text = self.special_tokens.get(name)
        if text is None:
            return None
        token_id = self.backend.token_to_id(text)
        if token_id is None:
            raise LorakitError(f"the tokenizer's {name}, {text!r}, is not in its vocabulary")
        return token_id

    def check_fits(self, ids: Iterable[int], vocab_size: int) -> None:
        """Raise LorakitError if some id has no row in an embedding of `vocab_size` rows."""
        largest = max(ids)
        if largest >= vocab_size:
            raise LorakitError(
                f"token {largest} ({self.backend.id_to_token(largest)!r}) lies outside the model's "
                f"vocabulary of {vocab_size}: tokenizer and model do not belong together"
            )

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `path`."""
        path = as_path(path)
        path.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.special_tokens,
        }
        if isinstance(self.chat_template, str):
            write_text(path / "chat_template.jinja", self.chat_template)
        elif self.chat_template is not None:
            named = self.chat_template.items()
            config["chat_template"] = [{"name": n, "template": text} for n, text in named]
        write_text(path / "tokenizer.json", self.backend.to_str(pretty=True))
        write_json(path / "tokenizer_config.json", config)

    @property
    def bos_token_id(self) -> int | None:
        return self.token_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self.token_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self.token_id("pad_token")

    @property
    def end_token_ids(self) -> list[int]:
        """The tokens that end an answer: eos_token, and what closes the assistant's turn in the
        chat template, found by rendering one.
        """
        ends = [] if self.eos_token_id is None else [self.eos_token_id]
        mark = "0123456789"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        try:
            rendered = self.apply_chat_template(turns, tokenize=False)
        except LorakitError:  # no template, or one that wants other turns
            return ends
        _, found, rest = rendered.rpartition(mark)
        closing = self.encode(rest.lstrip(), add_special_tokens=False)[:1] if found else []
        added = self.backend.get_added_tokens_decoder()
        others = [*ends, self.bos_token_id]  # what opens the next text closes nothing
        return ends + [token for token in closing if token in added and token not in others]

    def apply_chat_template(
        self,
        messages: Messages,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        *,
        chat_template: str | None = None,
        tools: list[dict] | None = None,
        documents: list[dict] | None = None,
        **variables: Any,
    ) -> str | list[int]:
        """Messages ({"role": ..., "content": ...}) as the model was trained to see them.

        add_generation_prompt: end with the header of the assistant's turn. `variables` reach the
        template. Returns ids, or with tokenize=False the text. Raises LorakitError if there is no
        template, the messages are malformed, or the template refuses them.
        """
        source = chat_template or self._template(tools is not None)
        rendered = _render(
            source,
            messages=_checked(messages),
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens, **variables},
        )
        return self.encode(rendered, add_special_tokens=False) if tokenize else rendered

    def _template(self, with_tools: bool) -> str:
        if self.chat_template is None:
            raise LorakitError("the tokenizer has no chat template; give one as chat_template=")
        if isinstance(self.chat_template, str):
            return self.chat_template
        name = "tool_use" if with_tools and "tool_use" in self.chat_template else "default"
        if name not in self.chat_template:
            names = ", ".join(self.chat_template)
            raise LorakitError(f"there is no chat template {name!r}; there are {names}")
        return self.chat_template[name]


# ---- chat templates -----------------------------------------------------------------------------


class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %}, the assistant's text: here just its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


@functools.cache
def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@functools.lru_cache(maxsize=16)
def _compile(source: str):
    return _environment().from_string(source)


def _render(source: str, **variables: Any) -> str:
    try:
        return _compile(source).render(**variables)
    except Exception as error:  # a template is a program: it may raise anything
        raise LorakitError(f"the chat template refuses these messages: {error}") from None


def _checked(messages: Messages) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise LorakitError(f"messages must be a list with at least one message, not {messages!r}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise LorakitError(
                f"message {i} must be a mapping with 'role' and 'content', not {message!r}"
            )
    return [_plain_names({k: v for k, v in m.items() if v is not None}) for m in messages]


def _plain_names(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under the names by which templates look for it, as transformers 5 does."""
    found = [message[name] for name in REASONING if name in message]
    if not found:
        return message
    return {"thinking": found[0], **message, "reasoning_content": found[0]}


# ---- loading ------------------------------------------------------------------------------------


def load_tokenizer(path_or_hub_id: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory (tokenizer.json), a .gguf file or a Hub id.

    Raises LorakitError if it is missing, damaged, or of a kind that lorakit does not read.
    """
    path = hub.resolve(path_or_hub_id, hub.TOKENIZER)
    return _from_gguf(path) if path.suffix == ".gguf" else _from_directory(path)


def _from_directory(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.exists():
        raise LorakitError(f"{path}: tokenizer.json is missing")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for any parse error
        raise LorakitError(f"{file} is not a valid tokenizer: {error}") from None
    backend.no_truncation()  # limits of a training run that some repositories have kept
    backend.no_padding()
    config = _read_optional(path / "tokenizer_config.json")
    special = {}
    for name, value in (_read_optional(path / "special_tokens_map.json") | config).items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                special[name] = text
    return Tokenizer(backend, special, _directory_template(path, config))


def _directory_template(path: Path, config: Mapping) -> str | dict[str, str] | None:
    """chat_template.jinja (and additional_chat_templates/), else tokenizer_config's, else the
    legacy file.
    """
    if (path / "chat_template.jinja").exists():
        default = read_text(path / "chat_template.jinja")
        extra = sorted((path / "additional_chat_templates").glob("*.jinja"))
        more = {file.stem: read_text(file) for file in extra}
        return {"default": default, **more} if more else default
    template = config.get("chat_template")
    if template is None:
        template = _read_optional(path / "chat_template.json").get("chat_template")
    try:
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        texts = template.values() if isinstance(template, dict) else [template or ""]
        if all(isinstance(text, str) for text in texts):
            return template
    except (TypeError, KeyError):
        pass
    raise LorakitError(f"{path}: chat_template must be text, or a list of names and templates")


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


# ---- GGUF vocabularies --------------------------------------------------------------------------


class _Vocabulary:
    """What a GGUF file says under tokenizer.ggml, its types checked."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata = read_header(path).metadata
        self.tokens: list[str] = self.items("tokens", str)
        if not self.tokens:
            raise LorakitError(f"{path}: the file holds no vocabulary")
        if len(set(self.tokens)) != len(self.tokens):
            raise LorakitError(f"{path}: the vocabulary holds a token twice")

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if value is not None and not isinstance(value, kind):
            raise LorakitError(
                f"{self.path}: tokenizer.ggml.{name} is {value!r:.60}, not {kind.__name__}"
            )
        return value

    def items(self, name: str, kind: type) -> list:
        values = self.get(name, list, [])
        if values and not isinstance(values[0], kind):  # an array's items are of one type
            raise LorakitError(
                f"{self.path}: tokenizer.ggml.{name} holds {values[0]!r:.60}, not {kind.__name__}"
            )
        return values

    def per_token(self, name: str, kind: type) -> list:
        values = self.items(name, kind)
        if len(values) != len(self.tokens):
            raise LorakitError(
                f"{self.path}: tokenizer.ggml.{name} has {len(values)} entries for "
                f"{len(self.tokens)} tokens"
            )
        return values

    def special(self, name: str, default: int | None = None) -> str | None:
        """The text of a special token; None if the file gives no id, or one outside."""
        token_id = self.get(f"{name}_token_id", int, default)
        if token_id is None or not 0 <= token_id < len(self.tokens):
            return None
        return self.tokens[token_id]


def _from_gguf(path: Path) -> Tokenizer:
    vocabulary = _Vocabulary(path)
    kind = vocabulary.get("model", str)
    if kind not in ("gpt2", "llama"):
        raise LorakitError(
            f"{path}: tokenizer {kind!r} is not supported; byte-level BPE ('gpt2') and "
            "SentencePiece's ('llama') are"
        )
    spm = kind == "llama"
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if spm else {}  # llama.cpp's
    special = {
        f"{key}_token": vocabulary.special(name, defaults.get(name))
        for key, name in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    special = {name: token for name, token in special.items() if token is not None}
    add_bos = vocabulary.get(
        "add_bos_token", bool, spm or vocabulary.get("pre", str) == "llama-bpe"
    )
    add_eos = vocabulary.get("add_eos_token", bool, False)
    template = vocabulary.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise LorakitError(f"{path}: tokenizer.chat_template is {template!r:.60}, not text")
    try:
        backend = (_sentencepiece if spm else _byte_level)(vocabulary)
        _add_tokens(backend, vocabulary)
        before = [special["bos_token"]] if add_bos and "bos_token" in special else []
        after = [special["eos_token"]] if add_eos and "eos_token" in special else []
        if before or after:
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                single=[*before, "$A", *after],
                pair=[*before, "$A", "$B", *after],
                special_tokens=[(t, backend.token_to_id(t)) for t in {*before, *after}],
            )
    except LorakitError:
        raise
    except Exception as error:  # the library raises bare Exception for what it cannot use
        raise LorakitError(f"{path}: the vocabulary is damaged: {error}") from None
    return Tokenizer(backend, special, template)


def _add_tokens(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    """Tokens that are found in the text as they stand, before anything else is done to it."""
    if "tokenizer.ggml.token_type" not in vocabulary.metadata:
        return
    special, plain = [], []
    for token, its in zip(vocabulary.tokens, vocabulary.per_token("token_type", int), strict=True):
        if its in (UNKNOWN, CONTROL, USER_DEFINED):
            chosen = plain if its == USER_DEFINED else special
            chosen.append(
                tokenizers.AddedToken(token, normalized=False, special=its != USER_DEFINED)
            )
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _byte_level(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    pre = vocabulary.get("pre", str, "default")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise LorakitError(
            f"{vocabulary.path}: pre-tokenizer {pre!r} is not supported; supported are {known}"
        )
    merges = vocabulary.items("merges", str)
    if not merges:
        raise LorakitError(f"{vocabulary.path}: the file holds no merges")
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary.tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=pre == "llama-bpe",  # Llama 3 takes a word that is a token whole
        )
    )
    cut = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), behavior="isolated")
        for regex in PRE_TOKENIZERS[pre]
    ]
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*cut, to_bytes])
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _sentencepiece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    tokens, scores = vocabulary.tokens, vocabulary.per_token("scores", float)
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [
        (score, token[:i], token[i:])
        for token, score in zip(tokens, scores, strict=True)
        for i in range(len(token) - 1, 0, -1)
        if token[:i] in ids and token[i:] in ids
    ]
    merges.sort(key=lambda merge: -merge[0])
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=ids,
            merges=[(left, right) for _, left, right in merges],
            unk_token=vocabulary.special("unknown", 0),
            byte_fallback=True,
        )
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    normalize = [normalizers.Replace(" ", "▁")]
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.get("add_space_prefix", bool, True):
        normalize.insert(0, normalizers.Prepend("▁"))
        decode.append(decoders.Strip(" ", left=1, right=0))
    backend.normalizer = normalizers.Sequence(normalize)
    backend.decoder = decoders.Sequence(decode)
    return backend
