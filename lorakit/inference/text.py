"""The text of a row that is being continued: what is certain of it, and where it ends."""

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from lorakit.config.errors import LorakitError
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer


def stop_strings(stop: str | Sequence[str]) -> list[str]:
    """Return the strings that end a text; raise LorakitError if one is empty or no string."""
    strings = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(text, str) and text for text in strings):
        raise LorakitError(
            f"generate: stop must be a string or a list of strings, none empty, not {stop!r}"
        )
    return strings


def end_tokens(model: Decoder, tok: Tokenizer, stop: list[str]) -> set[int]:
    """Return the tokens that end a text: the model's, the tokenizer's, and special ones of stop."""
    ends = {*model.config.eos_token_ids, *tok.end_token_ids}
    for token, added in tok.backend.get_added_tokens_decoder().items():
        if added.special and added.content in stop:  # a special token leaves no text
            ends.add(token)
    return ends


class RowText:
    """The new tokens of one prompt, and their text as far as it is certain.

    SentencePiece drops the space before the first token of a text. So the new tokens are decoded
    together with the last token of the prompt, whose text is then cut off.
    """

    def __init__(
        self,
        tok: Tokenizer,
        prompt: list[int],
        stop: list[str],
        stream: Callable[[str], Any] | None,
    ):
        self.tok, self.prompt, self.stop, self.stream = tok, prompt, stop, stream
        self.before = prompt[-1:]
        if "\N{REPLACEMENT CHARACTER}" in tok.decode(self.before):  # it ends in half a character
            self.before = []
        self.ids: list[int] = []
        self.running = True
        self.text, self.streamed = "", 0
        self.decoder = DecodeStream(skip_special_tokens=True)
        for token in self.before:
            self.decoder.step(tok.backend, token)

    def push(self, token: int, ends: set[int]) -> None:
        """Take the next token; an end token, or a stop string in the text, ends the row."""
        if not self.running or token in ends:
            self.running = False
            return
        self.ids.append(token)
        if not self.stop and self.stream is None:
            return
        self.text += self.decoder.step(self.tok.backend, token) or ""
        cut = self._cut(self.text)
        self.running = cut == self.text
        if self.stream is not None and self.running:
            # the last letters may be the beginning of a stop string: they are not certain yet
            held = [n for stop in self.stop for n in range(1, len(stop)) if cut.endswith(stop[:n])]
            self._hand_on(cut[: len(cut) - max(held, default=0)])

    def finish(self) -> str:
        """Return the whole text, and stream the part of it that was held back."""
        text = self.tok.decode(self.before + self.ids)
        text = self._cut(text[len(self.tok.decode(self.before)) :])
        self._hand_on(text)
        return text

    def _cut(self, text: str) -> str:
        """Return the text up to the first stop string."""
        found = [text.find(stop) for stop in self.stop]
        return text[: min((at for at in found if at >= 0), default=len(text))]

    def _hand_on(self, text: str) -> None:
        """Stream the part of the text that has not been streamed yet."""
        if self.stream is not None and len(text) > self.streamed:
            piece, self.streamed = text[self.streamed :], len(text)
            self.stream(piece)
