"""docs/migration.md: every snippet runs, PEFT's with peft and with lorakit.compat.peft, and all
that stand side by side compute the same.
"""

import re
from pathlib import Path

import peft
import pytest
import torch

import lorakit as lk
from lorakit.compat import peft as compat
from tests.compat.comparing import close, logits, randomize
from tests.conftest import tiny_llama

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
SECTIONS = {}
for _heading, _text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL):
    _found = re.findall(r"^```python (\w+)\n(.*?)^```", _text, re.MULTILINE | re.DOTALL)
    if _found:
        SECTIONS[_heading] = dict(_found)
RANDOM = {"Train", "Four bits"}  # A starts at random, and what is packed is packed twice
IDS = torch.arange(24).view(2, 12)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def run(tiny_dir, tmp_path, monkeypatch):
    """Run a snippet where there are adapters; returns its names."""
    model = tiny_llama(num_key_value_heads=2, vocab_size=300)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(model, config, adapter_name="a")
    model.add_adapter("b", config)
    randomize(model).save_pretrained(tmp_path / "adapters")
    monkeypatch.chdir(tmp_path)

    def run(code, decoder=False):
        model = tiny_llama(num_key_value_heads=2, vocab_size=300)
        if decoder:
            model = lk.load_model(tiny_dir, dtype="float32")
        names = {"model": model, "ids": IDS, "path": str(tiny_dir)}
        exec(compile(code, "docs/migration.md", "exec"), names)
        return names

    return run


def test_the_first_snippet_imports_pefts_names_from_compat():
    [code] = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names = {}
    exec(code, names)
    del names["__builtins__"]
    assert {"LoraConfig", "PeftModel", "get_peft_model"} <= names.keys()
    for name, value in names.items():
        assert value is vars(compat)[name]
        assert name in vars(peft)


@pytest.mark.parametrize("heading", SECTIONS)
def test_snippets(run, heading):
    found = SECTIONS[heading]
    theirs = found["peft"]
    names = [run(theirs), run(found["lorakit"], decoder=True)]
    if heading not in RANDOM:  # these load a model of their own
        names.append(run(found["lorakit"]))
    if "compat" in found:
        names += [run(found["compat"]), run(found["compat"], decoder=True)]
    else:
        ours = re.sub("^from peft import", "from lorakit.compat.peft import", theirs, flags=re.M)
        assert ours != theirs
        names.append(run(ours))
        if heading != "Train":  # the decoder has no labels among its inputs
            names.append(run(ours, decoder=True))
    models = [each["model"].eval() for each in names]
    if heading not in RANDOM:
        for model in models[1:]:
            close(logits(model, IDS), logits(models[0], IDS))
    assert all(torch.isfinite(logits(model, IDS)).all() for model in models)
    for each in names:
        for name in ("base", "mixed"):
            if name in each:
                first, other = (e[name] for e in (names[0], each))
                other = other if isinstance(other, torch.Tensor) else other.logits
                close(other, first.logits)


def typo(name):
    options = {
        "target_modules": {"target_modules": ["q_proj", "v_prj"]},
        "rank_pattern": {"target_modules": ["q_proj"], "rank_pattern": {"q_prj": 3}},
        "alpha_pattern": {"target_modules": ["q_proj"], "alpha_pattern": {"q_prj": 3}},
        "exclude_modules": {"target_modules": ["q_proj"], "exclude_modules": ["k_prj"]},
        "layers_to_transform": {"target_modules": ["q_proj"], "layers_to_transform": [0, 9]},
        "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_hed"]},
    }
    return options[name]


@pytest.mark.parametrize(
    "name",
    [
        "target_modules",
        "rank_pattern",
        "alpha_pattern",
        "exclude_modules",
        "layers_to_transform",
        "modules_to_save",
    ],
)
def test_names_that_match_nothing_train_on_there_and_raise_here(name):
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(**typo(name)))
    with pytest.raises(lk.LorakitError, match=name):
        compat.get_peft_model(tiny_llama(), compat.LoraConfig(**typo(name)))


def test_a_tied_embedding_and_a_merge_of_nan_raise_here():
    config = {"target_modules": ["embed_tokens"]}
    peft.get_peft_model(tiny_llama(tie_word_embeddings=True), peft.LoraConfig(**config))
    with pytest.raises(lk.LorakitError, match="shares its weight"):
        compat.get_peft_model(tiny_llama(tie_word_embeddings=True), compat.LoraConfig(**config))
    for library in (peft, compat):
        model = library.get_peft_model(tiny_llama(), library.LoraConfig(target_modules=["q_proj"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(float("nan"))
        if library is peft:
            model.merge_and_unload()
        else:
            with pytest.raises(lk.LorakitError, match="NaN"):
                model.merge_and_unload()


def test_layers_of_bitsandbytes_are_refused(run):
    code = SECTIONS["Four bits"]["peft"].partition("model = prepare")[0]
    model = run(code)["model"]
    with pytest.raises(lk.LorakitError, match="is a Linear4bit, not an nn.Linear"):
        compat.get_peft_model(model, compat.LoraConfig())


def test_modes_of_dropout():
    config = {"target_modules": ["q_proj"], "lora_dropout": 0.5}
    for library, same in ((peft, False), (compat, True)):
        model = library.get_peft_model(tiny_llama().eval(), library.LoraConfig(**config))
        randomize(model)
        assert torch.equal(logits(model, IDS), logits(model, IDS)) == same
        assert torch.equal(logits(model.eval(), IDS), logits(model, IDS))
