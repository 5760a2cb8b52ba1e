"""A model whose weights are divided among processes computes, loads and saves as a whole one does.

What the processes do is in sharded.py. All numbers are equal to the bit: a rank computes with the
very weights, in the same order, wherever they lay before.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import programs
from tests.conftest import FAMILY_VARIANTS, tiny, tiny_llama, write_tokenizer
from tests.models.sharded import CASES, FAMILIES, SLOW

ROOT = Path(__file__).parents[2]


def run(folder: Path, ranks: int, which: str) -> Mapping[str, str]:
    """Return what became of each case, by its name."""
    for name in FAMILIES:
        model = tiny_llama(num_key_value_heads=2, vocab_size=300) if name == "llama" else None
        if model is None:
            family, options = FAMILY_VARIANTS[name]
            model = tiny(family, **options)
        model.save_pretrained(folder / name)
    write_tokenizer(folder / "llama")
    command = ["-m", "tests.models.sharded", ranks, folder, which]
    done = programs.run(command, cwd=ROOT)
    found = folder / "results.json"
    results = json.loads(found.read_text()) if found.exists() else {}
    missing = f"not reached: {done.stderr[-2000:]}"
    return {name: results.get(name, missing) for name in CASES}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2, "fast")


@pytest.fixture(scope="module")
def of_three(tmp_path_factory):
    return run(tmp_path_factory.mktemp("three"), 3, "all")


@pytest.mark.parametrize("case", [name for name in CASES if name not in SLOW])
def test_two_ranks(case, of_two):
    assert of_two[case] == "passed"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_three_ranks(case, of_three):
    assert of_three[case] == "passed"
