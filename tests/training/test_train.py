"""The loop: its gradient, its determinism, what it writes and what it refuses."""

import json

import pytest
import torch

import lorakit as lk
from lorakit.data import check
from lorakit.data.encode import Encoder
from tests.conftest import ROWS, tiny
from tests.training.runs import (
    adapted,
    run,
)


def test_learns_and_writes(tiny_dir, tok, tmp_path):
    data = {"train": ROWS, "validation": ROWS[:4]}
    model, result = run(tiny_dir, tok, tmp_path, data, max_steps=30, eval_steps=10)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert set(steps[0]) == {
        "step", "epoch", "loss", "learning_rate", "grad_norm", "mean_token_accuracy", "entropy",
        "tokens", "tokens_per_second", "padding", "peak_memory_mb",
    }  # fmt: skip
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [10, 20, 30]
    assert result.evaluations[-1]["loss"] == evaluations[-1]["eval_loss"]
    assert result.evaluations[-1]["loss"] == pytest.approx(
        lk.evaluate(model, tok, ROWS[:4])["loss"]
    )
    assert (result.steps, result.interrupted) == (30, False)
    assert result.tokens == steps[-1]["tokens"]
    fresh = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    again = lk.load_adapter(fresh, tmp_path)
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids), model(ids))
    assert not model.training


@pytest.mark.parametrize("packing", [False, True])
def test_accuracy_and_entropy_of_a_step(tiny_dir, tok, tmp_path, packing):
    """They are those of an evaluation of the same rows, whatever micro-batches a step has."""
    expected = lk.evaluate(adapted(tiny_dir).eval(), tok, ROWS[:12])
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}
    options |= {"max_steps": 1, "packing": packing, "max_seq_length": 40}
    run(tiny_dir, tok, tmp_path, ROWS[:12], **options)
    [step] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(ROWS[:12]) == expected["rows"]
    # the rows of the one step, in other batches
    assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert step["mean_token_accuracy"] == pytest.approx(expected["mean_token_accuracy"], rel=1e-9)
    assert step["entropy"] == pytest.approx(expected["entropy"], rel=1e-5)


def test_chats_from_a_file(tiny_dir, tok, tmp_path):
    """Every format trains, and a file as the list of its rows does."""
    chats = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": a.upper()}]}
        for a in "abcdef"
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chats))
    losses = {
        data: run(tiny_dir, tok, tmp_path / "out", rows, max_steps=2, train_on=data)[1].loss
        for data, rows in [("completion", path), ("last_turn", chats), ("all", str(path))]
    }
    assert losses["completion"] == losses["last_turn"] != losses["all"]
    model = adapted(tiny_dir)
    assert lk.evaluate(model, tok, path) == lk.evaluate(model, tok, chats, train_on="last_turn")
    assert lk.evaluate(model, tok, [{"text": "abc"}])["label_tokens"] == 4


def test_each_row_of_a_file_is_read_and_encoded_once(tiny_dir, tok, tmp_path, monkeypatch):
    """No step, evaluation or digest of a checkpoint does so again."""
    made, encoded = [], []
    make_row, encode = check.make_row, Encoder.__call__
    monkeypatch.setattr(check, "make_row", lambda *args: made.append(args[1]) or make_row(*args))
    monkeypatch.setattr(
        Encoder, "__call__", lambda self, row: encoded.append(row.place) or encode(self, row)
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps(ROWS[0]) + "\n")
    data = {"train": path, "validation": more}
    run(tiny_dir, tok, tmp_path / "out", data, max_steps=12, eval_steps=4, save_steps=4)
    assert encoded == made == [f"{path} line {i}" for i in range(1, 25)] + [f"{more} line 1"]


def test_examples_that_are_there_already(tiny_dir, tok, tmp_path):
    """They train as their rows do, unless they were made with other settings."""
    examples = lk.encode_rows(ROWS, tok, max_seq_length=1024)
    data = {"train": examples, "validation": examples}
    model, result = run(tiny_dir, tok, tmp_path / "a", data, eval_metrics=["rouge_l"])
    _, other = run(
        tiny_dir, tok, tmp_path / "b", {"train": ROWS, "validation": ROWS}, eval_metrics=["rouge_l"]
    )
    assert result.evaluations == other.evaluations
    a, b = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab")
    assert a == b
    assert lk.evaluate(model, tok, examples) == lk.evaluate(model, tok, ROWS)
    with pytest.raises(lk.LorakitError, match=r"rows were encoded with max_seq_length=1024, .* 9:"):
        run(tiny_dir, tok, tmp_path / "c", examples, max_seq_length=9)
    data = {"train": ROWS, "validation": examples}
    with pytest.raises(lk.LorakitError, match="the validation rows were encoded with train_on='c"):
        run(tiny_dir, tok, tmp_path / "c", data, train_on="all")


def test_rows_with_an_empty_answer_are_left_out(tiny_dir, tok, tmp_path):
    more = [*ROWS[:9], {"prompt": "a", "completion": ""}, *ROWS[9:]]
    _, result = run(tiny_dir, tok, tmp_path / "a", more, skip_empty=True)
    assert result.loss == run(tiny_dir, tok, tmp_path / "b")[1].loss


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_same_seed_same_bytes(tiny_dir, tok, tmp_path, dropout):
    options = {"lora": {"lora_dropout": dropout}}
    for name in ("a", "b"):
        run(tiny_dir, tok, tmp_path / name, **options)
    run(tiny_dir, tok, tmp_path / "c", seed=1, **options)
    a, b, c = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_gradient_checkpointing_gives_the_same_adapter(tiny_dir, tok, tmp_path):
    for name, on in (("a", False), ("b", True)):
        run(tiny_dir, tok, tmp_path / name, gradient_checkpointing=on)
    a, b = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab")
    assert a == b


def test_clipping_and_schedule(tiny_dir, tok, tmp_path):
    run(tiny_dir, tok, tmp_path, max_grad_norm=1e-4, warmup_ratio=0.5, max_steps=4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [round(line["learning_rate"], 6) for line in lines] == [0.005, 0.01, 0.01, 0.005]
    assert all(line["grad_norm"] > 1e-4 for line in lines)  # the norm before clipping


def test_epochs(tiny_dir, tok, tmp_path):
    options = {"max_steps": None, "per_device_train_batch_size": 5}
    _, result = run(tiny_dir, tok, tmp_path, num_train_epochs=2.0, **options)
    assert result.steps == 10  # 24 rows: 5 batches
    _, result = run(
        tiny_dir, tok, tmp_path, gradient_accumulation_steps=3, num_train_epochs=1.0, **options
    )
    assert result.steps == 2


def test_refuses_before_it_starts(tiny_dir, tok, tmp_path):
    config = lk.TrainConfig(output_dir=str(tmp_path / "out"))
    plain = lk.load_model(tiny_dir, dtype="float32")
    with pytest.raises(lk.LorakitError, match="no adapter is attached"):
        lk.train(plain, tok, ROWS, config)
    model = adapted(tiny_dir)
    with pytest.raises(lk.LorakitError, match="holds no rows"):
        lk.train(model, tok, [], config)
    (tmp_path / "file").write_text("")
    (tmp_path / "locked" / ".lock").mkdir(parents=True)  # root may write anywhere
    with pytest.raises(lk.LorakitError, match="locked cannot be written to"):
        lk.train(model, tok, ROWS, lk.TrainConfig(output_dir=str(tmp_path / "locked")))
    with pytest.raises(lk.LorakitError, match=r"file/out cannot be made \(Not a directory\)"):
        lk.train(model, tok, ROWS, lk.TrainConfig(output_dir=str(tmp_path / "file" / "out")))
    with pytest.raises(lk.LorakitError, match="file is a file; choose another name"):
        lk.train(model, tok, ROWS, lk.TrainConfig(output_dir=str(tmp_path / "file")))
    with pytest.raises(lk.LorakitError, match="'train' and maybe 'validation'"):
        lk.train(model, tok, {"training": ROWS}, config)
    assert not (tmp_path / "out").exists()


def test_refuses_float16_and_merged_models(tiny_dir, tok, tmp_path):
    config = lk.TrainConfig(output_dir=str(tmp_path / "out"))
    half = lk.attach(lk.load_model(tiny_dir, dtype="float16"))
    with pytest.raises(lk.LorakitError, match="float16 model underflow"):
        lk.train(half, tok, ROWS, config)
    merged = adapted(tiny_dir)
    lk.merge(merged)
    with pytest.raises(lk.LorakitError, match="the adapter is merged"):
        lk.train(merged, tok, ROWS, config)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_trains(tok, tmp_path, family):
    """Some of the experts may be chosen by no token in the first step."""
    options = {"num_local_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    tiny(family, vocab_size=300, **options).save_pretrained(tmp_path / "model")
    model = lk.load_model(tmp_path / "model", dtype="float32", quantize="nf4")
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8))
    config = lk.TrainConfig(
        str(tmp_path / "out"), max_steps=12, per_device_train_batch_size=1, learning_rate=1e-2
    )
    before = lk.evaluate(model, tok, ROWS[:4])["loss"]
    lk.train(model, tok, [{"prompt": "1", "completion": "2"}, *ROWS], config)
    assert lk.evaluate(model, tok, ROWS[:4])["loss"] < before


def test_composes_with_a_plain_loop(tiny_dir, tok):
    model = adapted(tiny_dir)
    optimizer = lk.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor([tok.encode("the same text again and again")])
    losses = []
    for _ in range(10):
        loss, count = model.loss(ids, ids)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


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
