"""Ctrl-C and SIGTERM: a checkpoint is there, and the run goes on as if nothing had been."""

import os
import signal
import sys
import threading
from contextlib import nullcontext

import pytest
import torch

import lorakit as lk
from lorakit.training import run as training_run
from lorakit.training import state as run_state
from lorakit.training import train as training_train
from lorakit.training.interrupt import interrupt
from tests.conftest import ROWS
from tests.training.runs import ADAPTER, EVALUATED, run


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


class SetAtQuestion:
    """A signal that arrives just before the loop asks for it for the `number`th time."""

    def __init__(self, number):
        self.left = number

    def is_set(self):
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("number", range(1, 9))
def test_a_signal_at_any_moment_saves_a_checkpoint(tiny_dir, tok, tmp_path, monkeypatch, number):
    """Whichever question of the loop is the first to be answered by yes."""
    monkeypatch.setattr(training_train, "interrupt", lambda _: nullcontext(SetAtQuestion(number)))
    data = {"train": ROWS, "validation": ROWS[:4]}
    _, result = run(tiny_dir, tok, tmp_path, data, eval_steps=2)
    assert result.interrupted
    saved = [each.step for each in run_state.checkpoints(tmp_path)]
    assert saved == ([result.steps] if result.steps else [])


def test_ctrl_c_saves_and_leaves(tiny_dir, tok, tmp_path):
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    timer.start()
    model, result = run(tiny_dir, tok, tmp_path, max_steps=100_000)
    assert result.interrupted
    assert 0 < result.steps < 100_000
    assert signal.getsignal(signal.SIGINT) is before
    ids = torch.arange(10)[None]
    fresh = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    assert torch.equal(lk.load_adapter(fresh, tmp_path)(ids), model(ids))


@pytest.mark.parametrize("moment", range(1, 9))
def test_a_signal_in_the_middle_of_another_does_not_wait_for_it(moment):
    """SIGTERM arrives before each line of Python that the handler of SIGINT runs."""
    left = [moment]

    def trace(frame, event, argument):
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                signal.raise_signal(signal.SIGTERM)
        return trace

    before = sys.gettrace()
    with interrupt() as stop:
        sys.settrace(trace)
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            sys.settrace(before)
        assert stop.is_set()
