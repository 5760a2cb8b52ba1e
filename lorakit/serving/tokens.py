"""The text and the bytes of single tokens, for answers with log-probabilities.

A token may be a part of a character, so its bytes tell more than its text. They are read off its
entry in the vocabulary. A byte-level BPE writes each byte as a letter (GPT-2, encoder.py), and
SentencePiece writes a space as "▁" and a byte outside its vocabulary as "<0xE2>".
"""

import functools
import json
import re

from lorakit.models.tokenizer import Tokenizer


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves, the others, in order, for U+0100 and on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class TokenTexts:
    """The texts of a tokenizer's tokens."""

    def __init__(self, tok: Tokenizer):
        self.tok = tok
        self.added = {
            token: added.content for token, added in tok.backend.get_added_tokens_decoder().items()
        }
        self.byte_level = '"ByteLevel"' in json.dumps(
            json.loads(tok.backend.to_str()).get("decoder")
        )

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text; those of a special token's name."""
        if token in self.added:
            return self.added[token].encode()
        piece = self.tok.backend.id_to_token(token)
        if piece is None:  # the model has more rows than the tokenizer has tokens
            return b""
        if self.byte_level:
            letters = _byte_of_letter()
            return bytes(letters[letter] for letter in piece if letter in letters)
        if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            return bytes.fromhex(byte[1])
        return piece.replace("▁", " ").encode()

    def text_of(self, token: int) -> str:
        """Return a token's text, in which U+FFFD stands for a part of a character."""
        return self.bytes_of(token).decode(errors="replace")
