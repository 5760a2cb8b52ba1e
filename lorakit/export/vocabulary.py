"""The tokenizer of a GGUF file: its vocabulary, its special tokens, and its chat template.

A tokenizer that was read from a GGUF file goes back as it was. Every other one is taken apart:

    gpt2     byte-level BPE. The file holds the merges, and the *name* of a set of regexes that cut
             a text. That name is found by what the tokenizer does, not by a hash of its output, so
             a tokenizer with tokens of its own is known too. Regexes that llama.cpp does not have
             are refused, since it would cut otherwise and give other ids
    llama    SentencePiece's BPE, which knows no merges but a score for each token, and joins the
             two neighbours whose union scores highest. The scores follow the order of the merges:
             minus the number of the first merge that makes the token

The file holds one token for each row of the embedding. Rows without a token are called [PAD...], by
a name that no token has.

Sources: llama.cpp's llama-vocab.cpp and convert_hf_to_gguf.py, read, not copied.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.files.gguf import Typed, read_header
from lorakit.models.config import ModelConfig
from lorakit.models.tokenizer import Tokenizer
from lorakit.models.tokenizer_files import (
    GPT2,
    PRE_TOKENIZERS,
    TAKE_WORDS_WHOLE,
)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # GGUF token types
# Added tokens that published tokenizers do not call special, although no text should hold them.
_CONTROL_MARK = re.compile(r"<\|.*\|>|<unused\d*>|<pad>|<mask>", re.DOTALL)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_UNMERGED, _NEVER = -1e6, -1000.0  # scores of what no merge makes, and of control tokens


def tokenizer_metadata(tok: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a file that describe the tokenizer.

    Args:
        tok: The tokenizer.
        config: The configuration of its model, whose vocab_size is the number of tokens.

    Returns:
        The values by their keys.

    Raises:
        LorakitError: llama.cpp has no such tokenizer, or it does not belong to the model.
    """
    data = json.loads(tok.backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise LorakitError(
            f"a GGUF file has no place for a tokenizer of type {model['type']!r}: BPE is written"
        )
    sentencepiece = bool(model["byte_fallback"])
    tokens, types = _tokens(data, config.vocab_size, sentencepiece)
    kind = _sentencepiece(data, tokens, types) if sentencepiece else _byte_level(data)
    arrays = {"tokens": tokens, "token_type": types}
    found = kind | arrays | _special(tok, config)
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()} | _template(tok)


def copied_tokenizer(path: Path, tok: Tokenizer) -> dict[str, Any]:
    """Return the keys that describe the tokenizer of the GGUF file at `path`.

    They stay as they are, types included. If `tok` has another chat template, that takes the place
    of the file's. Empty arrays are left out.
    """
    header = read_header(path)
    same = tok.chat_template == header.metadata.get("tokenizer.chat_template")
    found: dict[str, Any] = {
        key: Typed(value, *header.types[key])
        for key, value in header.metadata.items()
        if key.startswith("tokenizer.")
        and (same or not key.startswith("tokenizer.chat_template"))
        and value != []
    }
    return found if same else found | _template(tok)


def _template(tok: Tokenizer) -> dict[str, Any]:
    """Return the keys of the chat template; others than the default stand under their names."""
    template = tok.chat_template
    if template is None:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    found: dict[str, Any] = {}
    others = [name for name in template if name != "default"]
    if others:
        found["tokenizer.chat_templates"] = others
    if "default" in template:
        found["tokenizer.chat_template"] = template["default"]
    return found | {f"tokenizer.chat_template.{name}": template[name] for name in others}


def _tokens(data: Mapping[str, Any], size: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Return the text of each of `size` tokens, and its type."""
    model = data["model"]
    texts = {number: text for text, number in model["vocab"].items()}
    added = {token["id"]: token for token in data["added_tokens"]}
    texts |= {number: token["content"] for number, token in added.items()}
    if max(texts) >= size:
        raise LorakitError(
            f"token {max(texts)} ({texts[max(texts)]!r}) lies outside the model's vocabulary of "
            f"{size}: tokenizer and model do not belong together"
        )
    taken = set(texts.values())
    tokens, types = [], []
    for number in range(size):
        text = texts.get(number)
        if text is None:
            kind, text = _UNUSED, f"[PAD{number}]"
            while text in taken:
                text = f"[{text}]"
        elif text == model["unk_token"] and sentencepiece:
            kind = _UNKNOWN
        elif number in added:
            special = added[number]["special"] or _CONTROL_MARK.fullmatch(text)
            kind = _CONTROL if special else _USER_DEFINED
            text = text if special else text.replace("▁", " ")
        else:
            kind = _BYTE if sentencepiece and _BYTE_TOKEN.fullmatch(text) else _NORMAL
        tokens.append(text)
        types.append(kind)
    if len(set(tokens)) != size:
        twice = next(text for i, text in enumerate(tokens) if text in tokens[:i])
        raise LorakitError(f"the vocabulary holds {twice!r} twice, which llama.cpp refuses")
    return tokens, types


# ---- the two kinds ------------------------------------------------------------------------------


def _byte_level(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of byte-level BPE: the pre-tokenizer's name, and the merges."""
    normalizer = data["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":  # which llama.cpp leaves out
        raise LorakitError(
            f"a GGUF file has no place for the tokenizer's normalizer {normalizer['type']!r}"
        )
    name = _pre_tokenizer(data)
    whole = bool(data["model"].get("ignore_merges"))
    if whole != (name in TAKE_WORDS_WHOLE):
        raise LorakitError(
            f"the tokenizer has ignore_merges={str(whole).lower()}, and llama.cpp's {name!r} not"
        )
    if not data["model"]["merges"]:
        raise LorakitError("the tokenizer has no merges, which llama.cpp asks for")
    merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _merges(data)]
    return {"model": "gpt2", "pre": name, "merges": merges}


def _merges(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges, which older files hold as text."""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in data["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _pre_tokenizer(data: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how the tokenizer cuts a text."""
    pre = data["pre_tokenizer"] or {"type": "none"}
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    cuts = []
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}:
                cuts.append(regex)
            case {"type": "Digits", "individual_digits": True}:
                cuts.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
                cuts += [GPT2] if use_regex else []
            case _:
                raise LorakitError(
                    f"a GGUF file has no place for the tokenizer's step {json.dumps(step):.100}"
                )
    for name, regexes in PRE_TOKENIZERS.items():
        if cuts == regexes:
            return name
    raise LorakitError(
        f"llama.cpp's name for a tokenizer that cuts by {' and '.join(cuts):.200} is not known: "
        f"known are {', '.join(PRE_TOKENIZERS)}"
    )


def _sentencepiece(data: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Return the keys of SentencePiece's BPE: the scores, and whether a space goes before."""
    order: dict[str, int] = {}
    for left, right in _merges(data):
        order.setdefault(left + right, len(order))
    scores = []
    for token, kind in zip(tokens, types, strict=True):
        if kind == _CONTROL:
            scores.append(_NEVER)
        elif kind in (_UNKNOWN, _BYTE):
            scores.append(0.0)
        else:
            scores.append(-float(order[token]) if token in order else _UNMERGED)
    return {
        "model": "llama",
        "pre": "default",
        "scores": scores,
        "add_space_prefix": _adds_space(data),
    }


def _adds_space(data: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer puts a space before a text.

    Raises LorakitError for a step that is not SentencePiece's.
    """
    prefix = False
    normalizer, pre = data["normalizer"], data["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    for step in [*steps, *([] if pre is None else [pre])]:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case {"type": "Metaspace", "replacement": "▁"}:
                prefix = prefix or step.get("prepend_scheme", "always") != "never"
            case {"type": "Split", "pattern": {"String": " "}}:  # Gemma's, after all are replaced
                pass
            case _:
                raise LorakitError(
                    f"a GGUF file has no place for the tokenizer's step {json.dumps(step):.100}"
                )
    return prefix


# ---- special tokens -----------------------------------------------------------------------------


def _special(tok: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """Return the ids of the special tokens, and which of them go around a text.

    Without the ids of BOS and EOS llama.cpp would take fixed ones, so they are always there.
    """
    ends = list(dict.fromkeys([*tok.end_token_ids, *config.eos_token_ids]))
    if not ends:
        raise LorakitError("neither tokenizer nor model says which token ends a text (eos_token)")
    bos = tok.bos_token_id if tok.bos_token_id is not None else config.bos_token_id
    found = {
        "bos_token_id": ends[0] if bos is None else bos,
        "eos_token_id": ends[0],
        "unknown_token_id": tok.token_id("unk_token"),
        "padding_token_id": tok.pad_token_id,
    }
    found |= zip(("eot_token_id", "eom_token_id"), ends[1:], strict=False)
    for name, number in found.items():
        if number is not None and not 0 <= number < config.vocab_size:
            raise LorakitError(
                f"{name} is {number}, and the model has the tokens 0 to {config.vocab_size - 1}: "
                "correct it in config.json or generation_config.json"
            )
    around = tok.encode("")
    before = around[:1] == [bos]
    after = around[1:] if before else around
    if after not in ([], ends[:1]):
        raise LorakitError(
            f"the tokenizer puts the tokens {around} around a text: a GGUF file has places for BOS "
            "before and EOS after"
        )
    flags = {"add_bos_token": before, "add_eos_token": bool(after)}
    return {name: number for name, number in found.items() if number is not None} | flags
