"""Configs: both spellings of transformers, and one clear sentence for anything wrong."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.cli.run_file import read_run_file
from lorakit.config import aliases as aliases
from lorakit.config.run import DataConfig

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
RUN = {"model": "m", "data": "train.jsonl"}


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
        ({"learning_rate": "2e-4"}, "learning_rate must be float, not '2e-4'"),
        ({"max_steps": 1.5}, "max_steps must be int or null, not 1.5"),
        ({"max_steps": 0}, "max_steps must be positive"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type is 'cosin'; choose constant, "),
        ({"optim": "paged_adamw"}, "optim is 'paged_adamw'; choose adamw_torch, adamw_8bit, "),
        ({"warmup_steps": -1}, "warmup_steps must be null or not negative, not -1"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio is 1.5; it must be in"),
        ({"num_cycles": 0}, "num_cycles must be positive, not 0"),
        ({"num_cycles": 2}, "num_cycles is of lr_scheduler_type cosine_with_restarts alone"),
        ({"min_lr_ratio": 0.1}, "min_lr_ratio is of lr_scheduler_type cosine_with_min_lr alone"),
        ({"max_steps": 10**400}, r"max_steps must be int or null, not 10{59} \(too large"),
        ({"learning_rate": 10**400}, r"learning_rate must be float, not 10{59} \(too large"),
        ({"lora": {"lora_alpha": 10**400}}, "lora_alpha must be .* .too large"),
        ({"num_train_epochs": 1e308}, "num_train_epochs must be below"),
        ({"learning_rate": float("nan")}, "learning_rate must be float, not nan"),
        ({"over_length": "skip"}, "over_length is 'skip'"),
        ({"train_on": "answer"}, "train_on is 'answer'; choose completion, last_turn or all"),
        ({"data": {"train": "a", "format": 3}}, "data: format must be str or null, not 3"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"lora": {"r": 0}}, "r must be positive"),
        ({"lora": {"lora_dropout": 1.0}}, "lora_dropout is 1.0"),
    ],
)
def test_bad_run_config(change, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.RunConfig.from_dict(RUN | change, "run.yaml")


def test_configs_are_frozen():
    for config in (lk.QuantConfig(), lk.LoraConfig(), lk.TrainConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.r = 1


def test_rslora_scaling():
    assert lk.LoraConfig(r=8, lora_alpha=16).scaling("q_proj") == 2
    scaling = lk.LoraConfig(r=8, lora_alpha=16, use_rslora=True).scaling("q_proj")
    assert scaling == pytest.approx(5.657, abs=1e-3)


RUN_KEYS = ["model", "data", "lora", "quantize", "dtype", "seed", "train_on", "max_steps", "x"]
YAML_PIECES = b"\n|  |[|]|{|}|&a |*a|- |? |m|1|2e-4|!!int |!!timestamp x|!!bool |2024-99-99|'|<<: "
YAML = st.lists(
    st.one_of(
        st.sampled_from(RUN_KEYS).map(lambda key: f"{key}: ".encode()),
        st.sampled_from(YAML_PIECES.split(b"|")),
        st.binary(max_size=3),
    ),
    max_size=14,
).map(b"".join)


@settings(max_examples=300)
@given(YAML)
def test_any_bytes_give_a_run_or_one_clear_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "run.yaml"
    path.write_bytes(data)
    try:
        run = lk.RunConfig.from_dict(read_run_file(path, []), "run.yaml")
    except lk.LorakitError as error:
        assert "run.yaml" in str(error) or "dtype" in str(error)
    else:
        assert run.model


def test_deep_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text("[" * 100_000)
    with pytest.raises(lk.LorakitError, match="is not valid YAML"):
        read_run_file(tmp_path / "run.yaml", [])


# ---- run files of other libraries ----

AXOLOTL = {
    "base_model": "m",
    "model_type": "LlamaForCausalLM",
    "load_in_8bit": False,
    "load_in_4bit": True,
    "strict": False,
    "datasets": [{"path": "train.jsonl", "ds_type": "json", "type": "alpaca"}],
    "val_set_size": 0.0,
    "output_dir": "out",
    "adapter": "qlora",
    "lora_model_dir": None,
    "sequence_len": 2048,
    "sample_packing": True,
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "lora_target_linear": True,
    "wandb_project": None,
    "wandb_entity": "us",
    "gradient_accumulation_steps": 4,
    "micro_batch_size": 2,
    "num_epochs": 3,
    "optimizer": "paged_adamw_8bit",
    "lr_scheduler": "cosine",
    "learning_rate": 0.0002,
    "train_on_inputs": False,
    "bf16": "auto",
    "tf32": False,
    "gradient_checkpointing": True,
    "resume_from_checkpoint": None,
    "logging_steps": 1,
    "flash_attention": True,
    "warmup_steps": 10,
    "max_steps": 100,
    "save_steps": 50,
    "weight_decay": 0.0,
}
TRL = {
    "model_name_or_path": "m",
    "dataset_name": "train.jsonl",
    "max_length": 512,
    "per_device_train_batch_size": 4,
    "logging_steps": 5,
    "bf16": True,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": ["q_proj", "v_proj"],
    "use_rslora": True,
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "fp4",
    "use_bnb_nested_quant": False,
    "neftune_noise_alpha": 5,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 3,
    "load_best_model_at_end": True,
    "resume_from_checkpoint": True,
    "report_to": "none",
    "max_steps": -1,
    "num_train_epochs": 2,
    "push_to_hub": False,
}


def test_axolotl_file(caplog):
    values = {name: value for name, value in AXOLOTL.items() if name != "lora_model_dir"}
    run = lk.RunConfig.from_dict(values, "axolotl.yaml")
    assert run == lk.RunConfig(
        model="m",
        data=DataConfig("train.jsonl"),
        lora=lk.LoraConfig(r=32, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"),
        quantize=lk.QuantConfig(quant_type="nf4"),
        dtype="bfloat16",
        train=lk.TrainConfig(
            output_dir="out",
            max_seq_length=2048,
            packing=True,
            gradient_accumulation_steps=4,
            per_device_train_batch_size=2,
            num_train_epochs=3,
            optim="paged_adamw_8bit",
            learning_rate=2e-4,
            gradient_checkpointing=True,
            warmup_steps=10,
            train_on="completion",
            max_steps=100,
            save_steps=50,
        ),
    )
    said = [message.removeprefix("lorakit: axolotl.yaml: ") for message in caplog.messages]
    ignored = [message.partition(" is ignored: ")[0] for message in said if "ignored" in message]
    assert ignored == [
        "model_type",
        "strict",
        "ds_type of datasets",
        "type of datasets",
        "wandb_entity",
        "logging_steps",
        "flash_attention",
    ]
    assert len(said) == len(ignored)


def test_trl_file():
    assert lk.RunConfig.from_dict(TRL) == lk.RunConfig(
        model="m",
        data=DataConfig("train.jsonl"),
        lora=lk.LoraConfig(
            r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], use_rslora=True
        ),
        quantize=lk.QuantConfig(quant_type="fp4", double_quant=False),
        train=lk.TrainConfig(
            max_seq_length=512,
            per_device_train_batch_size=4,
            neftune_noise_alpha=5,
            save_steps=100,
            save_total_limit=3,
            load_best_model_at_end=True,
            resume="auto",
            num_train_epochs=2,
        ),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model": "m"}, "run.yaml: base_model and model set the same thing: keep one"),
        ({"sequence_len": 8, "max_length": 8}, "max_length and sequence_len set the same thing"),
        ({"sequence_len": 8, "max_seq_length": 9}, "sequence_len and max_seq_length set the sam"),
        ({"lora_r": 8, "lora": {"r": 8}}, "lora_r and lora.r set the same thing"),
        ({"lora_r": 8, "lora": 3}, "lora_r and lora set the same thing"),
        ({"dataset_name": "x"}, "dataset_name and data.train set the same thing"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit and load_in_4bit set"),
        ({"load_in_4bit": True, "quantize": None}, "load_in_4bit and quantize set the same thing"),
        ({"bf16": True, "torch_dtype": "float32"}, "torch_dtype and bf16 set the same thing"),
        ({"bf16": "no"}, "bf16: it must be true or false, not 'no'"),
        ({"fp16": True}, "fp16 is True: gradients of a float16 model underflow"),
        ({"adapter": None}, "adapter: choose lora or qlora, not None"),
        ({"adapter": "qlora", "load_in_4bit": False}, "adapter: qlora needs load_in_4bit: true"),
        ({"bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type: it says how load_in_4bit packs"),
        ({"val_set_size": 0.05}, "val_set_size is 0.05: lorakit splits no rows off"),
        ({"test_datasets": []}, "test_datasets: a list of one entry with a path is wanted"),
        ({"test_datasets": [{"path": "a"}, {"path": "b"}]}, "put all rows in one file"),
        ({"test_datasets": [{"path": "a", "split": "train"}]}, "'split' of an entry cannot be"),
        ({"test_datasets": [{"type": "alpaca"}]}, "test_datasets: the entry has no path"),
        ({"save_strategy": "epoch"}, "save_strategy: give save_steps instead of 'epoch'"),
        ({"save_strategy": "steps"}, "it is 'steps', and save_steps is missing"),
        ({"save_strategy": False, "save_steps": 3}, "it is 'no', and save_steps is given too"),
        ({"eval_strategy": "no", "eval_steps": 3}, "it is 'no', and eval_steps is given too"),
        ({"report_to": "wandb"}, "report_to is 'wandb'; choose tensorboard or null"),
        ({"optimizer": "lion"}, "optim is 'lion'; choose adamw_torch, adamw_8bit"),
        ({"lr_scheduler": "polynomial"}, "lr_scheduler_type is 'polynomial'"),
        ({"deepspeed": "zero3.json"}, "deepspeed: lorakit trains on one device"),
        ({"max_length": None}, "max_seq_length must be int, not None"),
        ({"lora_r": "8"}, "lora: r must be int, not '8'"),
        ({"micro_batchsize": 8}, "unknown key 'micro_batchsize' .did you mean 'micro_batch_size'"),
        ({"lora.r": 8}, "unknown key 'lora.r'"),
        ({"lora_model_dir": None}, "unknown key 'lora_model_dir'"),
    ],
)
def test_alias_that_cannot_be_honoured(change, message):
    with pytest.raises(lk.LorakitError, match=message) as caught:
        lk.RunConfig.from_dict(RUN | change, "run.yaml")
    assert "\n" not in str(caught.value)


@given(st.sampled_from(sorted(aliases.RENAMED)), st.data())
def test_a_renamed_key_says_what_ours_says(name, data):
    value = data.draw(scalars | st.just(["q_proj"]) | st.just("m") | st.just(3))
    parent, dot, leaf = aliases.RENAMED[name].rpartition(".")
    values = {key: its for key, its in RUN.items() if key != (parent or leaf)}
    ours = {parent: {leaf: value}} if dot else {leaf: value}

    def outcome(change):
        try:
            return lk.RunConfig.from_dict(values | change)
        except lk.LorakitError as error:
            return str(error)

    if value is not None:
        assert outcome({name: value}) == outcome(ours)
    elif name not in aliases.NULL_SAYS:
        assert outcome({name: value}) == outcome({})


def test_no_alias_hides_a_key_of_ours():
    ours = {f.name for cls in (lk.RunConfig, lk.TrainConfig) for f in dataclasses.fields(cls)}
    assert not ours & aliases.ALIASES
    tables = [aliases.RENAMED, aliases.CONVERTED, aliases.SETTLED, aliases.IGNORED, aliases.REFUSED]
    assert sum(map(len, tables)) == len(aliases.ALIASES)


yaml_scalars = scalars | st.sampled_from([-1, 0, 3, 0.5, "auto", "steps", "no", "lora", "qlora"])
yaml_values = st.recursive(
    yaml_scalars,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["path", "type", "r", "train"]) | scalars, inner, max_size=2
        )
    ),
    max_leaves=4,
)
RUN_KEYS = [*aliases.ALIASES, "wandb_x", "lora", "data", "quantize", "model", "dtype", "train"]
RUN_KEYS += [f.name for f in dataclasses.fields(lk.TrainConfig)]


@given(
    st.sampled_from([{}, RUN]),
    st.dictionaries(st.sampled_from(sorted(RUN_KEYS)), yaml_values, max_size=6)
    | st.dictionaries(scalars, yaml_values, max_size=2),
)
def test_any_mapping_gives_a_run_or_one_clear_error(start, change):
    before = repr(change)
    try:
        run = lk.RunConfig.from_dict(start | change, "run.yaml")
    except lk.LorakitError as error:
        assert str(error)
    else:
        assert run.lora.r > 0
    assert repr(change) == before


RUN_FILE = (Path(__file__).parents[2] / "docs" / "run-file.md").read_text(encoding="utf-8")


def table(heading):
    """The rows of the first table after a line that begins so."""
    rest = re.split(rf"^{re.escape(heading)}.*$", RUN_FILE, maxsplit=1, flags=re.MULTILINE)[1]
    rows = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


@pytest.mark.parametrize(
    ("heading", "cls"),
    [
        ("## What to train", lk.RunConfig),
        ("## How to train", lk.TrainConfig),
        ("## `data`", DataConfig),
        ("## `lora`", lk.LoraConfig),
        ("## `quantize`", lk.QuantConfig),
    ],
)
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


def test_the_guide_lists_every_alias():
    assert table("Renamed:") == [[f"`{k}`", f"`{v}`"] for k, v in aliases.RENAMED.items()]
    assert [row[0] for row in table("Converted:")] == [f"`{k}`" for k in aliases.CONVERTED]
    assert table("Values with another") == [
        [f"`{key}`", f"`{json.dumps(theirs)}`", f"`{json.dumps(ours)}`"]
        for key, spellings in aliases.VALUES.items()
        for theirs, ours in spellings.items()
    ]
    assert table("Accepted with") == [
        [f"`{name}`", ", ".join(f"`{json.dumps(value)}`" for value in fine), why]
        for name, (fine, why) in aliases.SETTLED.items()
    ]
    ignored = aliases.IGNORED | {"wandb_...": aliases.WANDB}
    assert table("Ignored, with") == [[f"`{name}`", why] for name, why in ignored.items()]
    assert table("Refused:") == [[f"`{name}`", why] for name, why in aliases.REFUSED.items()]


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


def test_endless_epochs():
    with pytest.raises(lk.LorakitError, match="num_train_epochs must be float, not inf"):
        lk.TrainConfig(num_train_epochs=math.inf)


def test_a_key_that_is_given_twice(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\nmax_steps: 1\nmax_steps: 2\n")
    with pytest.raises(lk.LorakitError, match="max_steps is given twice: keep one"):
        read_run_file(tmp_path / "run.yaml", [])


@pytest.mark.parametrize("path", ["a\0b", "~nosuchuser/x"])
def test_what_is_no_path(path):
    with pytest.raises(lk.LorakitError, match="is no path"):
        lk.load_adapter(None, path)
