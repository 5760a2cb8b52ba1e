"""The tables of what fits where: the shapes of published models, and how a page is written."""

import sys
from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.models.decoder import Decoder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# What the Hub's pages of these repositories say, in billions; of Gemma 3 without the vision tower.
PARAMETERS = {"8B": 8.03, "12B": 11.77, "27B": 27.01, "32B": 32.76, "70B": 70.55}


@pytest.fixture
def tables(monkeypatch):
    """benchmarks/plan_tables.py, which imports published.py beside it by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("plan_tables", "published"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import plan_tables

    return plan_tables


def test_published_shapes_have_the_parameters_of_the_models(tables):
    for model, size in tables.SIZES.items():
        config = lk.ModelConfig.from_hf(dict(tables.PUBLISHED[model]))
        with torch.device("meta"):
            count = sum(p.numel() for p in Decoder(config).parameters())
        assert count / 1e9 == pytest.approx(PARAMETERS[size], abs=0.006), model


def test_a_page_keeps_what_stands_around_its_tables(tables, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n")
    for _ in range(2):
        tables.write(page, ["new", ""])
        assert page.read_text() == f"before\n\n{tables.BEGIN}\n\nnew\n\n{tables.END}\n\nafter\n"


def test_the_page_has_the_cards_and_the_marks_that_the_program_writes(tables):
    text = (BENCHMARKS.parent / "docs" / "scale-tables.md").read_text(encoding="utf-8")
    assert text.count(tables.BEGIN) == text.count(tables.END) == 1
    for name in tables.CARDS.values():
        assert name in text
        assert lk.find_card(name)
