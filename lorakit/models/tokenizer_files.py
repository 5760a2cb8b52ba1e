"""Read the tokenizer of a model from its files.

A Hugging Face directory holds a tokenizer.json or a tekken.json; tokenizer_directory.py reads it. A
GGUF file holds the parts of a tokenizer, from which one is built that gives llama.cpp's ids. There
are two kinds:

- "gpt2", byte-level BPE: the file holds vocabulary, merges and the name of a pre-tokenizer.
- "llama", SentencePiece's BPE: the file holds a score for each token. Encoding joins the two
  neighbours whose union scores highest, again and again. So the merges are every split of every
  token into two others, in the order of the scores. Spaces are written "▁", and a character that is
  no token becomes tokens of single bytes. The ids differ from llama.cpp's in two cases, which no
  trained vocabulary has: two tokens with one score, of which llama.cpp joins the leftmost first,
  and a character that is no token itself but stands in a longer one.

The types and lengths of a file's vocabulary are checked before a tokenizer is made of it. Nothing
here runs code from a file: a tokenizer that needs a Python class of its own is not read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers

from lorakit.config.errors import LorakitError, nearest, one_of
from lorakit.files import hub
from lorakit.files.gguf import read_header
from lorakit.files.local import as_path, read_text
from lorakit.models.chat_template import check_template
from lorakit.models.named_templates import NAMED_TEMPLATES
from lorakit.models.tokenizer import Tokenizer
from lorakit.models.tokenizer_directory import read_parts, read_template

# The names in GGUF's tokenizer.ggml.pre, and the regexes that cut a text before BPE, one after the
# other. "gpt-2" is GPT-2's own (openai/gpt-2, encoder.py), "default" is what llama.cpp does where a
# file names none, the others are those in the models' tokenizer.json.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "default": [
        r"[\p{P}\$\+<=>\^~\|]+",
        GPT2.removesuffix(r"|\s+"),
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ],
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [_LLAMA3],
    "qwen2": [_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")],
    "tekken": [_TEKKEN],
}
TAKE_WORDS_WHOLE = ("llama-bpe", "tekken")
"""The pre-tokenizers after which a word that is a token is taken whole, whatever the merges say."""
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # GGUF token types


def load_tokenizer(
    path_or_hub_id: str | Path, *, chat_template: str | Path | None = None
) -> Tokenizer:
    """Load the tokenizer of a model.

    Args:
        path_or_hub_id: A Hugging Face directory with a tokenizer.json or Mistral's tekken.json, a
            .gguf file, or a Hub id ("organization/name").
        chat_template: The chat template to use instead of the model's own: a name (chatml, gemma,
            gemma4, llama3 or zephyr), a jinja file, a directory with a template, such as that of
            an adapter, or the text of a template.

    Returns:
        The tokenizer, with the model's special tokens and its chat template.

    Raises:
        LorakitError: If it is missing, damaged, or of a kind that lorakit does not read, or the
            chat template is.
    """
    given = None if chat_template is None else _given_template(chat_template)
    path = hub.resolve(path_or_hub_id, hub.TOKENIZER_FILES)
    if path.suffix == ".gguf":
        tok = _from_gguf(path)
    else:
        tok = Tokenizer(*read_parts(path), source=path.absolute())
    if given is not None:
        tok.chat_template = given
    return tok


def adapted_tokenizer(
    model: str | Path, adapter: str | Path | None, chat_template: str | Path | None = None
) -> Tokenizer:
    """Return the tokenizer of a model with an adapter.

    It is the adapter's, or else the model's, with the chat template that is given, or else that of
    the adapter if it has one.
    """
    if adapter is not None and brings(adapter, "tokenizer.json"):
        return load_tokenizer(adapter, chat_template=chat_template)
    if chat_template is None and adapter is not None and brings(adapter, "chat_template.jinja"):
        chat_template = as_path(adapter)
    return load_tokenizer(model, chat_template=chat_template)


def brings(adapter: str | Path | None, name: str) -> bool:
    """Return whether a file of that name lies beside an adapter."""
    return adapter is not None and (as_path(adapter) / name).is_file()


def _given_template(chat_template: str | Path) -> str | dict[str, str]:
    """Return the template that a name, a file, a directory or a text means."""
    text, names = str(chat_template), one_of([*NAMED_TEMPLATES])
    if not isinstance(chat_template, (str, Path)) or not text:
        raise LorakitError(f"chat_template is {chat_template!r:.60}; give a jinja file or {names}")
    if text in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[text]
    where = "chat_template"
    if "{{" not in text and "{%" not in text:  # which every template holds
        path = as_path(chat_template)
        where = str(path)
        if path.is_dir():
            found = read_template(path)
            if found is None:
                raise LorakitError(f"chat_template: {path} holds no chat template")
            return found
        if not path.exists():
            raise LorakitError(
                f"chat_template: {text} is no file, and no name of a template"
                f"{nearest(text, NAMED_TEMPLATES)}; give a jinja file or {names}"
            )
        text = read_text(path)
    check_template(text, where)
    return text


# ---- GGUF files ----------------------------------------------------------------------------------


class _Vocabulary:
    """The keys under tokenizer.ggml of a GGUF file, whose types are checked as they are read."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata = read_header(path).metadata
        self.tokens: list[str] = self.items("tokens", str)
        if not self.tokens:
            raise LorakitError(f"{path}: the file holds no vocabulary")
        if len(set(self.tokens)) != len(self.tokens):
            raise LorakitError(f"{path}: the vocabulary holds a token twice")

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """Return a value, checked to be of type `kind`; `default` where the file has none."""
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if value is not None and not isinstance(value, kind):
            raise LorakitError(
                f"{self.path}: tokenizer.ggml.{name} is {value!r:.60}, not {kind.__name__}"
            )
        return value

    def items(self, name: str, kind: type) -> list[Any]:
        """Return an array, checked to hold items of type `kind`; [] where the file has none."""
        values: list[Any] = self.get(name, list, [])
        if values and not isinstance(values[0], kind):  # an array's items are of one type
            raise LorakitError(
                f"{self.path}: tokenizer.ggml.{name} holds {values[0]!r:.60}, not {kind.__name__}"
            )
        return values

    def per_token(self, name: str, kind: type) -> list[Any]:
        """Return an array, checked to hold one item of type `kind` for each token."""
        values = self.items(name, kind)
        if len(values) != len(self.tokens):
            raise LorakitError(
                f"{self.path}: tokenizer.ggml.{name} has {len(values)} entries for "
                f"{len(self.tokens)} tokens"
            )
        return values

    def special(self, name: str, default: int | None = None) -> str | None:
        """Return a special token's text, or None if the file gives no id of the vocabulary."""
        token_id = self.get(f"{name}_token_id", int, default)
        if token_id is None or not 0 <= token_id < len(self.tokens):
            return None
        return self.tokens[token_id]

    @property
    def chat_template(self) -> str | None:
        """The model's chat template, if the file holds one."""
        template = self.metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise LorakitError(
                f"{self.path}: tokenizer.chat_template is {template!r:.60}, not text"
            )
        return template


def _from_gguf(path: Path) -> Tokenizer:
    vocabulary = _Vocabulary(path)
    kind = vocabulary.get("model", str)
    if kind not in ("gpt2", "llama"):
        raise LorakitError(
            f"{path}: tokenizer {kind!r} is not supported; byte-level BPE ('gpt2') and "
            "SentencePiece's ('llama') are"
        )
    sentencepiece = kind == "llama"
    special = _special_tokens(vocabulary, sentencepiece)
    put_around = _tokens_around(vocabulary, special, sentencepiece)
    template = vocabulary.chat_template
    try:
        backend = _sentencepiece(vocabulary) if sentencepiece else _byte_level(vocabulary)
        _add_tokens(backend, vocabulary)
        _put_around(backend, *put_around)
    except LorakitError:
        raise
    except Exception as error:  # the library raises bare Exception for what it cannot use
        raise LorakitError(f"{path}: the vocabulary is damaged: {error}") from None
    return Tokenizer(backend, special, template)


def _special_tokens(vocabulary: _Vocabulary, sentencepiece: bool) -> dict[str, str]:
    """Return the special tokens by Hugging Face's names."""
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if sentencepiece else {}  # llama.cpp's
    special = {}
    for key, name in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        token = vocabulary.special(name, defaults.get(name))
        if token is not None:
            special[f"{key}_token"] = token
    return special


def _tokens_around(
    vocabulary: _Vocabulary, special: Mapping[str, str], sentencepiece: bool
) -> tuple[list[str], list[str]]:
    """Return the tokens that go before every text, and those after it.

    A file may say so. Otherwise llama.cpp's rule holds: SentencePiece, Llama 3 and Mistral's tekken
    put a BOS before.
    """
    usual = sentencepiece or vocabulary.get("pre", str) in ("llama-bpe", "tekken")
    add_bos = vocabulary.get("add_bos_token", bool, usual)
    add_eos = vocabulary.get("add_eos_token", bool, False)
    before = [special["bos_token"]] if add_bos and "bos_token" in special else []
    after = [special["eos_token"]] if add_eos and "eos_token" in special else []
    return before, after


def _put_around(backend: tokenizers.Tokenizer, before: list[str], after: list[str]) -> None:
    """Make the tokenizer put the tokens `before` and `after` around every text."""
    if before or after:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", "$B", *after],
            special_tokens=[(t, backend.token_to_id(t)) for t in {*before, *after}],
        )


def _add_tokens(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    """Add the special and user-defined tokens, which are cut out of a text before all else."""
    if "tokenizer.ggml.token_type" not in vocabulary.metadata:
        return
    special: list[tokenizers.AddedToken] = []
    plain: list[tokenizers.AddedToken] = []
    kinds = vocabulary.per_token("token_type", int)
    for token, kind in zip(vocabulary.tokens, kinds, strict=True):
        if kind == _USER_DEFINED:
            plain.append(tokenizers.AddedToken(token, normalized=False, special=False))
        elif kind in (_UNKNOWN, _CONTROL):
            special.append(tokenizers.AddedToken(token, normalized=False, special=True))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _byte_level(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    """Return a byte-level BPE tokenizer with the file's merges."""
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
            ignore_merges=pre in TAKE_WORDS_WHOLE,
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
    """Return SentencePiece's BPE tokenizer, whose merges follow from the tokens' scores."""
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
    normalize: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    decode: list[decoders.Decoder] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if vocabulary.get("add_space_prefix", bool, True):
        normalize.insert(0, normalizers.Prepend("▁"))
        decode.append(decoders.Strip(" ", left=1, right=0))
    backend.normalizer = normalizers.Sequence(normalize)
    backend.decoder = decoders.Sequence(decode)
    return backend
