"""PEFT's configs from lorakit.compat.peft against peft's own."""

import dataclasses

import peft
import pytest

import lorakit as lk
from lorakit.compat import peft as compat

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be contained:UserWarning")


def test_a_config_is_pefts_with_the_same_defaults(adapters):
    ours, theirs = compat.LoraConfig(), peft.LoraConfig()
    named = {"target_modules", "runtime_config", "peft_version", "megatron_core"}
    named |= {"qalora_group_size"}
    for field in dataclasses.fields(theirs):
        if field.name not in named:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert named < {field.name for field in dataclasses.fields(ours)}
    assert ours.target_modules == ["q_proj", "v_proj"]
    config = compat.PeftConfig.from_pretrained(adapters / "a")
    assert (config.r, config.lora_alpha, config.task_type) == (4, 6, "CAUSAL_LM")
    assert sorted(config.target_modules) == ["down_proj", "q_proj"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_qalora": True}, "lorakit has no use_qalora"),
        ({"layer_replication": [(0, 1)]}, "lorakit has no layer_replication"),
        ({"target_parameters": ["x"]}, "lorakit has no target_parameters"),
        ({"task_type": "SEQ_CLS"}, "name the head in modules_to_save"),
        ({"task_type": "CAUSAL"}, "choose one of SEQ_CLS"),
        ({"r": 0}, "r must be positive"),
    ],
)
def test_configs_that_are_refused(options, message):
    with pytest.raises(lk.LorakitError, match=message):
        compat.LoraConfig(**options)


def test_configs_of_other_types_and_their_files(tmp_path):
    config = compat.LoraConfig(
        target_modules=("q_proj",), modules_to_save={"lm_head"}, layers_to_transform=range(1)
    )
    assert (config.modules_to_save, config.layers_to_transform) == (["lm_head"], [0])
    config.save_pretrained(tmp_path)
    assert compat.LoraConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    read = peft.LoraConfig.from_pretrained(tmp_path)
    assert (read.target_modules, read.layers_to_transform) == ({"q_proj"}, [0])
