"""The tables of PEFT's options against the installed peft, and what each reader makes of them."""

import copy
import dataclasses
import json
import typing

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorakit as lk
from lorakit.adapters.peft_files import features
from lorakit.adapters.peft_files.lora_config import FROM_THE_WEIGHT
from lorakit.compat import peft as compat
from lorakit.config.adapters import LACKING_INITIALIZATIONS, PLAIN_INITIALIZATIONS
from tests.adapters.common import CLOSE, SHORT_IDS, filled
from tests.conftest import tiny

TABLES = {
    "HONOURED": features.HONOURED,
    "FILES_ONLY": features.FILES_ONLY,
    "HARMLESS": features.HARMLESS,
    "SPENT": features.SPENT,
    "REFUSED": features.REFUSED,
}
# Options of other methods of PEFT that change nothing in a finished adapter: how its numbers start,
# sizes that follow from the model, and how the text of a prompt was cut into tokens.
OTHER_METHODS = {
    "init_ia3_weights",
    "init_weights",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "token_dim",
    "tokenizer_kwargs",
}


def names_of(kind):
    return {field.name for field in dataclasses.fields(kind)}


def test_every_option_of_pefts_lora_config_is_in_one_table():
    for name in sorted(names_of(peft.LoraConfig)):
        assert [table for table in TABLES if name in TABLES[table]] != [], name
    for name in set().union(*TABLES.values()):
        assert len([table for table in TABLES if name in TABLES[table]]) == 1, name


def test_what_is_refused_is_off_by_default():
    defaults = peft.LoraConfig().to_dict()
    for name in {**features.NOT_PLAIN, **features.REFUSED, **features.SPENT}:
        assert not defaults.get(name), name
    assert set(features.NOT_PLAIN) <= features.HONOURED


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (peft.IA3Config, lk.IA3Config),
        (peft.VeraConfig, lk.VeraConfig),
        (peft.AdaLoraConfig, lk.AdaLoraConfig),
        (peft.MissConfig, lk.MissConfig),
        (peft.PromptTuningConfig, lk.PromptTuningConfig),
        (peft.PromptEncoderConfig, lk.PromptEncoderConfig),
        (peft.PrefixTuningConfig, lk.PrefixTuningConfig),
    ],
    ids=lambda kind: kind.__module__.partition(".")[0] + "." + kind.__name__,
)
def test_every_option_of_the_other_methods_is_known(theirs, ours):
    known = names_of(ours) | set().union(*TABLES.values()) | OTHER_METHODS
    assert names_of(theirs) <= known


# Initializations that change the weights of the base.
CHANGING = {"corda", "lora_ga", "loftq", "olora", "pissa", "pissa_niter_[number of iters]"}


def literals(kind):
    """The values of all Literals inside a type."""
    if typing.get_origin(kind) is typing.Literal:
        return set(typing.get_args(kind))
    return set().union(*map(literals, typing.get_args(kind)))


def test_every_initialization_of_peft_is_known():
    names = literals(typing.get_type_hints(peft.LoraConfig)["init_lora_weights"])
    assert "mica" in names
    assert names <= set(PLAIN_INITIALIZATIONS) | CHANGING
    assert set(LACKING_INITIALIZATIONS) <= names | {"lora_ga"}  # which PEFT's type leaves out
    assert set(FROM_THE_WEIGHT) <= CHANGING


def test_compat_has_the_options_that_are_in_a_table_and_no_others():
    assert names_of(compat.LoraConfig) == set().union(*TABLES.values())


@pytest.fixture
def adapter(tmp_path):
    """An adapter of the first of two linear layers, and a function that sets an option of it."""
    tensors = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2)}
    save_file(
        {f"base_model.model.0.{end}.weight": tensor for end, tensor in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )

    def write(**options):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"], **options}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def model():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize("name", features.REFUSED)
def test_what_lorakit_lacks_is_refused_by_every_reader(adapter, name, tmp_path):
    path = adapter(**{name: {"any": 1}})
    with pytest.raises(lk.LorakitError, match=rf"{name}=.* is not supported \([^)]{{20,}}\)$"):
        lk.load_adapter(model(), path)
    with pytest.raises(lk.LorakitError, match=f"{name}=.* does not fit in plain LoRA"):
        lk.convert_adapter(path, tmp_path / "out")
    with pytest.raises(lk.LorakitError, match=f"lorakit has no {name}"):
        compat.LoraConfig(**{name: {"any": 1}})
    with pytest.raises(lk.LorakitError, match=f"lorakit has no {name}"):
        compat.LoraConfig.from_pretrained(path)


@pytest.mark.parametrize("unused", [None, False, [], {}])
def test_an_option_that_is_not_used_is_accepted(adapter, tmp_path, unused):
    path = adapter(**dict.fromkeys([*features.REFUSED, *features.SPENT], unused))
    lk.load_adapter(model(), path)
    lk.convert_adapter(path, tmp_path / "out")
    compat.LoraConfig.from_pretrained(path)


@pytest.mark.parametrize("name", features.SPENT)
def test_settings_of_a_start_are_spent_in_a_file_and_refused_in_a_new_config(
    adapter, tmp_path, name
):
    path = adapter(**{name: {"any": 1}})
    assert set(lk.adapter_names(lk.load_adapter(model(), path))) == {"default"}
    lk.convert_adapter(path, tmp_path / "out")
    with pytest.raises(lk.LorakitError, match=f"lorakit has no {name}"):
        compat.LoraConfig(**{name: {"any": 1}})


@pytest.mark.parametrize("init", [None, True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_an_initialization_that_leaves_the_base_alone_loads_and_converts(adapter, tmp_path, init):
    path = adapter(init_lora_weights=init)
    x = torch.randn(3, 4)
    base = model()
    truth = base(x)
    loaded = lk.load_adapter(base, path)(x)
    assert not torch.allclose(loaded, truth)
    lk.convert_adapter(path, tmp_path / "out")
    lk.load_adapter(lk.detach(base), tmp_path / "out")
    assert torch.equal(base(x), loaded)


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq", "pissa_niter_4"])
def test_an_initialization_that_changed_the_base(adapter, init):
    with pytest.raises(lk.LorakitError, match=f'"{init}" changes the base weights'):
        lk.load_adapter(model(), adapter(init_lora_weights=init))


def test_an_initialization_that_nobody_knows(adapter):
    with pytest.raises(lk.LorakitError, match='"xyz" is not known to lorakit, and may change'):
        lk.load_adapter(model(), adapter(init_lora_weights="xyz"))


ONLY_IN_TRAINING = {
    "velora": {"velora_config": {"num_groups": 8}},
    "monteclora": {"monteclora_config": {"num_samples": 2}},
    "mica": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("options", ONLY_IN_TRAINING.values(), ids=ONLY_IN_TRAINING)
def test_what_only_training_does_otherwise_loads_as_plain_lora(tmp_path, options):
    plain = tiny("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **options)
    theirs = filled(peft.get_peft_model(copy.deepcopy(plain), config)).eval()
    theirs.save_pretrained(tmp_path)
    truth = theirs(SHORT_IDS).logits
    ours = lk.load_adapter(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(ours(SHORT_IDS).logits, truth, **CLOSE)
    assert not lk.describe_adapter(tmp_path).warnings
    lk.convert_adapter(tmp_path, tmp_path / "out")
    again = lk.load_adapter(plain, tmp_path / "out")
    torch.testing.assert_close(again(SHORT_IDS).logits, truth, **CLOSE)


# Options of LoRA that AdaLoRA has too: PEFT computes the same with them.
UNUSED_IN_ADALORA = {
    "alpha_pattern": {"q_proj": 3},
    "ensure_weight_tying": True,
    "init_lora_weights": False,
    "lora_bias": True,
    "r": 5,
    "use_rslora": True,
}
REFUSED_IN_ADALORA = {"bias", "trainable_token_indices", "use_dora"}  # use_dora by PEFT


def test_options_of_lora_that_adalora_does_not_use(tmp_path):
    shared = (names_of(peft.AdaLoraConfig) & features.HONOURED) - names_of(lk.AdaLoraConfig)
    assert shared == set(UNUSED_IN_ADALORA) | REFUSED_IN_ADALORA
    plain = tiny("llama")
    config = peft.AdaLoraConfig(
        init_r=4, total_step=10, target_modules=["q_proj"], **UNUSED_IN_ADALORA
    )
    theirs = filled(peft.get_peft_model(copy.deepcopy(plain), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = lk.load_adapter(plain, tmp_path)
    torch.testing.assert_close(ours(SHORT_IDS).logits, theirs(SHORT_IDS).logits, **CLOSE)
