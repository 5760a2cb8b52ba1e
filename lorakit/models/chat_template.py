"""Chat templates: the programs that turn messages into a model's text.

A template comes with the model, written by a stranger in jinja2's language. It runs in jinja2's
immutable sandbox: it sees the messages and the variables that it is given, reaches no attribute
that leads into Python, no file and no module, and cannot change what it is given. There is no limit
on the time that it runs or the text that it makes.

The settings are those of transformers (trim_blocks, lstrip_blocks, loop controls, `tojson`,
`raise_exception`, `strftime_now`), so that a template gives the same text here and there.
"""

import functools
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorakit.config.errors import LorakitError

Messages = list[dict[str, Any]]
"""The turns of a chat: mappings with a "role", mostly with "content" too."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which messages carry what the model thought before it answered."""


class _GenerationTag(Extension):
    """The tag {% generation %} around the assistant's text, whose body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
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
def _compile(source: str) -> Template:
    return _environment().from_string(source)


def render_template(source: str, **variables: Any) -> str:
    """Return the text that the template `source` makes of the variables.

    Raises LorakitError if the template is malformed, fails, or asks for what the sandbox forbids.
    """
    try:
        return _compile(source).render(**variables)
    except Exception as error:  # a template is a program: it may raise anything
        raise LorakitError(f"the chat template refuses these messages: {error}") from None


def check_template(source: str, where: str) -> None:
    """Raise LorakitError, which names the template `where`, if it is no program in jinja2."""
    try:
        _compile(source)
    except TemplateSyntaxError as error:
        raise LorakitError(
            f"{where} is no chat template that jinja2 reads: line {error.lineno}: {error}"
        ) from None


def checked_messages(messages: Messages) -> Messages:
    """Return messages as templates take them.

    Fields of None are left out, and reasoning gets the names that templates know. Raises
    LorakitError unless `messages` is a list of mappings, each with a role.
    """
    if not isinstance(messages, list) or not messages:
        raise LorakitError(f"messages must be a list with at least one message, not {messages!r}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise LorakitError(
                f"message {i} must be a mapping with 'role' and 'content', not {message!r}"
            )
    return [_plain_names({k: v for k, v in m.items() if v is not None}) for m in messages]


def _plain_names(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning under both names that templates use.

    transformers 5 does so too.
    """
    found = [message[name] for name in REASONING if name in message]
    if not found:
        return message
    return {"thinking": found[0], **message, "reasoning_content": found[0]}
