"""Two tiny models with other vocabularies, rows of a task, and a grid over both."""

import gc
import json

import pytest

from tests.conftest import tiny_llama, write_tokenizer
from tests.export.models import byte_level


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A model with the tokenizer of the tests of exporting, and one whose tokenizer has words."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama(num_key_value_heads=2, vocab_size=300).save_pretrained(folder / "bytes")
    byte_level().save(folder / "bytes")
    tiny_llama(vocab_size=300, num_hidden_layers=1).save_pretrained(folder / "words")
    write_tokenizer(folder / "words")
    path = folder / "words" / "tokenizer.json"
    values = json.loads(path.read_text())
    for number, text in enumerate([" even", " odd", " is"], 259):
        token = {"id": number, "content": text, "special": False, "normalized": True}
        token |= {"single_word": False, "lstrip": False, "rstrip": False}
        values["added_tokens"].append(token)
    path.write_text(json.dumps(values))
    return {name: str(folder / name) for name in ("bytes", "words")}


@pytest.fixture(autouse=True, scope="package")
def quick_collection(models):
    """A comparison collects garbage between runs; what libraries have made is left out of that."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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
