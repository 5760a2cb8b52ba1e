"""Runs that are killed, interrupted, out of disk or full of NaN: what is left, how they go on."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.training import run as training_run
from lorakit.training import state as run_state
from tests.conftest import ROWS
from tests.training.test_train import adapted, run

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def tok(tiny_dir):
    return lk.load_tokenizer(tiny_dir)


OPTIONS = {"max_steps": 12, "save_steps": 3, "per_device_train_batch_size": 4}


def same_tensors(a, b):
    a, b = load_file(a / run_state.STATE_TENSORS), load_file(b / run_state.STATE_TENSORS)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "options",
    [
        {"lora": {"lora_dropout": 0.2}},
        {"packing": True, "max_seq_length": 40, "optim": "adamw_8bit"},
        {"lora": {"init_lora_weights": "pissa"}, "loraplus_lr_ratio": 4.0},
        {"lora": {"init_lora_weights": "eva"}, "gradient_accumulation_steps": 2},
        {"lora": {"use_dora": True, "modules_to_save": ["lm_head"]}, "neftune_noise_alpha": 5.0},
    ],
    ids=["dropout", "packed, 8 bits", "PiSSA, LoRA+", "EVA", "DoRA, head, noise"],
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_leaves(tiny_dir, tok, tmp_path, number):
    before = signal.getsignal(number)
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    _, result = run(tiny_dir, tok, tmp_path, max_steps=100_000)
    assert result.interrupted
    assert signal.getsignal(number) is before
    [saved] = run_state.checkpoints(tmp_path)
    assert saved.step == result.steps
    more = result.steps + 2
    _, again = run(tiny_dir, tok, tmp_path, max_steps=more, resume="auto")
    assert (again.steps, again.interrupted) == (more, False)


@contextlib.contextmanager
def small_files(size):
    """Ends what writes a file of more than so many bytes as a full disk does: with an error of the
    operating system, which safetensors reports in its own way. The limit holds for the report of
    the tests too where that goes to a file, so it must be gone before a test ends.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_earlier_checkpoint(tiny_dir, tok, tmp_path, monkeypatch, capsys):
    """Step 4's cannot be written, the others can; the run goes on and ends well."""
    real = run_state.write_checkpoint

    def sometimes(output_dir, step, *rest):
        with small_files(3000) if step == 4 else contextlib.nullcontext():
            return real(output_dir, step, *rest)

    monkeypatch.setattr(run_state, "write_checkpoint", sometimes)
    _, result = run(tiny_dir, tok, tmp_path, max_steps=5, save_steps=2)
    assert result.steps == 5
    out = capsys.readouterr().out
    assert "checkpoint of step 4 could not be written (" in out
    assert "File too large" in out
    assert [each.step for each in run_state.checkpoints(tmp_path)] == [2, 5]
    assert not list(tmp_path.glob(".checkpoint*"))
    assert (tmp_path / ADAPTER).exists()


def test_a_full_disk_at_the_end_is_one_line(tiny_dir, tmp_path):
    model = adapted(tiny_dir)
    with small_files(3000), pytest.raises(OSError, match="File too large"):
        lk.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / ADAPTER).exists()


def test_the_last_and_the_best_are_kept(tiny_dir, tok, tmp_path):
    # what the rows for validation share with the others is learned first, the contrary later
    contrary = [{**row, "completion": row["completion"][::-1]} for row in ROWS[:4]]
    data = {"train": ROWS, "validation": contrary}
    model, result = run(
        tiny_dir, tok, tmp_path, data, max_steps=100, eval_steps=2, save_steps=2,
        learning_rate=3e-2, load_best_model_at_end=True, early_stopping_patience=3,
    )  # fmt: skip
    losses = {e["step"]: e["loss"] for e in result.evaluations}
    best = min(losses, key=losses.get)
    assert result.stopped_early
    assert result.steps == best + 6
    assert {each.step for each in run_state.checkpoints(tmp_path)} == {
        best, result.steps - 2, result.steps,
    }  # fmt: skip
    # the adapter in memory and on the disk is the best one
    fresh = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32", quantize="nf4"), tmp_path)
    for each in (model, fresh):
        assert lk.evaluate(each, tok, contrary)["loss"] == losses[best]


def test_bad_steps_are_skipped_and_counted(tiny_dir, tok, tmp_path, monkeypatch, capsys):
    real, seen = training_run.backward, []

    def sometimes(model, *rest):
        loss = real(model, *rest)
        seen.append(loss)
        if len(seen) in (3, 4):
            next(p for p in model.parameters() if p.grad is not None).grad[0] = float("nan")
        return loss

    monkeypatch.setattr(training_run, "backward", sometimes)
    _, result = run(tiny_dir, tok, tmp_path, max_steps=6)
    assert result.skipped_steps == 2
    out = capsys.readouterr().out
    assert out.count("skipped: step") == 2
    first = "model.layers.0.self_attn.q_proj.adapters.default.lora_A"
    assert re.search(rf"first in {first}, on row \d+(, row \d+)+\n", out)
    weights = load_file(tmp_path / ADAPTER)
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_ten_bad_steps_in_a_row_stop_the_run(tiny_dir, tok, tmp_path):
    model = adapted(tiny_dir)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    config = lk.TrainConfig(output_dir=str(tmp_path), max_steps=50)
    message = r"10 steps in a row were not finite: step 10 has loss nan .* on row \d+, row [\w, ]+;"
    with pytest.raises(lk.LorakitError, match=message):
        lk.train(model, tok, ROWS, config)
    assert not (tmp_path / ADAPTER).exists()


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


def test_a_finished_run_is_left_as_it_is(tiny_dir, tok, tmp_path):
    run(tiny_dir, tok, tmp_path, **OPTIONS)
    before = (tmp_path / ADAPTER).read_bytes()
    _, result = run(tiny_dir, tok, tmp_path, resume="auto", **OPTIONS)
    assert result.steps == 12
    assert (tmp_path / ADAPTER).read_bytes() == before


def step_of(tiny_dir, tok, tmp_path, rows, **options):
    """Weights after one step over all rows, from the same start."""
    lora = {"lora_alpha": 8}
    model, result = run(tiny_dir, tok, tmp_path / str(options), rows, lora, max_steps=1, **options)
    del model
    return load_file(tmp_path / str(options) / ADAPTER), result.loss


def test_a_step_is_the_same_however_it_is_cut(tiny_dir, tok, tmp_path, monkeypatch):
    """Micro-batches of 1, 2, 4 and 8 rows, padded or packed, ragged rows: the same gradient, to
    fp32's rounding of sums in another order.
    """
    rows = [{"prompt": "p" * (3 * i + 1), "completion": "c" * (40 - 4 * i)} for i in range(8)]
    found = {}
    real = training_run.backward

    def note(model, *rest):
        loss = real(model, *rest)
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found[key] = (loss, torch.cat(grads).double())
        return loss

    monkeypatch.setattr(training_run, "backward", note)
    for packing in (False, True):
        for size in (1, 2, 4, 8):
            key = (packing, size)
            limit = 48 if packing else 1024
            run(
                tiny_dir, tok, tmp_path / f"{packing}{size}", rows, max_steps=1, packing=packing,
                per_device_train_batch_size=size, max_seq_length=limit,
                gradient_accumulation_steps=8 // size + 8 * packing,
            )  # fmt: skip
    loss, grad = found[False, 1]
    for other_loss, other in found.values():
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert (other - grad).norm() <= 1e-6 * grad.norm()


EVALUATED = {"max_steps": 8, "eval_steps": 2, "save_steps": 3, "learning_rate": 3e-2}


@pytest.mark.parametrize("moment", ["step 4", "step 8", "evaluation 4", "evaluation 8"])
def test_an_interrupted_evaluation_is_made_up_for(tiny_dir, tok, tmp_path, monkeypatch, moment):
    """Ctrl-C in a step that is to be evaluated, or while it is: the adapter of that step is there,
    and the run that goes on evaluates the same steps and ends with the same bytes.
    """
    data = {"train": ROWS, "validation": ROWS[:4]}
    _, whole = run(tiny_dir, tok, tmp_path / "whole", data, **EVALUATED)
    kind, at = moment.split()
    name = {"step": "backward", "evaluation": "held_out_loss"}[kind]
    real, seen = getattr(training_run, name), []

    def once(*args):
        found = real(*args)
        seen.append(found)
        if len(seen) == int(at) // (1 if kind == "step" else 2):
            os.kill(os.getpid(), signal.SIGINT)
        return found

    monkeypatch.setattr(training_run, name, once)
    _, first = run(tiny_dir, tok, tmp_path / "a", data, **EVALUATED)
    monkeypatch.setattr(training_run, name, real)
    assert first.steps == int(at)
    assert first.interrupted == (moment != "evaluation 8")  # which was the last thing to do
    assert (tmp_path / "a" / ADAPTER).exists()
    _, again = run(tiny_dir, tok, tmp_path / "a", data, **EVALUATED, resume="auto")
    assert again.evaluations == whole.evaluations
    assert (tmp_path / "a" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_a_run_that_stopped_early_stays_stopped(tiny_dir, tok, tmp_path, monkeypatch):
    data, losses = {"train": ROWS, "validation": ROWS[:4]}, iter([1.0, 2.0, 3.0, 0.5])
    monkeypatch.setattr(training_run, "held_out_loss", lambda *_: {"loss": next(losses)})
    options = {"max_steps": 8, "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 2}
    _, first = run(tiny_dir, tok, tmp_path, data, **options)
    before = (tmp_path / ADAPTER).read_bytes()
    _, again = run(tiny_dir, tok, tmp_path, data, **options, resume="auto")
    for result in (first, again):
        assert (result.steps, result.stopped_early, result.interrupted) == (3, True, False)
    assert (tmp_path / ADAPTER).read_bytes() == before


def test_a_best_checkpoint_that_is_gone(tiny_dir, tok, tmp_path, monkeypatch, capsys):
    data, losses = {"train": ROWS, "validation": ROWS[:4]}, iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(training_run, "held_out_loss", lambda *_: {"loss": next(losses)})
    real = run_state.write_checkpoint

    def full(output_dir, step, *rest):
        if step == 1:
            raise OSError(28, "No space left on device")
        return real(output_dir, step, *rest)

    monkeypatch.setattr(run_state, "write_checkpoint", full)
    options = {"max_steps": 3, "eval_steps": 1, "load_best_model_at_end": True}
    _, result = run(tiny_dir, tok, tmp_path, data, **options)
    assert result.steps == 3
    assert "the last adapter stays: the checkpoint of the best, step 1" in capsys.readouterr().out
    assert (tmp_path / ADAPTER).exists()


def test_one_run_at_a_time(tiny_dir, tok, tmp_path):
    with (
        run_state.only_run_in(tmp_path),
        pytest.raises(lk.LorakitError, match="another run is training into"),
    ):
        run(tiny_dir, tok, tmp_path)
    run(tiny_dir, tok, tmp_path)


def test_the_optimizers_settings_are_those_of_the_run(tiny_dir, tok, tmp_path):
    """A resumed run takes the weight decay that it is told, not the one of the checkpoint."""
    adapters = []
    for name, decay in (("a", 0.0), ("b", 0.9)):
        run(tiny_dir, tok, tmp_path / name, max_steps=2, save_steps=2)
        options = {"max_steps": 4, "resume": "auto", "weight_decay": decay}
        run(tiny_dir, tok, tmp_path / name, **options)
        adapters.append((tmp_path / name / ADAPTER).read_bytes())
    assert adapters[0] != adapters[1]


def test_a_damaged_log_does_not_stop_a_run(tiny_dir, tok, tmp_path):
    run(tiny_dir, tok, tmp_path, max_steps=2, save_steps=2)
    log = tmp_path / "metrics.jsonl"
    garbage = b"garbage\n[]\n" + b"[" * 10**5 + b'\n{"step": "x"}\n\xff\n{"step": 1'
    log.write_bytes(log.read_bytes() + garbage)
    run(tiny_dir, tok, tmp_path, max_steps=3, resume="auto")
    assert [json.loads(line)["step"] for line in log.open()] == [1, 2, 3]


@pytest.mark.parametrize("name", ["early_stopping_patience", "load_best_model_at_end"])
def test_what_needs_validation_rows(tiny_dir, tok, tmp_path, name):
    with pytest.raises(lk.LorakitError, match=f"{name} needs validation rows"):
        run(tiny_dir, tok, tmp_path, **{name: 1 if "patience" in name else True})


@pytest.mark.parametrize("name", ["early_stopping_patience", "load_best_model_at_end"])
def test_what_needs_more_than_one_evaluation(tiny_dir, tok, tmp_path, name):
    data = {"train": ROWS, "validation": ROWS[:4]}
    value = 1 if name == "early_stopping_patience" else True
    with pytest.raises(lk.LorakitError, match=f"{name} needs more than .* set eval_steps"):
        run(tiny_dir, tok, tmp_path, data, **{name: value})


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


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_32bit"])
def test_a_full_disk_costs_a_checkpoint_and_lines_of_the_log(
    tiny_dir, tok, tmp_path, capsys, optim
):
    """Full from the first step to the fourth: no file may grow over 300 bytes."""
    model, done = adapted(tiny_dir), []
    limit = contextlib.ExitStack()

    def after_step():
        done.append(1)
        if len(done) == 1:
            limit.enter_context(small_files(300))
        if len(done) == 4:
            limit.close()

    config = lk.TrainConfig(str(tmp_path), max_steps=6, save_steps=3, optim=optim)
    with limit:
        result = lk.train(model, tok, ROWS, config, after_step=after_step)
    assert result.steps == 6
    out = capsys.readouterr().out
    assert out.count("metrics.jsonl could not be written ") == 1
    assert out.count("the checkpoint of step 3 could not be written") == 1
    assert [each.step for each in run_state.checkpoints(tmp_path)] == [6]
    assert (tmp_path / ADAPTER).exists()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == [1, 5, 6]


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


def test_a_skipped_step_names_the_rows_that_it_had(tiny_dir, tok, tmp_path, capsys):
    """Whatever was dropped before them."""
    rows = [{"prompt": "a" * 99, "completion": "b"}] * 3 + ROWS[:2]
    model = adapted(tiny_dir)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    config = lk.TrainConfig(str(tmp_path), max_steps=1, over_length="drop", max_seq_length=60)
    with pytest.raises(lk.LorakitError, match="none of the 1 steps was finite"):
        lk.train(model, tok, rows, config)
    out = capsys.readouterr().out
    assert re.search(r"on (row 3, row 4|row 4, row 3)\n", out)


def test_evaluations_that_are_never_finite(tiny_dir, tok, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_run, "held_out_loss", lambda *_: {"loss": float("nan")})
    data = {"train": ROWS, "validation": ROWS[:4]}
    options = {"max_steps": 2, "eval_steps": 1, "load_best_model_at_end": True}
    run(tiny_dir, tok, tmp_path, data, **options)
    assert "the last adapter stays: no evaluation had a finite loss" in capsys.readouterr().out
    assert (tmp_path / ADAPTER).exists()
