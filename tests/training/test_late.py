"""A run that reads each step when the next one is issued, as on a GPU, beside one that does not."""

import json
import os
import re
import signal

import pytest
import torch

import lorakit as lk
from lorakit.training import adamw
from lorakit.training import run as training_run
from lorakit.training.device_step import DeviceStep, HostStep
from tests.conftest import ROWS
from tests.training.runs import ADAPTER, adapted, run, same_tensors

OPTIONS = {"max_steps": 7, "eval_steps": 3, "save_steps": 2, "gradient_accumulation_steps": 2}
OPTIONS |= {"per_device_train_batch_size": 3, "weight_decay": 0.1, "max_grad_norm": 0.3}
TIMES = ("tokens_per_second", "peak_memory_mb")


@pytest.fixture
def late(monkeypatch):
    """A call of it says which way the runs that follow take."""
    init, backend = training_run.Run.__init__, lk.kernels.use_backend("reference")

    def choose(reads_late, kind=DeviceStep):
        def prepare(self, *args):
            init(self, *args)
            self.reads_late = reads_late

        monkeypatch.setattr(training_run.Run, "__init__", prepare)
        monkeypatch.setattr("lorakit.training.stepping.optimizer_step", kind)

    with backend:
        yield choose


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return str([{k: v for k, v in line.items() if k not in TIMES} for line in lines])


def same_runs(a, b):
    assert metrics(a) == metrics(b)
    assert (a / ADAPTER).read_bytes() == (b / ADAPTER).read_bytes()
    checkpoints = sorted(path.name for path in a.glob("checkpoint-*"))
    assert checkpoints == sorted(path.name for path in b.glob("checkpoint-*"))
    for name in checkpoints:
        assert same_tensors(a / name, b / name)
        values = [json.loads((out / name / "state.json").read_text()) for out in (a, b)]
        for value in values:
            del value["progress"]["seconds"]
        assert str(values[0]) == str(values[1])  # of NaN too


def bad_steps(monkeypatch, *numbers):
    """Gradients of these steps that are not finite."""
    real = training_run.backward

    def backward(model, step, *rest):
        losses = real(model, step, *rest)
        if step.number in numbers:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            grads[3][0] = float("nan")
        return losses

    monkeypatch.setattr(training_run, "backward", backward)


def lines_of(capsys):
    """What a run has printed, without times and memory."""
    return [re.sub(r", \d+ tok/s.*", "", line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"optim": "adamw_8bit", "loraplus_lr_ratio": 4.0, "packing": True, "max_seq_length": 64},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "save_steps": None, "eval_steps": None},
    ],
)
def test_reading_late_changes_no_bit_and_no_line(
    tiny_dir, tok, tmp_path, monkeypatch, capsys, late, more
):
    """The step is the device's or the host's, and two are not finite."""
    bad_steps(monkeypatch, 2, 6)
    monkeypatch.setattr(adamw, "MIN_8BIT_SIZE", 200)  # which some of these tensors have
    options, printed = {**OPTIONS, **more}, []
    data = {"train": ROWS, "validation": ROWS[:4]} if options["eval_steps"] else ROWS
    ways = ((False, HostStep), (True, HostStep), (False, DeviceStep), (True, DeviceStep))
    for i, (reads_late, kind) in enumerate(ways):
        late(reads_late, kind)
        _, result = run(tiny_dir, tok, tmp_path / str(i), data, **options)
        assert result.skipped_steps == 2
        printed.append(lines_of(capsys))
    for i in (1, 2, 3):
        same_runs(tmp_path / "0", tmp_path / str(i))
        assert printed[i] == printed[0]
    assert "first in model.layers.0.self_attn.k_proj.adapters.default.lora_B" in "".join(printed[0])


def test_a_run_that_reads_late_resumes_with_the_same_bytes(
    tiny_dir, tok, tmp_path, monkeypatch, late
):
    bad_steps(monkeypatch, 2)
    data = {"train": ROWS, "validation": ROWS[:4]}
    late(True)
    run(tiny_dir, tok, tmp_path / "whole", data, **OPTIONS)
    real = training_run.backward

    def interrupted(model, step, *rest):
        if step.number == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(model, step, *rest)

    monkeypatch.setattr(training_run, "backward", interrupted)
    out = tmp_path / "parts"
    _, result = run(tiny_dir, tok, out, data, **OPTIONS)
    assert (result.interrupted, result.steps) == (True, 5)
    monkeypatch.setattr(training_run, "backward", real)
    run(tiny_dir, tok, out, data, **OPTIONS, resume="auto")
    assert metrics(out) == metrics(tmp_path / "whole")
    assert (out / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    assert same_tensors(out / "checkpoint-7", tmp_path / "whole" / "checkpoint-7")


@pytest.mark.parametrize("reads_late", [False, True])
def test_ten_bad_steps_in_a_row_stop_the_run(tiny_dir, tok, tmp_path, late, reads_late):
    late(reads_late)
    model = adapted(tiny_dir)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    config = lk.TrainConfig(output_dir=str(tmp_path), max_steps=50)
    message = r"10 steps in a row were not finite: step 10 has loss nan .* on row \d+, row [\w, ]+;"
    with pytest.raises(lk.LorakitError, match=message):
        lk.train(model, tok, ROWS, config)
    assert not (tmp_path / ADAPTER).exists()


def test_what_a_run_does_in_which_order(tiny_dir, tok, tmp_path, monkeypatch, late):
    """The next step is issued, and the one after it prepared, before a step is read."""
    done = []

    def note(name, word, number):
        real = getattr(training_run, name)

        def run(*args):
            done.append((word, number(args)))
            return real(*args)

        monkeypatch.setattr(training_run, name, run)

    note("prepare", "prepare", lambda args: args[2])
    note("backward", "issue", lambda args: args[1].number)
    log_step = training_run.Log.step
    monkeypatch.setattr(
        training_run.Log,
        "step",
        lambda self, **values: done.append(("read", values["step"])) or log_step(self, **values),
    )
    late(True)
    run(tiny_dir, tok, tmp_path, max_steps=4, save_steps=3)
    assert done == [
        ("prepare", 1), ("issue", 1), ("prepare", 2),
        ("issue", 2), ("prepare", 3), ("read", 1),
        ("issue", 3), ("prepare", 4), ("read", 2),
        ("read", 3),  # for the checkpoint
        ("issue", 4), ("read", 4),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [HostStep, DeviceStep])
def test_after_step_sees_clipped_gradients_and_a_log_that_is_complete(
    tiny_dir, tok, tmp_path, late, kind
):
    late(True, kind)
    model, seen = adapted(tiny_dir), []

    def after_step():
        norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        seen.append((norm.norm().item(), (tmp_path / "metrics.jsonl").read_text().count("\n")))

    config = lk.TrainConfig(str(tmp_path), max_steps=3, max_grad_norm=1e-3)
    lk.train(model, tok, ROWS, config, after_step=after_step)
    assert [lines for _, lines in seen] == [1, 2, 3]
    assert [norm for norm, _ in seen] == pytest.approx([1e-3] * 3, rel=1e-2)  # norm + 1e-6
