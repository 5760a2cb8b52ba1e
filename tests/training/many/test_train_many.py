"""Several adapters in one pass a step end as each of them alone does."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from tests.conftest import ROWS
from tests.training.runs import ADAPTER

OTHERS = [{"prompt": f"{a} times 2 is ", "completion": f"{2 * a}."} for a in range(14)]
LORA = {
    "small": lk.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "large": lk.LoraConfig(r=8, lora_alpha=16),
    "other": lk.LoraConfig(r=4, use_rslora=True),
}
DATA = {"small": ROWS, "large": {"train": ROWS, "validation": OTHERS[:5]}, "other": OTHERS}
CONFIGS = {
    "small": lk.TrainConfig(
        max_steps=4, learning_rate=1e-3, per_device_train_batch_size=3, save_steps=2
    ),
    "large": lk.TrainConfig(
        max_steps=7,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_steps=3,
        load_best_model_at_end=True,
        save_steps=2,
        seed=1,
    ),
    "other": lk.TrainConfig(
        num_train_epochs=2, packing=True, max_seq_length=32, optim="adamw_8bit", save_steps=2
    ),
}


def attached(tiny_dir, names):
    model = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    for name in names:
        torch.manual_seed(CONFIGS[name].seed)
        lk.attach(model, LORA[name], name=name)
    return model


def train(tiny_dir, tok, out, configs=CONFIGS, data=DATA):
    model = attached(tiny_dir, configs)
    data = {name: data[name] for name in configs}
    return lk.train_many(model, tok, data, configs, output_dir=str(out))


@pytest.fixture(scope="module")
def tok(tiny_dir):
    return lk.load_tokenizer(tiny_dir)


@pytest.fixture(scope="module")
def whole(tiny_dir, tok, tmp_path_factory):
    out = tmp_path_factory.mktemp("many")
    return out, train(tiny_dir, tok, out)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_ends_as_it_does_alone(tiny_dir, tok, whole, tmp_path, name):
    """The sums over tokens come in another order; in a model of two layers 1e-5 of the length of
    each tensor bounds what that does to the weights in these steps.
    """
    out, results = whole
    config = replace(CONFIGS[name], output_dir=str(tmp_path))
    alone = lk.train(attached(tiny_dir, [name]), tok, DATA[name], config)
    ours, expected = load_file(out / name / ADAPTER), load_file(tmp_path / ADAPTER)
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (ours[key] - tensor).norm() <= 1e-5 * tensor.norm(), key
    assert (results[name].steps, results[name].tokens) == (alone.steps, alone.tokens)
    assert results[name].loss == pytest.approx(alone.loss, rel=1e-5)
    assert results[name].output_dir == out / name
    same = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss")
    for line, other in zip(lines(out / name), lines(tmp_path), strict=True):
        assert line.keys() == other.keys() - {"mean_token_accuracy", "entropy"}
        for key in same:
            if key in other:
                assert line[key] == pytest.approx(other[key], rel=1e-4), key
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert json.loads((out / name / "adapter_config.json").read_text()) == config
    told = [
        json.loads((path / "run.json").read_text())["settings"] | {"output_dir": ""}
        for path in (out / name, tmp_path)
    ]
    assert told[0] == told[1]


def files(folder):
    """The bytes of what a run has made, and its metrics without times and memory."""
    found = {path.name: path.read_bytes() for path in folder.glob("adapter_*")}
    kept = [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "peak_memory_mb")}
        for line in lines(folder)
    ]
    return found, kept


class Killed(Exception):
    """Ends a run at once, as a signal that cannot be caught."""


@pytest.mark.parametrize("at", [2, 4])
def test_killed_in_a_checkpoint_it_goes_on_to_the_same_bytes(
    tiny_dir, tok, whole, tmp_path, monkeypatch, at
):
    """The process dies while the checkpoint of all is written: after some of its parts, or after
    all of them and before many.json says so.
    """
    from lorakit.training import state
    from lorakit.training.many import joint

    writes = 0
    whole_write, commit = state.write_checkpoint, joint.Joint.commit

    def counted(*args):
        nonlocal writes
        writes += 1
        if writes == at:
            raise Killed
        return whole_write(*args)

    def committed(self, steps):
        if writes + 1 == at:
            raise Killed
        commit(self, steps)

    with monkeypatch.context() as patch:
        patch.setattr(state, "write_checkpoint", counted)
        patch.setattr(joint.Joint, "commit", committed)
        with pytest.raises(Killed):
            train(tiny_dir, tok, tmp_path)
    resumed = {name: replace(config, resume="auto") for name, config in CONFIGS.items()}
    results = train(tiny_dir, tok, tmp_path, resumed)
    out, expected = whole
    for name in CONFIGS:
        assert files(tmp_path / name) == files(out / name)
        assert results[name].steps == expected[name].steps
    record = json.loads((tmp_path / "small" / "run.json").read_text())
    assert (record["state"], record["total_steps"]) == ("finished", 4)
    if at == 4:  # all is done: the same files once more
        again = train(tiny_dir, tok, tmp_path, resumed)
        assert [files(tmp_path / name) for name in CONFIGS] == [files(out / n) for n in CONFIGS]
        assert again["large"].evaluations == expected["large"].evaluations


def test_ctrl_c_ends_after_the_step_with_checkpoints_of_all(
    tiny_dir, tok, whole, tmp_path, monkeypatch
):
    """No checkpoint was asked for, and one adapter has ended before the signal."""
    import signal

    from lorakit.training.many import member

    configs = {name: replace(CONFIGS[name], save_steps=None) for name in ("large", "other")}
    take, taken = member.Member.take, []

    def interrupted(self):
        take(self)
        taken.append(self.name)
        if len(taken) == 6:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(member.Member, "take", interrupted)
        results = train(tiny_dir, tok, tmp_path, configs)
    assert taken == ["large", "other"] * 2 + ["large"] * 2
    assert {name: each.interrupted for name, each in results.items()} == {
        "large": True,
        "other": False,
    }
    assert json.loads((tmp_path / "large" / "run.json").read_text())["state"] == "stopped"
    assert json.loads((tmp_path / "many.json").read_text())["adapters"] == {"large": 4, "other": 2}
    configs = {name: replace(config, resume="auto") for name, config in configs.items()}
    train(tiny_dir, tok, tmp_path, configs)
    assert files(tmp_path / "other") == files(whole[0] / "other")
    both = train(tiny_dir, tok, tmp_path / "both", configs)
    assert files(tmp_path / "large") == files(tmp_path / "both" / "large")
    assert both["large"].steps == 7


def test_early_stopping_ends_one_and_frees_its_rows(tiny_dir, tok, tmp_path, capsys):
    """A rate that is far too low changes no loss, so no evaluation is better than the first."""
    common = {"per_device_train_batch_size": 2, "max_steps": 6, "eval_steps": 1}
    configs = {
        "small": lk.TrainConfig(**common, learning_rate=1e-4),
        "large": lk.TrainConfig(**common, learning_rate=1e-12, early_stopping_patience=2),
    }
    rows = {"train": ROWS, "validation": ROWS[:4]}
    results = train(tiny_dir, tok, tmp_path, configs, dict.fromkeys(configs, rows))
    assert results["large"].stopped_early
    assert (results["large"].steps, results["small"].steps) == (3, 6)
    said = capsys.readouterr().out
    assert "large: done after 3 steps, stopped early" in said
    assert "step 3/6: 2 adapters" in said
    assert "step 4/6: 1 adapter," in said
    assert len(lines(tmp_path / "small")) == 12


def test_an_adapter_that_diverges_ends_alone(tiny_dir, tok, tmp_path, capsys):
    configs = {
        "small": lk.TrainConfig(max_steps=12, per_device_train_batch_size=2),
        "large": lk.TrainConfig(max_steps=12, per_device_train_batch_size=2),
    }
    model = attached(tiny_dir, configs)
    for key, p in model.named_parameters():
        if "large" in key:
            p.data.fill_(float("nan"))
    results = lk.train_many(
        model, tok, dict.fromkeys(configs, ROWS), configs, output_dir=str(tmp_path)
    )
    assert "10 steps in a row were not finite" in results["large"].error
    assert (results["small"].steps, results["small"].error) == (12, None)
    assert "lorakit: large: train: 10 steps in a row" in capsys.readouterr().out
    record = json.loads((tmp_path / "large" / "run.json").read_text())
    assert record["state"] == "failed"
    alone = tmp_path / "alone"
    train(tiny_dir, tok, alone, {"small": configs["small"]}, {"small": ROWS})
    ours, expected = (load_file(path / "small" / ADAPTER) for path in (tmp_path, alone))
    assert all((ours[k] - t).norm() <= 1e-5 * t.norm() for k, t in expected.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"small": {"objective": "dpo"}}, "adapter 'small': several adapters in one pass: the"),
        ({"small": {"per_device_train_batch_size": "auto"}}, "as auto: give numbers"),
        ({"large": {"save_steps": 3}}, "save_steps belongs to all adapters: it is 2 of 'small'"),
        ({"large": {"resume": "x"}, "small": {"resume": "x"}}, "take auto"),
        ({"small": {"early_stopping_patience": 1}}, "adapter 'small': train: early_stopping"),
        ({"small": {"train": "full"}}, "do not go with train: full"),
    ],
)
def test_what_cannot_be_trained_together(tiny_dir, tok, tmp_path, change, message):
    """Each is said before anything is written."""
    configs = {name: replace(CONFIGS[name], **change.get(name, {})) for name in ("small", "large")}
    with pytest.raises(lk.LorakitError, match="^[^\n]*$") as error:
        train(tiny_dir, tok, tmp_path / "out", configs)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_checkpoints_are_not_taken_for_those_of_all(tiny_dir, tok, tmp_path):
    model = attached(tiny_dir, ["small"])
    alone = replace(CONFIGS["small"], output_dir=str(tmp_path / "small"))
    lk.train(model, tok, ROWS, alone)
    for resume in ("auto", None):
        configs = {"small": replace(CONFIGS["small"], resume=resume)}
        with pytest.raises(lk.LorakitError, match="holds checkpoints of an earlier run"):
            train(tiny_dir, tok, tmp_path, configs)
    out = tmp_path / "new"
    resumed = {name: replace(c, resume="auto") for name, c in CONFIGS.items()}
    train(tiny_dir, tok, out, {"small": resumed["small"]})
    with pytest.raises(lk.LorakitError, match="adapter 'other' is new"):
        train(tiny_dir, tok, out, {"small": resumed["small"], "other": resumed["other"]})
    lk.train(
        model, tok, ROWS, replace(alone, output_dir=str(out / "small"), max_steps=6, resume="auto")
    )
    with pytest.raises(lk.LorakitError, match="is later than the checkpoint of all"):
        train(tiny_dir, tok, out, {"small": resumed["small"]})


def test_rows_that_teach_nothing_or_are_of_another_tokenizer(tiny_dir, tok, tmp_path):
    configs = {name: CONFIGS[name] for name in ("small", "other")}
    with pytest.raises(lk.LorakitError, match="adapter 'other': data holds no rows"):
        train(tiny_dir, tok, tmp_path / "out", configs, {"small": ROWS, "other": []})
    changed = lk.load_tokenizer(tiny_dir)
    changed.add_special_tokens(["<new>"])
    rows = {name: lk.encode_rows(ROWS, tok, max_seq_length=1024) for name in configs}
    rows["other"] = lk.encode_rows(ROWS, changed, max_seq_length=32)
    with pytest.raises(lk.LorakitError, match="adapter 'other': its rows were encoded with anoth"):
        train(tiny_dir, tok, tmp_path / "out", configs, rows)
    assert not (tmp_path / "out").exists()
    same = lk.encode_rows(ROWS, lk.load_tokenizer(tiny_dir), max_seq_length=1024)
    one = {"small": replace(CONFIGS["small"], max_steps=1)}
    assert train(tiny_dir, tok, tmp_path / "out", one, {"small": same})["small"].steps == 1
