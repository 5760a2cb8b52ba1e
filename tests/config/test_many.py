"""A run file of several adapters: what each is, and the sentences that refuse others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk

SHARED = {"model": "m", "data": {"train": "a.jsonl", "validation": "v.jsonl"}, "output_dir": "o"}


def many(**keys):
    return lk.ManyConfig.from_dict(SHARED | keys, "many.yaml")


def test_keys_of_an_adapter_are_laid_over_those_of_all():
    adapters = {
        "plain": None,
        "small": {"lora": {"r": 4}, "learning_rate": 1e-3},
        "tenant": {"data": "b.jsonl", "max_steps": 40, "lora_r": 16},
        "older": {"adapter": "runs/older"},
    }
    found = many(adapters=adapters, lora={"lora_alpha": 16}, micro_batch_size=2)
    assert list(found.runs) == list(adapters)
    for name, run in found.runs.items():
        said = {**SHARED, "output_dir": f"o/{name}", "per_device_train_batch_size": 2}
        said["lora"] = {"lora_alpha": 16}
        if name == "small":
            said |= {"lora": {"lora_alpha": 16, "r": 4}, "learning_rate": 1e-3}
        if name == "tenant":
            said |= {"data": "b.jsonl", "max_steps": 40, "lora": {"lora_alpha": 16, "r": 16}}
        if name == "older":
            del said["lora"]
            said["adapter"] = "runs/older"
        assert run == lk.RunConfig.from_dict(said)
    assert found.output_dir == "o"
    assert found.first == found.runs["plain"]


def test_a_sweep_is_every_combination():
    sweep = {"lora.r": [8, 64], "learning_rate": [1e-4, 1.5e-3], "lora": {"use_rslora": [True]}}
    found = many(sweep=sweep).runs
    assert list(found) == [
        f"r-{r}--learning_rate-{rate}--use_rslora-True"
        for r in (8, 64)
        for rate in ("1e-4", "15e-4")
    ]
    last = found["r-64--learning_rate-15e-4--use_rslora-True"]
    assert (last.lora.r, last.lora.use_rslora, last.train.learning_rate) == (64, True, 1.5e-3)
    both = many(sweep={"seed": [0, 1]}, adapters={"a": {"lora": {"r": 2}}, "b": {}}).runs
    assert list(both) == ["a--seed-0", "a--seed-1", "b--seed-0", "b--seed-1"]
    assert both["a--seed-1"].lora.r == 2
    layers = many(sweep={"lora.target_modules": [["q_proj", "v_proj"], "all-linear"]}).runs
    assert list(layers) == ["target_modules-q_proj-v_proj", "target_modules-all-linear"]


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=20, unique=True))
def test_other_numbers_have_other_names(rates):
    """A name holds all digits of a number, and no dot."""
    runs = many(sweep={"learning_rate": rates}).runs
    assert [run.train.learning_rate for run in runs.values()] == rates
    for name, rate in zip(runs, rates, strict=True):
        assert float(name.removeprefix("learning_rate-")) == rate


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "adapters and sweep are empty"),
        ({"adapters": {}}, "there is no adapter to train"),
        ({"adapters": ["a"]}, "adapters must be a mapping of names"),
        ({"adapters": {"a.b": {}}}, "'a.b' is no name of an adapter"),
        ({"adapters": {"checkpoint-2": {}}}, "does not begin with checkpoint-"),
        ({"adapters": {"a": {}, "A": {}}}, "'a' and 'A' would have one folder"),
        ({"adapters": {"a": {"lerning_rate": 1}}}, "many.yaml, adapter a: unknown key"),
        ({"adapters": {"a": {}}, "lerning_rate": 1}, "many.yaml: unknown key 'lerning_rate'"),
        ({"adapters": {"a": {"output_dir": "x"}}}, "each adapter has its folder"),
        ({"adapters": {"a": 3}}, "adapter a must be a mapping"),
        ({"adapters": {"a": {}, "b": {"dtype": "float32"}}}, "dtype belongs to all adapters"),
        ({"adapters": {"a": {}, "b": {"quantize": "nf4"}}}, "it is None of 'a' and 'nf4' of 'b'"),
        ({"adapters": {"a": {"add_tokens": ["<x>"]}}}, "add_tokens trains rows of the embedding"),
        ({"adapters": {"a": {}}, "offload_weights": True}, "weights that one device holds"),
        ({"adapters": {"a": {}}, "report_to": "wandb"}, "take tensorboard"),
        (
            {"adapters": {"a": {}, "b": {}}, "push_to_hub": True, "hub_model_id": "me/it"},
            "would be uploaded to one repository",
        ),
        ({"sweep": {"lora.r": 8}}, "sweep: lora.r must be a list of the values to try"),
        ({"sweep": {"lora.r": []}}, "sweep: lora.r must be a list"),
        ({"sweep": [8]}, "sweep must be a mapping of keys to lists"),
        ({"sweep": {"lora.r": [8, 8]}}, "two adapters are called 'r-8'"),
        ({"sweep": {"seed": list(range(257))}}, "257 adapters are too many"),
    ],
)
def test_one_sentence_each(keys, message):
    with pytest.raises(lk.LorakitError, match="^many.yaml[^\n]*$") as error:
        many(**keys)
    assert message in str(error.value)


def test_what_is_left_out_is_said_once(caplog):
    many(adapters={"a": {"xformers": None}, "b": {}}, flash=None)
    assert [record.getMessage() for record in caplog.records] == [
        "lorakit: many.yaml: 'flash' is unknown, has no value and is ignored",
        "lorakit: many.yaml, adapter a: 'xformers' is unknown, has no value and is ignored",
    ]


def test_a_run_of_one_says_who_takes_several():
    with pytest.raises(lk.LorakitError, match="only `lorakit train` takes a file of several"):
        lk.RunConfig.from_dict(SHARED | {"adapters": {"a": {}}})


def test_a_list_in_the_place_of_a_value_is_told_of_sweeps():
    with pytest.raises(lk.LorakitError, match="lora: r must be int, not .*`sweep` tries"):
        lk.RunConfig.from_dict(SHARED | {"lora": {"r": [8, 16]}})
    with pytest.raises(lk.LorakitError, match="learning_rate must be float or null, not [^;]*$"):
        lk.RunConfig.from_dict(SHARED | {"learning_rate": ["fast"]})
