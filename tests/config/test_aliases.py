"""The names of TRL, transformers and Axolotl in run files, and what cannot be honoured."""

import dataclasses
import json
import re
from operator import attrgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.config import aliases
from lorakit.config.conversions import CONVERTED
from lorakit.config.data import DataConfig, SourceConfig
from tests.config.run_files import RUN, scalars, table

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
    run = lk.RunConfig.from_dict(AXOLOTL, "axolotl.yaml")
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
        (
            {"chat_template": "chatml", "chat_template_jinja": "t.jinja"},
            "chat_template_jinja: it counts only with chat_template: jinja",
        ),
        ({"chat_template": "a", "chat_template_path": "b"}, "chat_template set the same thing"),
        ({"chat_template": 3}, "chat_template must be str or null, not 3"),
        ({"fp16": True}, "fp16 is True: gradients of a float16 model underflow"),
        (
            {"adapter": None},
            "adapter: null asks Axolotl to train all weights: say train: full",
        ),
        ({"packing_strategy": "wrapped"}, "packing_strategy: choose bfd or bfd_split, not 'wrap"),
        ({"adapter": 3}, "adapter: choose lora or qlora, .* not 3"),
        ({"special_tokens": "<pad>"}, "special_tokens: give a mapping of names to tokens"),
        ({"special_tokens": {"eos_token": "<e>"}}, "special_tokens: eos_token is the tokenizer's"),
        ({"lora_model_dir": 3}, "adapter must be str or null, not 3"),
        ({"lora_model_dir": "a", "adapter": "b"}, "adapter and lora_model_dir set the same thing"),
        (
            {"adapter": "qlora", "lora_model_dir": "old", "lora_r": 8, "lora": {"lora_alpha": 16}},
            "lora_model_dir: the adapter in old has settings of its own: take out lora.lora_alpha, "
            "lora_r, or",
        ),
        (
            {"adapter": "old", "lora": {"r": 16}},
            "adapter: the adapter in old has .*: take out lora.r,",
        ),
        ({"adapter": "qlora", "load_in_4bit": False}, "adapter: qlora needs load_in_4bit: true"),
        ({"bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type: it says how load_in_4bit packs"),
        ({"val_set_size": 0.05}, "val_set_size is 0.05: lorakit splits no rows off"),
        ({"test_datasets": []}, "test_datasets: a list of entries with a path is wanted"),
        ({"test_datasets": [{"path": "a", "shards": 2}]}, "'shards' of an entry cannot be"),
        ({"test_datasets": [{"type": "alpaca"}]}, "test_datasets: the entry has no path"),
        ({"save_strategy": "epoch"}, "save_strategy: give save_steps instead of 'epoch'"),
        ({"save_strategy": "steps"}, "it is 'steps', and save_steps is missing"),
        ({"save_strategy": False, "save_steps": 3}, "it is 'no', and save_steps is given too"),
        ({"eval_strategy": "no", "eval_steps": 3}, "it is 'no', and eval_steps is given too"),
        (
            {"report_to": "clearml"},
            "report_to is 'clearml'; choose tensorboard, trackio, wandb, mlf",
        ),
        ({"optimizer": "lion"}, "optim is 'lion'; choose adamw_torch, adamw_8bit"),
        ({"lr_scheduler": "polynomial"}, "lr_scheduler_type is 'polynomial'"),
        ({"deepspeed": "zero3.json"}, "deepspeed: lorakit trains on one device"),
        ({"max_length": None}, "max_length: null cuts off no row: give the length"),
        ({"lora_r": "8"}, "lora: r must be int, not '8'"),
        ({"micro_batchsize": 8}, "unknown key 'micro_batchsize' .did you mean 'micro_batch_size'"),
        ({"lora.r": 8}, "unknown key 'lora.r'"),
        ({"local_rank": 0, "debug": 1}, "unknown keys 'local_rank'.*, 'debug'"),
        ({"assistant_only_loss": False}, "say which, with train_on: all or train_on: completion"),
        ({"lora_target_linear": False}, "name the layers to adapt, as lora_target_modules"),
        ({"lora_target_linear": False, "lora": {"r": 4}}, "name the layers to adapt"),
        ({"train_on_inputs": False, "train_on": "all"}, "it is false, and train_on is all"),
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
    if parent == "grpo":  # other runs refuse these keys by their names
        values["objective"] = "grpo"

    def outcome(change):
        try:
            return lk.RunConfig.from_dict(values | change)
        except lk.LorakitError as error:
            return str(error)

    if value is not None:
        assert outcome({name: value}) == outcome(ours)
    elif name not in aliases.NULL_SAYS:
        assert outcome({name: value}) == outcome({})


@pytest.mark.parametrize(
    ("values", "adapter", "quantize"),
    [
        ({"adapter": "runs/first"}, "runs/first", None),
        ({"adapter": "./lora"}, "./lora", None),
        ({"adapter": "lora"}, None, None),
        ({"adapter": "qlora"}, None, lk.QuantConfig()),
        ({"adapter": "runs/first", "quantize": "nf4"}, "runs/first", lk.QuantConfig()),
        ({"adapter": "lora", "lora_model_dir": "runs/first"}, "runs/first", None),
        ({"adapter": "qlora", "lora_model_dir": "runs/first"}, "runs/first", lk.QuantConfig()),
        ({"adapter": "runs/first", "lora_model_dir": None, "lora": {}}, "runs/first", None),
        ({"adapter": "runs/first", "lora_r": None}, "runs/first", None),
    ],
)
def test_the_adapter_to_go_on_from(values, adapter, quantize):
    run = lk.RunConfig.from_dict(RUN | values)
    assert (run.adapter, run.quantize, run.lora) == (adapter, quantize, lk.LoraConfig())


@pytest.mark.parametrize(
    ("values", "template"),
    [
        ({}, None),
        ({"chat_template": "chatml"}, "chatml"),
        ({"chat_template": "tokenizer_default"}, None),
        ({"chat_template": "jinja", "chat_template_jinja": "{{ messages }}"}, "{{ messages }}"),
        ({"chat_template_jinja": "t.jinja"}, "t.jinja"),
        ({"chat_template": "llama3", "chat_template_jinja": None}, "llama3"),
        ({"chat_template_path": "t.jinja"}, "t.jinja"),
    ],
)
def test_the_chat_template(values, template):
    assert lk.RunConfig.from_dict(RUN | values).chat_template == template


def test_special_tokens_that_nothing_learns(caplog):
    """Axolotl's files name a token for padding; a file of nulls says nothing."""
    values = {"special_tokens": {"pad_token": "<|end_of_text|>", "eos_token": None}}
    assert lk.RunConfig.from_dict(RUN | values) == lk.RunConfig.from_dict(RUN)
    assert "special_tokens is ignored: no row learns padding" in caplog.text
    caplog.clear()
    lk.RunConfig.from_dict(RUN | {"special_tokens": {"pad_token": None}})
    assert caplog.text == ""


def test_axolotls_full_training(caplog):
    """Null is full training beside base_model alone, which no file of lorakit's has."""
    run = lk.RunConfig.from_dict({"base_model": "m", "data": "d", "adapter": None, "lora_r": None})
    assert run == lk.RunConfig.from_dict({"model": "m", "data": "d", "train": "full"})
    assert "adapter: null is taken as train: full" in caplog.text
    parts = ["^lm_head.weight$", "model.layers.1[0-9]"]
    names = ["lm_head.weight", "model.layers.12.mlp.up_proj.weight", "model.layers.2.mlp", "model"]
    run = lk.RunConfig.from_dict(RUN | {"train": "full", "unfrozen_parameters": parts})
    [pattern] = run.train.freeze
    assert [re.search(pattern, name) is None for name in names] == [True, True, False, False]
    with pytest.raises(lk.LorakitError, match=r"rows of a weight, as in \[0:100\], cannot"):
        lk.RunConfig.from_dict(RUN | {"unfrozen_parameters": ["^lm_head.weight$[0:100]"]})


def test_no_alias_hides_a_key_of_ours():
    ours = {f.name for cls in (lk.RunConfig, lk.TrainConfig) for f in dataclasses.fields(cls)}
    assert ours & aliases.ALIASES == {"adapter"}  # Axolotl's two values are no directories
    tables = [aliases.RENAMED, CONVERTED, aliases.SETTLED, aliases.IGNORED, aliases.REFUSED]
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
RUN_KEYS = [
    *aliases.ALIASES,
    "chat_template",
    "wandb_x",
    "lora",
    "data",
    "quantize",
    "model",
    "dtype",
    "train",
]
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


def test_the_guide_lists_every_alias():
    assert table("Renamed:") == [[f"`{k}`", f"`{v}`"] for k, v in aliases.RENAMED.items()]
    assert [row[0] for row in table("Converted:")] == [f"`{k}`" for k in CONVERTED]
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


# What each switch means, true and false, as the page of the run file says.
SWITCHES = {
    "bf16": (("dtype", "bfloat16"), ("dtype", "float32")),
    "load_in_4bit": (("quantize.quant_type", "nf4"), ("quantize", None)),
    "load_in_8bit": (("quantize.quant_type", "int8"), ("quantize", None)),
    "lora_target_linear": (("lora.target_modules", "all-linear"), None),
    "train_on_inputs": (("train.train_on", "all"), ("train.train_on", "completion")),
    "completion_only_loss": (("train.train_on", "completion"), ("train.train_on", "all")),
    "assistant_only_loss": (("train.train_on", "completion"), None),
    "use_peft": (("train.train", "adapter"), ("train.train", "full")),
    "resume_from_checkpoint": (("train.resume", "auto"), ("train.resume", None)),
    "auto_resume_from_checkpoints": (("train.resume", "auto"), ("train.resume", None)),
}
NO_SWITCHES = {  # these take other values than true and false, or say nothing but their own
    "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_use_double_quant", "adapter",
    "lora_model_dir", "datasets", "test_datasets", "save_strategy", "eval_strategy",
    "chat_template_jinja", "evaluation_strategy", "special_tokens", "unfrozen_parameters",
    "packing_strategy", "dataset_text_field",
}  # fmt: skip


def test_every_conversion_is_a_switch_or_known_to_be_none():
    assert set(CONVERTED) == set(SWITCHES) | NO_SWITCHES


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [True, False])
def test_a_switch_means_what_it_says(name, value):
    """None in the table: no is refused, because the file does not say what else."""
    meant = SWITCHES[name][0 if value else 1]
    if meant is None:
        with pytest.raises(lk.LorakitError, match=name):
            lk.RunConfig.from_dict(RUN | {name: value})
        return
    path, expected = meant
    assert attrgetter(path)(lk.RunConfig.from_dict(RUN | {name: value})) == expected


@pytest.mark.parametrize("name", sorted(aliases.ALIASES - set(aliases.NULL_SAYS)))
def test_null_is_not_set(name):
    assert lk.RunConfig.from_dict(RUN | {name: None}) == lk.RunConfig.from_dict(RUN)


def test_no_beside_what_the_file_says_instead():
    run = lk.RunConfig.from_dict(RUN | {"assistant_only_loss": False, "train_on": "last_turn"})
    assert run.train.train_on == "last_turn"
    targets = {"lora_target_linear": False, "lora_target_modules": ["q_proj"]}
    assert lk.RunConfig.from_dict(RUN | targets).lora.target_modules == ["q_proj"]
    targets = {"lora_target_linear": False, "lora": {"target_modules": ["v_proj"]}}
    assert lk.RunConfig.from_dict(RUN | targets).lora.target_modules == ["v_proj"]


# Keys without a value in six examples of Axolotl's repository, of 2023 to 2026.
WITHOUT_A_VALUE = [
    "dataset_prepared_path", "debug", "deepspeed", "early_stopping_patience", "evals_per_epoch",
    "flash_attention", "fsdp", "fsdp_config", "gptq_groupsize", "gptq_model_v1", "local_rank",
    "lora_alpha", "lora_dropout", "lora_fan_in_fan_out", "lora_model_dir", "lora_r",
    "lora_target_modules", "max_packed_sequence_len", "push_dataset_to_hub",
    "resume_from_checkpoint", "special_tokens", "torchdistx_path", "trust_remote_code",
    "wandb_entity", "wandb_log_model", "wandb_name", "wandb_project", "wandb_run_id",
    "wandb_watch", "xformers_attention",
]  # fmt: skip


def test_keys_without_a_value_in_axolotls_examples_change_nothing():
    nulls = dict.fromkeys(WITHOUT_A_VALUE)
    assert lk.RunConfig.from_dict(RUN | nulls) == lk.RunConfig.from_dict(RUN)
    assert lk.RunConfig.from_dict(nulls | AXOLOTL) == lk.RunConfig.from_dict(AXOLOTL)


def test_unknown_keys_without_a_value_are_ignored_with_a_line(caplog):
    run = lk.RunConfig.from_dict(RUN | {"local_rank": None, "debug": None})
    assert run == lk.RunConfig.from_dict(RUN)
    assert "'local_rank' is unknown, has no value and is ignored" in caplog.text
    assert "'debug' is unknown" in caplog.text


def test_sources_of_trl_and_axolotl():
    run = lk.RunConfig.from_dict(
        {
            "model": "m",
            "datasets": [
                {"path": "a.jsonl", "type": "alpaca", "field_instruction": "question"},
                {"path": "org/x", "name": "en", "split": "train", "revision": "v1"},
            ],
            "dataset_text_field": "content",
        }
    )
    assert run.data == DataConfig(
        [
            SourceConfig("a.jsonl", columns={"instruction": "question"}),
            SourceConfig("org/x", name="en", split="train", revision="v1"),
        ],
        columns={"text": "content"},
    )
    plain = lk.RunConfig.from_dict({"model": "m", "data": "a", "dataset_text_field": "text"})
    assert plain.data == DataConfig("a")
