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

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from lorakit.config.errors import LorakitError
from lorakit.files.local import as_path, write_json, write_text
from lorakit.models.chat_template import Messages, checked_messages, render_template


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
        if self.chat_template is None:
            raise LorakitError("the tokenizer has no chat template; give one as chat_template=")
        if isinstance(self.chat_template, str):
            return self.chat_template
        name = "tool_use" if with_tools and "tool_use" in self.chat_template else "default"
        if name not in self.chat_template:
            names = ", ".join(self.chat_template)
            raise LorakitError(f"there is no chat template {name!r}; there are {names}")
        return self.chat_template[name]
