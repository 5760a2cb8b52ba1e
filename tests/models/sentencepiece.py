"""A SentencePiece vocabulary for tests, trained on a few texts."""

import json

import tokenizers

TEXTS = [
    "Hello world, it's 2024!  don't\n\n  def f(x):\n\treturn 12345",
    "<|im_start|>user\nhé 😀 中文<|im_end|>",
    "  leading and trailing  ",
    "",
    "a\u00a0b\u200bc\r\n\r\n\t",
    "١٢٣ ½ Ⅷ x²",
]

PRE_TEXTS = [
    *TEXTS,
    "IT'S DON'T 'tis we'll we'LL I'm",
    "1 12 123 1234 12345678 1,000.50 007 12:34",
    "a  b   c    d\n\n\n e \t\t f\r\n \n  g  ",
    "$$$ <=> ^~| a+b=c (x) {y} [z] “q” — … ¿qué? #! // /n",
    "e\u0301 ñandú\u3000Größe Привет мир 한국어 日本語",
    "http://a.b/c?d=e&f=1 def f(x):return x**2!?!",
]

SPM_TEXTS = [
    "The people of the town went there to see the other things that they had there.",
    " one leading space",
    "  two, and two at the end  ",
    "line\nline\n\nline\t\tend\n",
    "😀 héllo 👩‍👩‍👧 中文 \u00a0\u200b Ⅷ",
    "aaaa aaaaa       -----  ==== hahahahaha",
    "<turn>user\nHi <b>there</b><end>\n<s> a</s>  <unk> <0x0A>",
    "<b>",
    " ",
]

SPM_SPECIAL = ["<turn>", "<end>"]

SPM_ADDED = ["   ", "\n\n", "<b>"]

SPM_FIRST = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{i:02X}>" for i in range(256)),
    *SPM_SPECIAL,
    *SPM_ADDED,
]


def spm_metadata(**options):
    """A SentencePiece vocabulary as llama.cpp's converter stores it, trained on TEXTS."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, max_token_length=8, show_progress=False
    )
    runs = ["    " * 3, "--------", "aaaaaaa", "hahahaha hahaha"]
    backend.train_from_iterator([*PRE_TEXTS, *runs, *SPM_TEXTS] * 2, trainer)
    model = json.loads(backend.to_str())["model"]
    characters = sorted(piece for piece in model["vocab"] if len(piece) == 1)
    pieces = dict.fromkeys(["".join(merge) for merge in model["merges"]] + characters)
    pieces = [p for p in pieces if p not in SPM_FIRST and not set(p) & {"中", "x", "é"}]
    plain = len(SPM_FIRST)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": SPM_FIRST + pieces,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 3, 3, 4, 4, 4, *[1] * len(pieces)],
        "tokenizer.ggml.scores": [*[0.0] * plain, *(-float(i) for i in range(len(pieces)))],
        "tokenizer.ggml.merges": None,
        **{f"tokenizer.ggml.{name}": value for name, value in options.items()},
    }
