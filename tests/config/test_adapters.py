"""The settings of LoRA and of the layers that an adapter goes on."""

import math
import re

import pytest

import lorakit as lk
from lorakit.config.adapters import INITIALIZATIONS, PLAIN_INITIALIZATIONS


def test_rslora_scaling():
    assert lk.LoraConfig(r=8, lora_alpha=16).scaling("q_proj") == 2
    scaling = lk.LoraConfig(r=8, lora_alpha=16, use_rslora=True).scaling("q_proj")
    assert scaling == pytest.approx(5.657, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": "8"}, "lora_alpha must be int or float, not '8'"),
        ({"lora_alpha": math.nan}, "lora_alpha must be int or float, not nan"),
        ({"target_modules": None}, "target_modules must be str or list"),
        (
            {"layers_pattern": "(", "layers_to_transform": 1},
            "layers_pattern: '.' is no valid regex",
        ),
        ({"r": 10**9}, "r must be positive, and 65536 at most"),
        ({"modules_to_save": [3]}, "modules_to_save must be list"),
    ],
)
def test_values_of_the_wrong_type_from_python(options, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.LoraConfig(**options)


def test_rank_and_scaling_of_a_layer():
    config = lk.LoraConfig(
        r=8, lora_alpha=16, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.1\..*": 2}
    )
    assert config.rank_and_scaling("layers.0.q_proj") == (4, 4.0)
    assert config.rank_and_scaling("layers.1.q_proj") == (4, 0.5)
    assert config.rank_and_scaling("layers.1.k_proj") == (8, 0.25)
    assert config.scaling("layers.0.k_proj") == 2


def test_plain_initializations_are_the_ones_that_leave_the_base_alone():
    """The others change the weights of the base, or start from those that quantization changed."""
    assert set(INITIALIZATIONS) - set(PLAIN_INITIALIZATIONS) == {
        "pissa",
        "pissa_niter_N",
        "olora",
        "loftq",
    }
    plain = {None, True, False, "gaussian", "orthogonal", "eva"}
    assert plain | {"mica"} == set(PLAIN_INITIALIZATIONS)  # mica in files alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "some"}, "bias is 'some'; choose none, lora_only or all"),
        ({"target_modules": []}, "target_modules is empty: name at least one layer"),
        ({"layers_pattern": "h"}, "give these too"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj must be positive, and 65536 at most, not 0"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '(' is no valid regex"),
        ({"init_lora_weights": "mica"}, "'mica' of PEFT trains A over a B that is frozen"),
        ({"init_lora_weights": "corda"}, "'corda' of PEFT needs the covariance"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga' of PEFT needs a gradient of each weight"),
        ({"lora_bias": True, "use_dora": True}, "do not go together: choose one"),
        ({"lora_bias": True, "init_lora_weights": "eva"}, "true or false only"),
    ],
)
def test_what_an_adapter_cannot_be(options, message):
    with pytest.raises(lk.LorakitError, match=re.escape(message)):
        lk.LoraConfig(**options)
