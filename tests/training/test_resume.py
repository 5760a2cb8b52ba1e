"""Runs that go on from a checkpoint: they end with the same bytes, or are refused."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

import lorakit as lk
from lorakit.training import run as training_run
from lorakit.training import state as run_state
from tests.conftest import ROWS
from tests.data.files import written
from tests.training.runs import ADAPTER, JUDGED, OPTIONS, PAIRS, run, same_tensors


@pytest.mark.parametrize(
    "options",
    [
        {"lora": {"lora_dropout": 0.2}},
        {"packing": True, "max_seq_length": 40, "optim": "adamw_8bit"},
        {"lora": {"init_lora_weights": "pissa"}, "loraplus_lr_ratio": 4.0},
        {"lora": {"init_lora_weights": "eva"}, "gradient_accumulation_steps": 2},
        {"lora": {"use_dora": True, "modules_to_save": ["lm_head"]}, "neftune_noise_alpha": 5.0},
        {"rows": JUDGED, "objective": "kto", "packing": True, "max_seq_length": 40},
        {"lora": {"quantize_aware": "nf4"}, "gradient_checkpointing": True},
    ],
    ids=[
        *("dropout", "packed, 8 bits", "PiSSA, LoRA+", "EVA", "DoRA, head, noise", "KTO, packed"),
        "merge-aware",
    ],
)
def test_a_resumed_run_ends_with_the_same_bytes(tiny_dir, tok, tmp_path, options):
    run(tiny_dir, tok, tmp_path / "whole", **OPTIONS, **options)
    _, first = run(tiny_dir, tok, tmp_path / "a", **OPTIONS, **options, **{"save_total_limit": 9})
    assert first.steps == 12
    for later in (9, 12):  # as if it had been killed after step 6
        shutil.rmtree(tmp_path / "a" / f"checkpoint-{later}")
    (tmp_path / "a" / ADAPTER).unlink()
    _, result = run(tiny_dir, tok, tmp_path / "a", **OPTIONS, **options, resume="auto")
    assert result.steps == 12
    assert result.tokens == first.tokens
    assert (tmp_path / "a" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    assert same_tensors(tmp_path / "a" / "checkpoint-12", tmp_path / "whole" / "checkpoint-12")
    steps = [json.loads(x)["step"] for x in (tmp_path / "a" / "metrics.jsonl").open()]
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("streamed", [False, True], ids=["files", "streams"])
def test_a_resumed_run_reads_the_same_mixture(tiny_dir, tok, tmp_path, streamed):
    """Rows of two sources, opened again for the second half; other rows of them are refused."""
    if streamed:
        pytest.importorskip("datasets")
    for name in "ab":
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"{name}{i}", "completion": str(i)} for i in range(30)]
        written(tmp_path / name / "train.jsonl", rows)

    def mixture(seed=0):
        if streamed:
            sources = [
                lk.SourceConfig(str(tmp_path / name), streaming=True, rows=rows + seed)
                for name, rows in (("a", 24), ("b", 12))
            ]
        else:
            sources = [
                lk.SourceConfig(str(tmp_path / name / "train.jsonl"), weight=weight)
                for name, weight in (("a", 2), ("b", 1))
            ]
        return lk.open_data(lk.DataConfig(sources, seed=seed))["train"]

    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 3}
    run(tiny_dir, tok, tmp_path / "whole", mixture(), **options)
    run(tiny_dir, tok, tmp_path / "part", mixture(), **options)
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    (tmp_path / "part" / ADAPTER).unlink()
    with pytest.raises(lk.LorakitError, match="data"):
        run(tiny_dir, tok, tmp_path / "part", mixture(seed=1), **options, resume="auto")
    run(tiny_dir, tok, tmp_path / "part", mixture(), **options, resume="auto")
    assert (tmp_path / "part" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


RUN = """
import sys, torch, lorakit as lk
torch.set_num_threads(1)
path, out = sys.argv[1:]
model = lk.load_model(path, dtype="float32", quantize="nf4")
torch.manual_seed(0)
lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1))
from tests.conftest import ROWS
print("ready", flush=True)
lk.train(model, lk.load_tokenizer(path), ROWS, lk.TrainConfig(
    out, max_steps=60, save_steps=1, per_device_train_batch_size=4, learning_rate=1e-2,
    resume="auto"))
print("done", flush=True)
"""


def start(tiny_dir, out):
    command = [sys.executable, "-c", RUN, str(tiny_dir), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_with_the_same_bytes(tiny_dir, tmp_path, kills):
    """SIGKILL at random moments; with a checkpoint after every step many fall into its writing."""
    whole = start(tiny_dir, tmp_path / "whole")
    began = time.perf_counter()
    out = whole.communicate()[0]
    per_step = (time.perf_counter() - began) / 60
    assert out.endswith("done\n")
    rng = random.Random(0)
    for kill in range(kills):
        process, step = start(tiny_dir, tmp_path / "killed"), 0
        while step < 45 * (kill + 1) / kills:
            said = process.stdout.readline()
            step = int(re.match(r"step (\d+)/", said).group(1)) if "step " in said[:5] else step
        time.sleep(rng.uniform(0, per_step))
        process.send_signal(signal.SIGKILL)
        out = process.communicate()[0]
        assert not out.endswith("done\n")
        for each in run_state.checkpoints(tmp_path / "killed"):  # every one is whole
            load_file(each.path / run_state.STATE_TENSORS)
            json.loads((each.path / run_state.STATE_VALUES).read_text())
    out = start(tiny_dir, tmp_path / "killed").communicate()[0]
    assert out.endswith("done\n")
    a, b = tmp_path / "whole", tmp_path / "killed"
    assert (a / ADAPTER).read_bytes() == (b / ADAPTER).read_bytes()
    assert same_tensors(a / "checkpoint-60", b / "checkpoint-60")
    assert not list(b.glob(".checkpoint*"))


def test_what_cannot_be_resumed(tiny_dir, tok, tmp_path):
    run(tiny_dir, tok, tmp_path, **OPTIONS)
    with pytest.raises(lk.LorakitError, match="holds checkpoints of an earlier run; set resume"):
        run(tiny_dir, tok, tmp_path, **OPTIONS)
    for change, message in (
        ({"rows": ROWS[1:]}, "was made with data"),
        ({"seed": 1}, "made with seed 0, this run has 1"),
        ({"lora": {"target_modules": ["q_proj"]}}, "made with adapter target_modules 'all-linear'"),
        ({"lora": {"use_rslora": True}}, "adapter use_rslora False, this run has True"),
        ({"loraplus_lr_ratio": 4.0}, "made with loraplus_lr_ratio None, this run has 4.0"),
        ({"max_steps": 5}, "is beyond the 5 steps of this run; raise max_steps"),
    ):
        with pytest.raises(lk.LorakitError, match=message):
            run(tiny_dir, tok, tmp_path, resume="auto", **(OPTIONS | change))
    with pytest.raises(lk.LorakitError, match="is no checkpoint of a run"):
        run(tiny_dir, tok, tmp_path, resume=str(tmp_path / "checkpoint-4"), **OPTIONS)
    (tmp_path / "checkpoint-12" / run_state.STATE_TENSORS).write_bytes(b"cut")
    with pytest.raises(lk.LorakitError, match="damaged or cut off"):
        run(tiny_dir, tok, tmp_path, resume="auto", **OPTIONS)
    earlier = {"resume": str(tmp_path / "checkpoint-9"), **OPTIONS}
    with pytest.raises(lk.LorakitError, match=r"holds later checkpoints \(checkpoint-12\); remove"):
        run(tiny_dir, tok, tmp_path, **earlier)
    shutil.rmtree(tmp_path / "checkpoint-12")
    state = tmp_path / "checkpoint-9" / run_state.STATE_VALUES
    values = json.loads(state.read_text())
    for damage, message in (
        ({}, "is damaged: progress is missing"),
        (values | {"progress": {"more": 1}}, "is of another version of lorakit"),
        (values | {"groups": []}, r"is damaged \(ValueError"),
        (values | {"groups": [{}] * len(values["groups"])}, r"is damaged \(KeyError: 'step'"),
    ):
        state.write_text(json.dumps(damage))
        with pytest.raises(lk.LorakitError, match=message):
            run(tiny_dir, tok, tmp_path, **earlier)
    state.write_text(json.dumps(values))
    _, result = run(tiny_dir, tok, tmp_path, **earlier)
    assert result.steps == 12


def test_the_form_of_a_loss_is_that_of_the_checkpoint(tiny_dir, tok, tmp_path):
    """The default is a form as any other, and may be said by its name."""
    options = {"objective": "dpo", "per_device_train_batch_size": 2, "save_steps": 1}
    run(tiny_dir, tok, tmp_path, PAIRS, max_steps=1, loss_type="hinge", **options)
    options |= {"resume": "auto", "max_steps": 2}
    with pytest.raises(
        lk.LorakitError, match="made with loss_type 'hinge', this run has 'sigmoid'"
    ):
        run(tiny_dir, tok, tmp_path, PAIRS, **options)
    # as of a version that knew one form only
    path = tmp_path / "checkpoint-1" / run_state.STATE_VALUES
    values = json.loads(path.read_text())
    del values["same"]["loss_type"]
    path.write_text(json.dumps(values))
    run(tiny_dir, tok, tmp_path, PAIRS, loss_type="sigmoid", **options)


def test_an_adapter_whose_layers_are_named_in_other_words_goes_on(tiny_dir, tok, tmp_path):
    """A loaded adapter may have been saved with other names of the same layers meanwhile."""
    words = (
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*(k_proj|o_proj|mlp\..*)"},
    )
    options = {"max_steps": 4, "save_steps": 2, "save_total_limit": 9}
    run(tiny_dir, tok, tmp_path, lora=words[0], **options)
    whole = (tmp_path / ADAPTER).read_bytes()
    for lora in words[1:]:
        shutil.rmtree(tmp_path / "checkpoint-4")
        run(tiny_dir, tok, tmp_path, lora=lora, resume="auto", **options)
        assert (tmp_path / ADAPTER).read_bytes() == whole
    with pytest.raises(lk.LorakitError, match="made with adapter exclude_modules"):
        run(tiny_dir, tok, tmp_path, lora={"target_modules": ["q_proj"]}, resume="auto", **options)


def test_a_finished_run_is_left_as_it_is(tiny_dir, tok, tmp_path):
    run(tiny_dir, tok, tmp_path, **OPTIONS)
    before = (tmp_path / ADAPTER).read_bytes()
    _, result = run(tiny_dir, tok, tmp_path, resume="auto", **OPTIONS)
    assert result.steps == 12
    assert (tmp_path / ADAPTER).read_bytes() == before


def test_the_optimizers_settings_are_those_of_the_run(tiny_dir, tok, tmp_path):
    """A resumed run takes the weight decay that it is told, not the one of the checkpoint."""
    adapters = []
    for name, decay in (("a", 0.0), ("b", 0.9)):
        run(tiny_dir, tok, tmp_path / name, max_steps=2, save_steps=2)
        options = {"max_steps": 4, "resume": "auto", "weight_decay": decay}
        run(tiny_dir, tok, tmp_path / name, **options)
        adapters.append((tmp_path / name / ADAPTER).read_bytes())
    assert adapters[0] != adapters[1]


@pytest.mark.parametrize("save_projection", [True, False])
def test_a_vera_run_goes_on(tiny_dir, tok, tmp_path, save_projection):
    """Its projections are the same tensor in every layer, and are written once."""

    def vera(out, **options):
        model = lk.load_model(tiny_dir, dtype="float32")
        lk.attach(model, lk.VeraConfig(r=8, save_projection=save_projection))
        config = lk.TrainConfig(str(out), max_steps=4, learning_rate=1e-2, save_steps=2, **options)
        lk.train(model, tok, ROWS, config)
        return (out / ADAPTER).read_bytes()

    whole = vera(tmp_path / "whole")
    vera(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "checkpoint-4")
    assert vera(tmp_path / "a", resume="auto") == whole


def test_an_evaluation_that_was_made_up_for_is_of_the_checkpoint(
    tiny_dir, tok, tmp_path, monkeypatch
):
    """Also where it is not the best: a run killed right after it does not evaluate again."""
    data, losses = {"train": ROWS, "validation": ROWS[:4]}, iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(training_run, "held_out_loss", lambda *_: {"loss": next(losses)})
    real, seen = training_run.backward, []

    def step(*args):
        seen.append(1)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        if len(seen) == 5:
            raise RuntimeError("killed")
        return real(*args)

    monkeypatch.setattr(training_run, "backward", step)
    options = {"max_steps": 6, "eval_steps": 2, "save_steps": 4}
    run(tiny_dir, tok, tmp_path, data, **options)  # interrupted in step 4
    with pytest.raises(RuntimeError, match="killed"):
        run(tiny_dir, tok, tmp_path, data, **options, resume="auto")
    _, result = run(tiny_dir, tok, tmp_path, data, **options, resume="auto")
    assert [(e["step"], e["loss"]) for e in result.evaluations] == [(2, 1.0), (4, 2.0), (6, 3.0)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6]


def test_other_validation_rows_are_not_compared_with(tiny_dir, tok, tmp_path):
    options = {"max_steps": 2, "save_steps": 2, "eval_steps": 2}
    run(tiny_dir, tok, tmp_path, {"train": ROWS, "validation": ROWS[:4]}, **options)
    data = {"train": ROWS, "validation": ROWS[:5]}
    with pytest.raises(lk.LorakitError, match="was made with validation data"):
        run(tiny_dir, tok, tmp_path, data, **options, resume="auto")


def test_tokens_that_changed_places_are_refused(tiny_dir, tmp_path):
    """The rows need not hold them, so that nothing else would tell."""

    def train(tokens):
        tok, model = lk.load_tokenizer(tiny_dir), lk.load_model(tiny_dir, dtype="float32")
        lk.attach(model, lk.add_tokens(model, tok, tokens, lk.LoraConfig(r=2)))
        config = lk.TrainConfig(str(tmp_path), max_steps=1, save_steps=1, resume="auto")
        return lk.train(model, tok, ROWS, config)

    train(["<a>", "<b>"])
    assert train(["<a>", "<b>"]).steps == 1
    with pytest.raises(lk.LorakitError, match="the tokens of trained rows 259 '<a>'"):
        train(["<b>", "<a>"])
    file = tmp_path / "checkpoint-1" / run_state.STATE_VALUES
    values = json.loads(file.read_text())
    del values["same"]["the tokens of trained rows"]  # as in a checkpoint of 0.1.0
    file.write_text(json.dumps(values))
    assert train(["<a>", "<b>"]).steps == 1
