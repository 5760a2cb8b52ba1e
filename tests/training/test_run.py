"""The loop of a run: steps that are skipped, evaluations, the best one, early stops."""

import re
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.training import run as training_run
from lorakit.training import state as run_state
from lorakit.training.mode import training_mode
from lorakit.training.run import Run
from tests.conftest import ROWS
from tests.training.runs import ADAPTER, adapted, run


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


def test_a_full_disk_at_the_end_does_not_lose_the_adapter(tiny_dir, tok, tmp_path, monkeypatch):
    real, out = Run._save, tmp_path / "out"

    def full(self, path):
        if path == out:
            raise OSError(28, "No space left on device")
        real(self, path)

    monkeypatch.setattr(Run, "_save", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(
        lk.LorakitError, match="written to .*out .No space left.*; it is in"
    ) as found:
        run(tiny_dir, tok, out, ROWS, max_steps=1)
    elsewhere = Path(str(found.value).rpartition("; it is in ")[2])
    model = lk.load_model(tiny_dir)
    lk.load_adapter(model, elsewhere)

    def none(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "_save", none)
    with pytest.raises(lk.LorakitError, match="No space left on device.; there is no checkpoint"):
        run(tiny_dir, tok, out, ROWS, max_steps=1)
    assert {each for each in tmp_path.iterdir() if each.is_dir()} == {elsewhere, out}


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


def test_stops_at_a_loss_that_is_not_finite(tiny_dir, tok, tmp_path):
    model = adapted(tiny_dir)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(lk.LorakitError, match="none of the 2 steps was finite"):
        lk.train(model, tok, ROWS, lk.TrainConfig(output_dir=str(tmp_path), max_steps=2))
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_the_adapter_is_saved_before_the_last_evaluation(tiny_dir, tok, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "held_out_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_dir, tok, tmp_path, {"train": ROWS, "validation": ROWS})
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_an_adapter_without_gradient_is_an_error(tiny_dir, tok, tmp_path):
    model = adapted(tiny_dir)
    layer = model.model.layers[1].mlp.up_proj
    layer.set_enabled(False)
    with pytest.raises(lk.LorakitError, match=r"layers\.1\.mlp\.up_proj\.lora_A\S* got no grad"):
        lk.train(model, tok, ROWS, lk.TrainConfig(output_dir=str(tmp_path), max_steps=2))


def test_the_settings_of_the_model_are_put_back(tiny_dir):
    """Whatever they were, and also after an error."""
    model = adapted(tiny_dir)
    model.neftune_noise_alpha = 3.0
    config = lk.TrainConfig(
        gradient_checkpointing=True,
        activation_offloading=True,
        neftune_noise_alpha=5.0,
        mlp_activations="recompute",
    )

    def settings():
        kept = model.gradient_checkpointing, model.offload_activations, model.neftune_noise_alpha
        return model.training, *kept, model.kept_layers

    def fails():
        assert settings() == (True, True, True, 5.0, 0)
        raise ZeroDivisionError

    before = settings()[1:]
    assert before == (False, False, 3.0, model.config.num_hidden_layers)
    for mode in (True, False):
        model.train(mode)
        with pytest.raises(ZeroDivisionError), training_mode(model, config, 64):
            fails()
        assert settings() == (mode, *before)


def test_a_tokenizer_of_its_own_is_saved_with_every_checkpoint(tiny_dir, tmp_path):
    """The new token would be read as several old ones otherwise."""
    tok, model = lk.load_tokenizer(tiny_dir), lk.load_model(tiny_dir, dtype="float32")
    lk.attach(model, lk.add_tokens(model, tok, ["<new>"], lk.LoraConfig(r=2)))
    config = lk.TrainConfig(str(tmp_path / "first"), max_steps=2, save_steps=1)
    lk.train(model, tok, ROWS, config)
    ids = tok.encode("1 <new>")
    for name in ("", "checkpoint-1", "checkpoint-2"):
        assert lk.load_tokenizer(tmp_path / "first" / name).encode("1 <new>") == ids
    # a run that goes on from the adapter reads its tokenizer from there, and adds nothing
    again = lk.load_tokenizer(tmp_path / "first" / "checkpoint-1")
    config = lk.TrainConfig(str(tmp_path / "second"), max_steps=1, save_steps=1)
    lk.train(model, again, ROWS, config)
    for name in ("", "checkpoint-1"):
        assert lk.load_tokenizer(tmp_path / "second" / name).encode("1 <new>") == ids


def test_the_tokenizer_of_an_earlier_run_does_not_stay(tiny_dir, tok, tmp_path):
    other = lk.load_tokenizer(tiny_dir)
    other.add_special_tokens(["<old>"])
    other.save(tmp_path)
    run(tiny_dir, tok, tmp_path, max_steps=1)
    assert len(lk.load_tokenizer(tmp_path)) == len(tok)
    run(tiny_dir, tok, tmp_path / "alone", max_steps=1)
    assert not (tmp_path / "alone" / "tokenizer.json").exists()
