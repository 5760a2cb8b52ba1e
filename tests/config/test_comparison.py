"""A comparison file: the mapping becomes settings, or one clear sentence says what is wrong."""

import ast
import dataclasses
import inspect
import json
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest

import lorakit as lk
from lorakit.comparison.grid import grid_of, slug
from tests.config.run_files import table

GUIDE = (Path(__file__).parents[2] / "docs" / "comparison.md").read_text(encoding="utf-8")

FILE = {
    "models": ["org/small", "models/large.gguf"],
    "tasks": {"a": "a.jsonl", "b": {"train": "t.jsonl", "test": "e.jsonl", "kind": "extraction"}},
    "output_dir": "runs/x",
    "base": {"learning_rate": 1e-3, "lora": {"r": 4, "lora_alpha": 8}},
    "settings": {"plain": None, "wide": {"lora": {"r": 16}, "quantize": "nf4"}},
    "seeds": [0, 3],
}


def test_a_file_and_its_grid():
    config = lk.ComparisonConfig.from_dict(FILE)
    assert config.models == {"small": "org/small", "large": "models/large.gguf"}
    assert config.tasks["a"] == lk.TaskConfig(data="a.jsonl")
    assert config.tasks["b"].measured_by == ["entity_f1", "exact_match", "partial_match"]
    runs = grid_of(config)
    assert len(runs) == 2 * 2 * (1 + 2 * 2)
    assert len({run.id for run in runs}) == len(runs)
    last = runs[-1]
    assert (last.id, last.seed) == ("b--large--wide--s3", 3)
    # a mapping is laid over one of base key by key, and no file of the list is the run's own
    assert (last.config.lora.r, last.config.lora.lora_alpha) == (16, 8)
    assert last.config.quantize == lk.QuantConfig()
    assert last.config.train.seed == 3
    assert last.config.train.resume == "auto"
    assert lk.RunConfig.from_dict(last.values) == last.config
    untrained = [run for run in runs if not run.is_trained]
    assert {run.settings for run in untrained} == {"untrained"}
    assert {run.seed for run in untrained} == {None}
    assert runs[2].config.data.validation == "runs/x/data/a/validation.jsonl"
    alone = lk.ComparisonConfig.from_dict({**FILE, "baseline": False})
    assert len(grid_of(alone)) == len(runs) - len(untrained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "x"}, "unknown key 'model' (did you mean 'models'?)"),
        ({"models": []}, "models is empty"),
        ({"models": ["a/x", "b/x"]}, "two models are called 'x'; give them names"),
        ({"models": {"x": 3}}, "models must be"),
        ({"tasks": {}}, "tasks is empty"),
        ({"tasks": {"a": {}}}, "task a: give data, which is divided, or train and test"),
        ({"tasks": {"a": {"data": "x", "train": "y"}}}, "one of the two"),
        ({"tasks": {"a": {"train": "x"}}}, "train needs test"),
        ({"tasks": {"a": {"data": "x", "test": "y"}}}, "data is divided; take out"),
        ({"tasks": {"a": {"data": "x", "metrics": ["rouge"]}}}, "did you mean 'rouge_l'"),
        ({"tasks": {"a": {"data": "x", "kind": "chat"}}}, "kind is 'chat'; choose classification"),
        ({"tasks": {"a": {"data": "x", "kind": "text", "metrics": ["chrf"]}}}, "have no answers"),
        ({"settings": {"untrained": {}}}, "untrained is what models without training are called"),
        ({"settings": {"a\nb": {}}}, "settings: 'a\\nb' is no name"),
        ({"tasks": {"": "x"}}, "tasks: '' is no name"),
        ({"name": "\x1b[31m"}, "name: '\\x1b[31m' is no name"),
        ({"seeds": [1, 1]}, "each given once"),
        ({"seeds": []}, "at least one number"),
        ({"base": {"output_dir": "x"}}, "base: output_dir is not for a comparison"),
        ({"settings": {"s": {"seed": 1}}}, "s: seed is not for a comparison"),
        ({"output_dir": None}, "output_dir is missing|output_dir must be str"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(lk.LorakitError) as error:
        lk.ComparisonConfig.from_dict({**FILE, **change}, "compare.yaml")
    assert any(each in str(error.value) for each in message.split("|"))
    assert "compare.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": {"learning_rat": 1}}, "unknown key 'learning_rat' (did you mean"),
        ({"settings": {"s": {"lora": {"rank": 1}}}}, "base with settings s, lora: unknown key"),
        ({"base": {"eval_metrics": ["accuracy"]}}, "task b: eval_metrics need validation rows"),
        ({"base": {"objective": "reward"}}, "a comparison measures what models write"),
    ],
)
def test_runs_that_cannot_be(change, message):
    with pytest.raises(lk.LorakitError) as error:
        grid_of(lk.ComparisonConfig.from_dict({**FILE, **change}))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["..", "a/b", "a b", "-x", "ä", "x" * 60, "a.", "con--x y"])
def test_a_slug_is_a_plain_name_of_its_own(name):
    found = slug(name)
    assert found.replace("-", "").replace(".", "").replace("_", "").isalnum()
    assert found.isascii()
    assert not found.startswith(("-", "."))
    assert found != slug(name + "!")
    assert slug("plain.name_1") == "plain.name_1"


@pytest.mark.parametrize(
    ("heading", "cls"), [("## The file", lk.ComparisonConfig), ("## `tasks`", lk.TaskConfig)]
)
def test_the_guide_lists_every_key_as_the_fields_say(heading, cls):
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    told = {
        node.target.id: " ".join(after.value.value.split())
        for node, after in pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
    expected = []
    for f in dataclasses.fields(cls):
        default = f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        required = default is dataclasses.MISSING
        text = "required" if required else f"`{json.dumps(default)}`"
        expected.append([f"`{f.name}`", text, told[f.name]])
    assert table(heading, GUIDE) == expected
