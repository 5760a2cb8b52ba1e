"""Tokenizers in GGUF files: llama.cpp gives the ids that lorakit does."""

import json
import math
import random
from functools import partial

import gguf
import numpy as np
import pytest
import tokenizers

import lorakit as lk
from lorakit.export.vocabulary import tokenizer_metadata
from lorakit.files.gguf import NewTensor, Typed, read_header, write_gguf
from lorakit.models.tokenizer import Tokenizer
from lorakit.models.tokenizer_files import load_tokenizer
from tests.conftest import tiny_llama
from tests.export.llama_cpp import LlamaCpp
from tests.export.models import SIZE, byte_level, write_model
from tests.models.gguf_files import write_vocabulary
from tests.models.sentencepiece import PRE_TEXTS, SPM_TEXTS, TEXTS, spm_metadata


def thousand(special):
    """Texts of pieces that hurt: marks, digits, many spaces, other scripts, control characters."""
    pieces = [*" \n\t'.,!?-_/()[]{}", *special, "  ", "\n\n", "12", "345", "6789", "don't", "WE'LL"]
    pieces += ["hello", "the", "Größe", "ñandú", "中文", "日本語", "Привет", "😀", "½"]
    pieces += ["\u00a0", "e\u0301"]
    generator = random.Random(0)
    made = ["".join(generator.choices(pieces, k=generator.randint(1, 12))) for _ in range(970)]
    return [*TEXTS, *PRE_TEXTS, *SPM_TEXTS, *made]


def exported(tmp_path, tok, rows):
    """A model just large enough for llama.cpp, with this tokenizer."""
    one = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    tiny_llama(vocab_size=rows, hidden_size=8, tie_word_embeddings=True, **one).save_pretrained(
        tmp_path / "model"
    )
    file = tmp_path / "m.gguf"
    lk.export_gguf(tmp_path / "model", file, quantization="f32", tokenizer=tok)
    return file


def compare(file, tok, texts):
    with LlamaCpp(file) as theirs:
        for text in texts:
            if text:  # llama.cpp puts no BOS before nothing
                assert theirs.tokenize(text) == tok.encode(text), text
        assert set(tok.end_token_ids) <= theirs.ends()


def test_smollm2(tmp_path, smollm2):
    """Its own vocabulary, taken apart and put together as that of a directory is."""
    load_tokenizer(smollm2).save(tmp_path)
    tok = load_tokenizer(tmp_path)
    file = exported(tmp_path, tok, len(tok))
    compare(file, tok, thousand(["<|im_start|>", "<|im_end|>", "<|endoftext|>"]))
    own, theirs = read_header(file).metadata, read_header(smollm2).metadata
    keys = ["tokens", "merges", "pre", "model", "bos_token_id", "eos_token_id"]
    for key in [*(f"tokenizer.ggml.{key}" for key in keys), "tokenizer.chat_template"]:
        assert own[key] == theirs[key], key


def test_sentencepiece(tmp_path):
    """The scores follow from the merges alone, as in a directory without tokenizer.model."""
    metadata = spm_metadata(add_space_prefix=False)
    source = write_vocabulary(tmp_path / "source.gguf", metadata)
    load_tokenizer(source).save(tmp_path)
    tok = load_tokenizer(tmp_path)
    file = exported(tmp_path, tok, len(tok) + 7)
    found = read_header(file).metadata
    assert found["tokenizer.ggml.tokens"][-1] == f"[PAD{len(tok) + 6}]"
    assert found["tokenizer.ggml.token_type"][-1] == 5
    assert found["tokenizer.ggml.token_type"][:3] == [2, 3, 3]
    compare(file, tok, thousand(["<turn>", "<b>", "   "]))


def test_a_file_of_a_file_has_its_tokenizer(tmp_path):
    """Also scores and types that no merges give; only the keys of the template may be new."""
    source = write_vocabulary(tmp_path / "source.gguf", spm_metadata(add_bos_token=True))
    lk.export_gguf(source, tmp_path / "again.gguf", quantization="f32")
    before, after = read_header(source).metadata, read_header(tmp_path / "again.gguf").metadata
    own = {key: value for key, value in before.items() if key.startswith("tokenizer.")}
    assert own == {key: value for key, value in after.items() if key.startswith("tokenizer.")}


def test_what_a_file_says_of_its_tokenizer_keeps_its_types(tmp_path):
    """Numbers below zero or of 8 and 64 bits stay so, and other templates are there."""
    kinds = gguf.GGUFValueType
    odd = {
        "tokenizer.ggml.mask_token_id": Typed(-1, kinds.INT32, None),
        "tokenizer.ggml.precompiled_charsmap": Typed([1, 200], kinds.ARRAY, kinds.UINT8),
        "tokenizer.ggml.large": Typed([1 << 40], kinds.ARRAY, kinds.UINT64),
        "tokenizer.huggingface.json": Typed("{}", kinds.STRING, None),
        "tokenizer.chat_template": Typed("a{{ 1 }}", kinds.STRING, None),
        "tokenizer.chat_template.tool_use": Typed("b{{ 1 }}", kinds.STRING, None),
    }
    plain, source, again = (tmp_path / f"{name}.gguf" for name in ("plain", "source", "again"))
    lk.export_gguf(write_model(tmp_path / "model", "llama"), plain, quantization="f32")
    header = read_header(plain)
    metadata = {key: Typed(v, *header.types[key]) for key, v in header.metadata.items()} | odd
    tensors = [
        NewTensor(name, info.shape, "F32", partial(np.fromfile, plain, np.uint8, 4 * n, "", at))
        for name, info in header.tensors.items()
        for n, at in [(math.prod(info.shape), info.offset)]
    ]
    write_gguf(source, metadata | {"general.architecture": "llama"}, tensors)
    lk.export_gguf(source, again, quantization="f32")
    assert said_of_tokenizer(again) == said_of_tokenizer(source)
    assert odd.keys() <= said_of_tokenizer(again).keys()


def said_of_tokenizer(file):
    """The keys of the tokenizer in a file: values and types."""
    header = read_header(file)
    keys = [key for key in header.metadata if key.startswith("tokenizer.")]
    return {key: (header.metadata[key], header.types[key]) for key in keys}


def test_the_adapters_tokens_and_template_are_written(tmp_path):
    directory = write_model(tmp_path / "model", "llama")
    tok, model = load_tokenizer(directory), lk.load_model(directory, dtype="float32")
    lk.attach(model, lk.add_tokens(model, tok, ["<|new|>"], lk.LoraConfig(r=2)))
    tok.chat_template = "{{ messages }}"
    lk.save_adapter(model, tmp_path / "adapter")
    tok.save(tmp_path / "adapter")
    file = tmp_path / "m.gguf"
    lk.export_gguf(directory, file, quantization="f32", adapter=tmp_path / "adapter")
    found = read_header(file).metadata
    [new] = tok.encode("<|new|>", add_special_tokens=False)
    assert found["tokenizer.ggml.tokens"][new] == "<|new|>"
    assert found["tokenizer.ggml.token_type"][new] == 3
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    compare(file, tok, ["hello <|new|> the"])


def config():
    return lk.ModelConfig.from_hf(tiny_llama(vocab_size=SIZE).config.to_dict())


def changed(**parts):
    """The tiny tokenizer with other parts of its tokenizer.json."""
    tok = byte_level()
    data = json.loads(tok.backend.to_str())
    model = parts.pop("model", {})
    data = {**data, **parts, "model": {**data["model"], **model}}
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    return Tokenizer(backend, tok.special_tokens, tok.chat_template)


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer 'Lowercase'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "x"}}}, "cuts by x"),
        ({"model": {"ignore_merges": True}}, "ignore_merges=true"),
        ({"model": {"merges": []}}, "no merges"),
    ],
)
def test_what_llama_cpp_has_not_is_refused(parts, said):
    with pytest.raises(lk.LorakitError, match=said):
        tokenizer_metadata(changed(**parts), config())


def test_a_tokenizer_of_another_model_is_refused():
    tok = byte_level()
    tok.add_special_tokens([f"<|{i}|>" for i in range(SIZE)])
    with pytest.raises(lk.LorakitError, match="do not belong together"):
        tokenizer_metadata(tok, config())


def test_several_templates_stand_under_their_names():
    tok = byte_level()
    tok.chat_template = {"default": "a{{ 1 }}", "tool_use": "b{{ 1 }}"}
    found = tokenizer_metadata(tok, config())
    assert found["tokenizer.chat_template"] == "a{{ 1 }}"
    assert found["tokenizer.chat_template.tool_use"] == "b{{ 1 }}"
    assert found["tokenizer.chat_templates"] == ["tool_use"]
