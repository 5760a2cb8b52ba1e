"""What a text may consist of, token by token: JSON, or JSON that fits a schema.

    constraint = json_schema({"type": "object", "properties": {"age": {"type": "integer"}}}, tok)
    engine.submit(prompt, constraint=constraint)

The llguidance library (pip install 'lorakit[serve]') keeps the state of a parser, and says before
each token which ones may come next. It works on the bytes of tokens, so a token may end in the
middle of a word or a character. A text that ends by itself is whole; one that is cut by its length
may not be.

The JSON is written compactly, {"a":1,"b":2}, or with one blank after each comma and colon, as
Python's json.dumps writes it. A weak model that may put blanks elsewhere fills its answer with
them.
"""

import json
from collections.abc import Mapping
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.models.tokenizer import Tokenizer

_OPTIONS: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ?",  # regexes
    "key_separator": ": ?",
}

# how llguidance sees a tokenizer, which takes a second to make, and how many tokens it had then
_SEEN: WeakKeyDictionary[Tokenizer, tuple[int, Any]] = WeakKeyDictionary()


class Constraint(Protocol):
    """The rules of one text: which tokens may come next, and where it may end."""

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""

    def allowed(self) -> Tensor:
        """Return which tokens may come next: bool [n] in host memory; ids from n on may not.

        The tokens that end a text are no business of this: `complete` decides on them.
        """

    def take(self, token: int) -> None:
        """Take a token that was allowed."""


def json_object(tok: Tokenizer) -> Constraint:
    """Return the constraint of a text that is one JSON object.

    Args:
        tok: The tokenizer of the text.

    Returns:
        A constraint for one text.

    Raises:
        LorakitError: llguidance is not installed.
    """
    return json_schema({"type": "object"}, tok)


def json_schema(schema: Mapping[str, Any], tok: Tokenizer) -> Constraint:
    """Return the constraint of a text that is JSON and fits a schema.

    Args:
        schema: The JSON schema, as https://json-schema.org has it.
        tok: The tokenizer of the text.

    Returns:
        A constraint for one text.

    Raises:
        LorakitError: llguidance is not installed, or does not take the schema.
    """
    if not isinstance(schema, Mapping):
        raise LorakitError(f"json_schema: a schema is an object, not {ascii(schema)[:60]}")
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError:
        raise LorakitError(
            "constrained text needs the llguidance package: pip install 'lorakit[serve]'"
        ) from None
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_OPTIONS)
        matcher = LLMatcher(_seen(tok), grammar, log_level=0)
    except (ValueError, TypeError, RecursionError) as error:
        raise LorakitError(f"json_schema: {_in_a_line(error)}") from None
    if matcher.is_error():
        raise LorakitError(f"json_schema: {_in_a_line(matcher.get_error())}")
    found = _Matched(matcher, _seen(tok).eos_tokens)
    found.allowed()  # some schemas fail at the first token only, such as {"$ref": "#"}
    return found


def _seen(tok: Tokenizer) -> Any:
    """Return a tokenizer as llguidance sees it."""
    known = _SEEN.get(tok)
    if known is None or known[0] != len(tok):
        import tokenizers
        from llguidance import LLTokenizer

        backend = tokenizers.Tokenizer.from_str(tok.backend.to_str())
        backend.no_padding()
        backend.no_truncation()
        ends = tok.end_token_ids
        try:
            seen = LLTokenizer(backend.to_str(), eos_token=ends[0] if ends else None)
        except ValueError as error:
            raise LorakitError(
                f"constrained text: llguidance does not take the tokenizer: {_in_a_line(error)}"
            ) from None
        _SEEN[tok] = known = len(tok), seen
    return known[1]


def _in_a_line(error: object) -> str:
    """Return a message without its line breaks."""
    return " ".join(str(error).split())[:300] or "no reason was given"


class _Matched:
    """A constraint whose state llguidance keeps."""

    def __init__(self, matcher: Any, ends: list[int]):
        self.matcher, self.ends = matcher, ends

    @property
    def complete(self) -> bool:
        return bool(self.matcher.is_accepting())

    @property
    def ended(self) -> bool:
        return bool(self.matcher.is_stopped())

    def allowed(self) -> Tensor:
        # one byte a token, 0 or 200; in a bytearray, as torch wants memory that it may write to
        mask = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8) > 0
        mask[self.ends] = False
        self._check()
        return mask

    def take(self, token: int) -> None:
        self.matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        """Raise LorakitError if the parser gave up: its limits bound the work of a token."""
        if self.matcher.is_error():
            raise LorakitError(f"constrained text: {_in_a_line(self.matcher.get_error())}")
