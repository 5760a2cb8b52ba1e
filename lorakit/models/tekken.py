"""Read tekken.json, which holds the tokenizer of Mistral's repositories.

    config            pattern, a regex that cuts a text into words; default_vocab_size, the number
                      of all ids; default_num_special_tokens, the number of special ones
    vocab             the other tokens in the order of their ranks, their bytes in base64
    special_tokens    ids and names; files before version 7 have none and mean the same 20 names

Special tokens have the first ids; those without a name are called <SPECIAL_n>. The token of rank r
has the id r + default_num_special_tokens, and ranks that would pass the end are left out.

A word that is a token is taken whole. In others the two neighbours are joined whose union has the
lowest rank, again and again. A tokenizer of the tokenizers library wants merges: they are every
split of every token into two others, in the order of the ranks. Two splits of one token that
overlap in a word are joined by their order, and leftmost first in Mistral's own code.

Source: mistral_common/tokens/tokenizers/tekken.py of mistral-common 1.13, read, not copied.
"""

import base64
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, pre_tokenizers

from lorakit.config.errors import LorakitError
from lorakit.files.local import read_json

_NAMES = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
_NAMES += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"]
_NAMES += ["[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
_NAMES += ["[TOOL_CONTENT]"]
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def read_tekken(file: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Read a tekken.json.

    Args:
        file: The file.

    Returns:
        The tokenizer, which puts <s> before a text, and its special tokens by Hugging Face's names.

    Raises:
        LorakitError: The file is missing or damaged.
    """
    values = read_json(file)
    try:
        config = values["config"]
        special = _special(values, config["default_num_special_tokens"])
        rest = config["default_vocab_size"] - len(special)
        words = [base64.b64decode(each["token_bytes"]) for each in values["vocab"][:rest]]
        if len(words) != rest or len(set(words)) != rest:
            raise LorakitError(f"{file}: the vocabulary has not {rest} different tokens")
        backend = _backend(special, words, config["pattern"])
    except LorakitError:
        raise
    except Exception as error:  # the library raises bare Exception for what it cannot use
        raise LorakitError(f"{file} is not a valid tokenizer: {error!r:.100}") from None
    return backend, {key: text for key, text in _SPECIAL.items() if text in special}


def _special(values: dict[str, Any], count: int) -> list[str]:
    """Return the names of the special tokens, by their ids."""
    names = [f"<SPECIAL_{number}>" for number in range(count)]
    given = values.get("special_tokens") or [
        {"rank": number, "token_str": name} for number, name in enumerate(_NAMES)
    ]
    for each in given:
        names[each["rank"]] = each["token_str"]
    return names


def _backend(special: list[str], words: list[bytes], pattern: str) -> tokenizers.Tokenizer:
    """Return the tokenizer of special tokens, of words in the order of their ranks, and a regex."""
    ranks = {word: rank for rank, word in enumerate(words)}
    letters = _letters()
    texts = {word: "".join(letters[byte] for byte in word) for word in words}
    merges = [
        (texts[word[:i]], texts[word[i:]])
        for word in words
        for i in range(1, len(word))
        if word[:i] in ranks and word[i:] in ranks
    ]
    vocab = {name: number for number, name in enumerate(special)}
    vocab |= {text: len(special) + ranks[word] for word, text in texts.items()}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in special])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", special.index("<s>"))]
    )
    return backend


def _letters() -> list[str]:
    """Return the letter that byte-level BPE writes for each byte.

    Bytes that print in Latin-1 stand for themselves, the others for U+0100 and on, in their order.
    """
    prints = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]
