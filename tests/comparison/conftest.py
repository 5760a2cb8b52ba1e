"""Two tiny models with other vocabularies, rows of a task, and a grid over both."""

import json
import shutil

import pytest

from tests.conftest import tiny_llama, write_tokenizer


@pytest.fixture(scope="session")
def models(tiny_dir, tmp_path_factory):
    """The tiny model with a byte-level tokenizer, and a smaller one with some whole words."""
    other = tmp_path_factory.mktemp("other") / "words"
    tiny_llama(vocab_size=320, num_hidden_layers=1).save_pretrained(other)
    write_tokenizer(other)
    path = other / "tokenizer.json"
    values = json.loads(path.read_text())
    for text in (" even", " odd", "is"):
        number = len(values["model"]["vocab"]) + len(values["added_tokens"])
        token = {"id": number, "content": text, "special": False, "normalized": True}
        token |= {"single_word": False, "lstrip": False, "rstrip": False}
        values["added_tokens"].append(token)
    path.write_text(json.dumps(values))
    small = tmp_path_factory.mktemp("bytes") / "bytes"
    shutil.copytree(tiny_dir, small)
    return {"bytes": str(small), "words": str(other)}


@pytest.fixture
def rows(tmp_path):
    """A file of 60 rows: whether a number is even."""
    path = tmp_path / "rows.jsonl"
    numbers = [(i, "odd" if i % 2 else "even") for i in range(60)]
    lines = [{"prompt": f"{i} is", "completion": f" {word}"} for i, word in numbers]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def grid(models, rows, tmp_path):
    """The mapping of a comparison file: two models, one task, one seed."""
    return {
        "models": dict(models),
        "tasks": {"parity": {"data": str(rows), "kind": "classification"}},
        "output_dir": str(tmp_path / "compared"),
        "base": {"max_steps": 3, "dtype": "float32", "learning_rate": 1e-2, "lora": {"r": 2}},
    }
