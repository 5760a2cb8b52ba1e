"""A model's tokenizer: text to token ids and back, and chats by the model's own template.

The `tokenizers` library does the work. tokenizer_files.py makes a `Tokenizer` of a model's files.
A chat that a template has rendered already holds its special tokens, so it is tokenized without
adding any.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import tokenizers

from lorakit.config.errors import LorakitError, one_of
from lorakit.files.local import as_path
from lorakit.models.chat_template import Messages, checked_messages, render_template
from lorakit.models.named_templates import NAMED_TEMPLATES
from lorakit.models.tokenizer_directory import TokenizerParts, write_parts, write_template


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        backend: The tokenizer of the `tokenizers` library.
        special_tokens: The texts of the special tokens, by their names ("bos_token", ...).
        chat_template: The model's chat template, or several by their names ("default",
            "tool_use", ...), or None.
        source: The directory that the tokenizer was read from, or None.
        has_new_tokens: Whether `add_special_tokens` has added some since.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | Mapping[str, str] | None = None,
        source: Path | None = None,
    ):
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.source = source
        self.has_new_tokens = False

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, by default with the special tokens that belong around it.

        Raises LorakitError if `text` is no Unicode.
        """
        return self._encoding(text, add_special_tokens).ids

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of `text`, and the span of characters of each.

        A span is (start, end), without the end itself. Tokens of one character, such as the bytes
        of an emoji, all have its span. The special tokens that belong around the text, if they are
        added, stand at (0, 0) before it and at (len(text), len(text)) after it. Raises LorakitError
        if `text` is no Unicode.
        """
        encoding = self._encoding(text, add_special_tokens)
        offsets, t = encoding.offsets, len(encoding.ids)
        while t and encoding.special_tokens_mask[t - 1]:
            t -= 1
        if t:  # the library puts these at (0, 0) too
            offsets[t:] = [(len(text), len(text))] * (len(offsets) - t)
        return encoding.ids, offsets

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:
            raise LorakitError(f"not valid Unicode text: {ascii(text)[:60]}") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids, by default without the special tokens among them."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, name: str) -> int | None:
        """Return the id of a special token by its name ("bos_token", ...), None if there is none.

        Raises LorakitError if the vocabulary does not hold its text.
        """
        text = self.special_tokens.get(name)
        if text is None:
            return None
        token_id = self.backend.token_to_id(text)
        if token_id is None:
            raise LorakitError(f"the tokenizer's {name}, {text!r}, is not in its vocabulary")
        return token_id

    def add_special_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Add special tokens to the vocabulary; those that it has stay as they are.

        Args:
            tokens: The texts of the tokens.

        Returns:
            The id of each of them.

        Raises:
            LorakitError: They are not different texts. Nothing is added then.
        """
        fits = not isinstance(tokens, str) and all(isinstance(t, str) and t for t in tokens)
        if not fits or len(set(tokens)) != len(tokens):
            raise LorakitError(
                f"tokens to add must be a list of different texts, not {ascii(tokens)[:60]}"
            )
        new = [text for text in tokens if self.backend.token_to_id(text) is None]
        self.backend.add_special_tokens(new)
        self.has_new_tokens = self.has_new_tokens or bool(new)
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return [vocabulary[text] for text in tokens]

    def check_fits(self, ids: Iterable[int], vocab_size: int) -> None:
        """Raise LorakitError if one of `ids` has no row in an embedding of `vocab_size` rows."""
        largest = max(ids)
        if largest >= vocab_size:
            raise LorakitError(
                f"token {largest} ({self.backend.id_to_token(largest)!r}) lies outside the model's "
                f"vocabulary of {vocab_size}: tokenizer and model do not belong together; if the "
                "token is a new one, add it to both with add_tokens"
            )

    def save(self, path: str | Path) -> None:
        """Write the tokenizer into a directory, so that lorakit and transformers load it again.

        What the tokenizer was read from goes along byte for byte: tokenizer.model, vocab.json and
        all other files for other readers. Those that contradict a tokenizer that was changed since
        are left out, and a line in the log names them.

        Args:
            path: The directory. It is made if it is missing.
        """
        path = as_path(path)
        path.mkdir(parents=True, exist_ok=True)
        parts = TokenizerParts(self.backend, self.special_tokens, self.chat_template)
        write_parts(parts, path, self.source)

    def save_chat_template(self, path: str | Path) -> None:
        """Write the chat template alone into a directory, beside an adapter for example.

        `load_tokenizer` takes that directory as chat_template. Without a template, one of an
        earlier save is removed.

        Args:
            path: The directory. It is made if it is missing.
        """
        path = as_path(path)
        path.mkdir(parents=True, exist_ok=True)
        write_template(self.chat_template, path)

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token that opens a text."""
        return self.token_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text."""
        return self.token_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id of the token that fills up short rows."""
        return self.token_id("pad_token")

    @property
    def end_token_ids(self) -> list[int]:
        """The ids of the tokens that end an answer.

        They are eos_token, and the token that closes the assistant's turn in the chat template. A
        short chat is rendered to find that token.
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

    @overload
    def apply_chat_template(
        self,
        messages: Messages,
        tokenize: Literal[True] = True,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Messages,
        tokenize: Literal[False],
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Messages,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        *,
        chat_template: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str | list[int]:
        """Return a chat as the model was trained to see it.

        Args:
            messages: The turns, each {"role": ..., "content": ...}.
            tokenize: True returns token ids, False the text.
            add_generation_prompt: End with the header of the assistant's turn.
            chat_template: The text or the name of the template to use, by default the model's own.
            tools: The tools that the model may call, for the template.
            documents: Documents to answer from, for the template.
            **variables: Other variables of the template, such as enable_thinking.

        Returns:
            Token ids, or with tokenize=False the text.

        Raises:
            LorakitError: If there is no template, the messages are malformed, or the template
                refuses them.
        """
        source = chat_template or self._template(tools is not None)
        source = NAMED_TEMPLATES.get(source, source)
        rendered = render_template(
            source,
            messages=checked_messages(messages),
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens, **variables},
        )
        return self.encode(rendered, add_special_tokens=False) if tokenize else rendered

    def _template(self, with_tools: bool) -> str:
        """Return the model's template for a chat with or without tools."""
        if self.chat_template is None:
            raise LorakitError(
                "the tokenizer has no chat template; set chat_template to a jinja file or to "
                f"{one_of([*NAMED_TEMPLATES])}"
            )
        if isinstance(self.chat_template, str):
            return self.chat_template
        name = "tool_use" if with_tools and "tool_use" in self.chat_template else "default"
        if name not in self.chat_template:
            names = ", ".join(self.chat_template)
            raise LorakitError(f"there is no chat template {name!r}; there are {names}")
        return self.chat_template[name]
