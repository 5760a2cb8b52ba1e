"""Carried out of lorakit/tokenizer.py."""

import functools
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorakit.config.errors import LorakitError

Messages = list[dict[str, Any]]
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's field


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


def render_template(source: str, **variables: Any) -> str:
    try:
        return _compile(source).render(**variables)
    except Exception as error:  # a template is a program: it may raise anything
        raise LorakitError(f"the chat template refuses these messages: {error}") from None


def checked_messages(messages: Messages) -> Messages:
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
