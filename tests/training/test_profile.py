"""The table of where the time of a step goes."""

import pytest
import torch

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers
from lorakit.training import run as training_run
from lorakit.training.profile import StepProfile
from tests.conftest import ROWS
from tests.training.runs import adapted


def test_the_rows_are_the_work_of_a_step(tiny_dir, tok, tmp_path):
    """The times are positive and in order, and sum to a step; ops and the optimizer have rows."""
    model = adapted(tiny_dir)
    before = [layer.lora_B.detach().clone() for layer in lora_layers(model).values()]
    config = lk.TrainConfig(str(tmp_path / "out"), eval_steps=None, learning_rate=1e-2)
    found = lk.profile_training(model, tok, ROWS, config)
    assert found.seconds > 0
    *work, rest = found.rows.items()
    assert rest[0] == "the rest"
    assert [seconds for _, seconds in work] == sorted((s for _, s in work), reverse=True)
    assert all(seconds > 0 for _, seconds in work)
    assert sum(found.rows.values()) == pytest.approx(found.seconds)  # the rest makes up for it
    names = [name for name, _ in work]
    assert "optimizer" in names
    assert any(name.startswith("lora_linear: ") for name in names)
    assert any(name.endswith(" backward") for name in names)
    lines = str(found).splitlines()
    assert len(lines) == 1 + len(found.rows)
    assert lines[0].startswith(f"a step takes {1e3 * found.seconds:.1f} ms, the mean of 3 after 2")
    assert not (tmp_path / "out").exists()  # nothing is saved
    after = [layer.lora_B for layer in lora_layers(model).values()]
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_run_that_ends_early_stops_the_profiler(tiny_dir, tok, monkeypatch):
    """Otherwise it would go on to note every op of the process."""
    model, real, seen = adapted(tiny_dir), training_run.backward, []

    def fails_in_the_fourth_step(*args):
        seen.append(1)
        if len(seen) == 4:
            raise RuntimeError("cut off")
        return real(*args)

    monkeypatch.setattr(training_run, "backward", fails_in_the_fourth_step)
    with pytest.raises(RuntimeError, match="cut off"):
        lk.profile_training(model, tok, ROWS)
    assert not torch.autograd._profiler_enabled()
    assert str(StepProfile(on_gpu=False)).startswith("a step takes 0.0 ms")
