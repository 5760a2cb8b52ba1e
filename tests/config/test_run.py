"""A run file: the mapping becomes settings, or one clear sentence says what is wrong."""

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap

import pytest

import lorakit as lk
from lorakit.config.data import DataConfig, SourceConfig
from tests.config.run_files import RUN, table

# The sections of docs/run-file.md, and the settings that each lists.
SECTIONS = {
    "## What to train": lk.RunConfig,
    "## How to train": lk.TrainConfig,
    "## `data`": DataConfig,
    "## Sources of data": SourceConfig,
    "## `lora`": lk.LoraConfig,
    "## `quantize`": lk.QuantConfig,
    "## `grpo`": lk.GrpoConfig,
    "## Rewards": lk.RewardConfig,
    "## `distillation`": lk.DistillationConfig,
}


def test_run_config():
    run = lk.RunConfig.from_dict(
        {
            **RUN,
            "quantize": "nf4",
            "lora": {"r": 4, "target_modules": ["q_proj"]},
            "learning_rate": 1.0e-3,
            "max_steps": 5,
        }
    )
    assert run.quantize == lk.QuantConfig()
    assert run.lora.r == 4
    assert run.train.learning_rate == 1e-3
    assert run.data.train == "train.jsonl"
    assert (
        lk.RunConfig.from_dict({**RUN, "quantize": {"block_size": 128}}).quantize.block_size == 128
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat' .did you mean 'learning_rate'"),
        ({"lora": {"rank": 4, "r": 4}}, "lora: unknown key 'rank'"),
        ({"lora": {"lora_alhpa": 4}}, "did you mean 'lora_alpha'"),
        ({"quantize": {"blocksize": 64}}, "did you mean 'block_size'"),
        ({"quantize": "int3"}, "quant_type is 'int3'; choose nf4, fp4 or int8"),
        ({"data": {"train": "a", "valid": "b"}}, "did you mean 'validation'"),
        ({"data": {"validation": "b"}}, "data: train is missing"),
        ({"data": None}, "data is missing|data must be"),
        ({"model": 3}, "model must be str, not 3"),
        ({"learning_rate": "2e-4"}, "learning_rate must be float or null, not '2e-4'"),
        ({"max_steps": 1.5}, "max_steps must be int or null, not 1.5"),
        ({"max_steps": 0}, "max_steps must be positive"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type is 'cosin'; choose constant, "),
        ({"optim": "paged_adamw"}, "optim is 'paged_adamw'; choose adamw_torch, adamw_8bit, "),
        ({"warmup_steps": -1}, "warmup_steps must be null or not negative, not -1"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio is 1.5; it must be in"),
        ({"num_cycles": 0}, "num_cycles must be positive, not 0"),
        ({"num_cycles": 2}, "num_cycles goes with lr_scheduler_type cosine_with_rest"),
        ({"min_lr_ratio": 0.1}, "min_lr_ratio goes with lr_scheduler_type cosine_with"),
        ({"max_steps": 10**400}, r"max_steps must be int or null, not 10{59} \(too large"),
        (
            {"learning_rate": 10**400},
            r"learning_rate must be float or null, not 10{59} \(too large",
        ),
        ({"lora": {"lora_alpha": 10**400}}, "lora_alpha must be .* .too large"),
        ({"num_train_epochs": 1e308}, "num_train_epochs must be below"),
        ({"learning_rate": float("nan")}, "learning_rate must be float or null, not nan"),
        ({"over_length": "skip"}, "over_length is 'skip'"),
        ({"train_on": "answer"}, "train_on is 'answer'; choose completion, last_turn or all"),
        ({"data": {"train": "a", "format": 3}}, "data: format must be str or null, not 3"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"lora": {"r": 0}}, "r must be positive"),
        ({"train": "all"}, "train is 'all'; choose adapter or full"),
        ({"train": "full", "lora": {}}, "trains the model, no adapter: leave out lora"),
        ({"train": "full", "lora_r": 8}, "trains the model, no adapter: leave out lora"),
        ({"train": "full", "adapter": "old"}, "trains the model, no adapter: leave out adapter"),
        ({"train": "full", "quantize": "nf4"}, "needs dense weights, .* leave out quantize"),
        ({"train": "full", "loraplus_lr_ratio": 4.0}, "loraplus_lr_ratio goes with an adapter"),
        ({"train": "full", "frozen_dtype": "float8"}, "frozen_dtype goes with an adapter"),
        ({"train": "full", "freeze": ["("]}, r"freeze: '\(' is no valid regular expression"),
        ({"freeze": ["norm"]}, "freeze goes with train: full"),
        ({"lora": {"lora_dropout": 1.0}}, "lora_dropout is 1.0"),
    ],
)
def test_bad_run_config(change, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.RunConfig.from_dict(RUN | change, "run.yaml")


def test_an_adapter_beside_settings_of_a_new_one():
    data = DataConfig("train.jsonl")
    assert lk.RunConfig("m", data, adapter="old").adapter == "old"
    with pytest.raises(lk.LorakitError, match="adapter in old has settings of its own: leave out"):
        lk.RunConfig("m", data, adapter="old", lora=lk.LoraConfig(r=4))


def test_configs_are_frozen():
    for config in (lk.QuantConfig(), lk.LoraConfig(), lk.TrainConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.r = 1


@pytest.mark.parametrize(("heading", "cls"), SECTIONS.items())
def test_the_guide_lists_every_key_with_its_default(heading, cls):
    expected = []
    for f in dataclasses.fields(cls):
        default = f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        text = (
            "required"
            if default is dataclasses.MISSING
            else f"`{json.dumps(default, default=str)}`"
        )
        if dataclasses.is_dataclass(default):
            text = "the defaults below"
        if f.name != "train" or cls is not lk.RunConfig:
            expected.append([f"`{f.name}`", text])
    rows = table(heading)
    assert [row[:2] for row in rows] == expected
    assert all(row[2] for row in rows)


@pytest.mark.parametrize(("heading", "cls"), SECTIONS.items())
def test_the_guide_says_what_the_fields_say(heading, cls):
    said = {}
    for base in (each for each in cls.__mro__ if dataclasses.is_dataclass(each)):
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, text in itertools.pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                said[f"`{field.target.id}`"] = " ".join(ast.literal_eval(text.value).split())
    rows = table(heading)
    assert {row[0]: row[2] for row in rows} == {row[0]: said[row[0]] for row in rows}


NULLABLE_OR_NOT = [
    *((f.name, {f.name: None}) for f in dataclasses.fields(lk.TrainConfig)),
    *((f"lora.{f.name}", {"lora": {f.name: None}}) for f in dataclasses.fields(lk.LoraConfig)),
    ("lora", {"lora": None}),
    ("dtype", {"dtype": None}),
    ("add_tokens", {"add_tokens": None}),
]


@pytest.mark.parametrize(("name", "given"), NULLABLE_OR_NOT)
def test_a_null_is_not_set(name, given):
    """A key without a value means the default, unless null is one of its values."""
    found, default = lk.RunConfig.from_dict(RUN | given), lk.RunConfig.from_dict(RUN)
    if found != default:
        settings = found.lora if name.startswith("lora.") else found.train
        assert getattr(settings, name.removeprefix("lora.")) is None


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"quantize": "nf4"},
        {"quantize": {"block_size": 128, "lm_head": "int8"}},
        {"train": "full", "freeze": ["embed_tokens"]},
        {"adapter": "a", "dtype": "float32", "chat_template": "chatml"},
        {"lora": {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"x.*": 2}}},
        {"lora_r": 16, "learning_rate": 1e-5, "report_to": ["trackio"], "eval_metrics": ["bleu"]},
        {"per_device_train_batch_size": "auto", "add_tokens": ["<a>"]},
        {"data": {"train": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2.5}]}},
        {"data": {"train": "a", "validation": "b", "columns": {"prompt": "q"}, "seed": 3}},
    ],
)
def test_a_run_says_itself_in_the_words_of_a_run_file(change):
    said = lk.RunConfig.from_dict({**RUN, **change})
    values = json.loads(json.dumps(said.to_dict()))
    assert lk.RunConfig.from_dict(values) == said
    assert "seed" not in values  # what is the default is left out
