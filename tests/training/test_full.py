"""Training of the model itself, `train: full`, against transformers with torch's AdamW."""

import json

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.data.batching import Order, collate
from lorakit.training import state as run_state
from lorakit.training.gradients import WideSum
from tests.conftest import ROWS, tiny, write_tokenizer
from tests.training.runs import PAIRS

WEIGHTS = "model.safetensors"
OPTIONS = {"train": "full", "max_steps": 6, "learning_rate": 1e-3, "max_seq_length": 64}


def train(directory, tok, out, rows=ROWS, dtype="float32", **options):
    model = lk.load_model(directory, dtype=dtype)
    config = lk.TrainConfig(**{"output_dir": str(out), **OPTIONS, **options})
    return model, lk.train(model, tok, rows, config, base_model="some/base")


def torchs(theirs, tok, config):
    """Return the losses of the run with transformers' model and torch's optimizer, on our rows."""
    decays = [p for p in theirs.parameters() if p.dim() > 1]
    others = [p for p in theirs.parameters() if p.dim() <= 1]
    groups = [{"params": decays}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, weight_decay=config.weight_decay, eps=config.adam_epsilon
    )
    examples = lk.encode_rows(ROWS, tok, max_seq_length=config.max_seq_length)
    order = Order(examples, config)
    losses = []
    for number in range(1, config.max_steps + 1):
        ids, labels = collate([examples[i] for rows in order.step(number) for i in rows])
        mask = torch.arange(ids.shape[1]) < (ids != 0).sum(1, keepdim=True)
        logits = theirs(ids, attention_mask=mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("gemma2", {"head_dim": 12, "num_key_value_heads": 2, "query_pre_attn_scalar": 12}),
    ],
    ids=["llama", "gemma2"],  # a head of its own; one that is the embedding
)
def test_equals_transformers_with_torchs_adamw_step_by_step(family, options, tmp_path):
    theirs = tiny(family, vocab_size=300, **options)
    theirs.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    tok = lk.load_tokenizer(tmp_path)
    # an epsilon beside which the rounding of a gradient that is almost 0 is nothing
    same = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "weight_decay": 0.1}
    same |= {"adam_epsilon": 1e-5, "learning_rate": 1e-4}
    model, _ = train(tmp_path, tok, tmp_path / "out", **same)
    losses = torchs(theirs, tok, lk.TrainConfig(**OPTIONS | same))
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ours = [json.loads(line)["loss"] for line in lines]
    assert ours == pytest.approx(losses, rel=1e-6)
    truth = dict(theirs.named_parameters())
    before = dict(tiny(family, vocab_size=300, **options).named_parameters())
    for name, p in model.named_parameters():
        assert (p - truth[name]).abs().max() <= 1e-6, name
        assert (p - before[name]).abs().max() > 1e-5, name  # far more than the tolerance


def test_bf16_with_8_bit_state_learns_as_fp32(tiny_dir, tok, tmp_path):
    """The loss after 200 steps is within 1 %; without remainders small steps would be lost."""
    options = {"max_steps": 200, "learning_rate": 3e-4, "per_device_train_batch_size": 4}
    means = {}
    for dtype, optim in (("float32", "adamw_torch"), ("bfloat16", "adamw_8bit")):
        out = tmp_path / dtype
        train(tiny_dir, tok, out, dtype=dtype, optim=optim, **options)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        means[dtype] = sum(losses[-50:]) / 50
        assert means[dtype] < 0.8 * losses[0]
    assert means["bfloat16"] == pytest.approx(means["float32"], rel=1e-2)


def test_the_result_is_a_model(tiny_dir, tok, tmp_path):
    """Lorakit and transformers load it, with its tokenizer, and its card says what it came from."""
    from transformers import AutoModelForCausalLM

    data = {"train": ROWS, "validation": ROWS[:4]}
    options = {"freeze": ["embed_tokens", r"layers\.0\."], "weight_decay": 0.1}
    model, result = train(tiny_dir, tok, tmp_path, data, "bfloat16", **options)
    assert not (tmp_path / "adapter_config.json").exists()
    ids = torch.arange(40)[None]
    again = lk.load_model(tmp_path)
    assert torch.equal(again(ids), model(ids))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    before = lk.load_model(tiny_dir)
    for (name, p), old in zip(again.named_parameters(), before.parameters(), strict=True):
        frozen = "embed_tokens" in name or "layers.0." in name
        assert torch.equal(p, old) == frozen, name
        assert torch.equal(p, theirs.get_parameter(name)), name
    assert lk.load_tokenizer(tmp_path).encode("It is 3.") == tok.encode("It is 3.")
    assert lk.generate(again, tok, "What", max_new_tokens=2) is not None
    card = (tmp_path / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "base_model: some/base" in card
    assert result.evaluations[-1]["loss"] == lk.evaluate(again, tok, ROWS[:4])["loss"]


@pytest.mark.parametrize(
    ("optim", "accumulate"), [("adamw_torch", 1), ("adamw_8bit", 2), ("paged_adamw_8bit", 1)]
)
def test_a_resumed_run_has_the_bits_of_another(optim, accumulate, tiny_dir, tok, tmp_path):
    """The bytes of model and state, with frozen weights too; a checkpoint is a model itself."""
    options = {"optim": optim, "save_steps": 2, "freeze": ["norm"], "dtype": "bfloat16"}
    options["lr_scheduler_type"] = "constant"  # which does not depend on max_steps
    options |= {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 2}
    train(tiny_dir, tok, tmp_path / "whole", **options)
    train(tiny_dir, tok, tmp_path / "part", **options | {"max_steps": 4})
    checkpoint = tmp_path / "part" / "checkpoint-4"
    state = load_file(checkpoint / run_state.STATE_TENSORS)
    assert all(name.startswith("optimizer.") for name in state)  # no weights
    lk.load_model(checkpoint)
    train(tiny_dir, tok, tmp_path / "part", **options, resume="auto")
    for file in (WEIGHTS, f"checkpoint-6/{WEIGHTS}", f"checkpoint-6/{run_state.STATE_TENSORS}"):
        paths = [tmp_path / which / file for which in ("whole", "part")]
        assert paths[0].read_bytes() == paths[1].read_bytes(), file


def test_ends_with_the_best_model(tiny_dir, tok, tmp_path):
    data = {"train": ROWS, "validation": ROWS[:4]}
    options = {"eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.3}
    options |= {"lr_scheduler_type": "constant", "max_steps": 3}
    _, result = train(tiny_dir, tok, tmp_path, data, "bfloat16", **options)
    losses = [each["loss"] for each in result.evaluations]
    assert min(losses) < losses[-1]
    assert lk.evaluate(lk.load_model(tmp_path), tok, ROWS[:4])["loss"] == min(losses)


def test_pairs_are_compared_with_the_model_before(tiny_dir, tok, tmp_path):
    """The loss of the first step of DPO is ln 2 for a model as for an adapter."""
    train(tiny_dir, tok, tmp_path, PAIRS, objective="dpo", max_steps=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line)["loss"] for line in lines)
    assert first == pytest.approx(0.693147, abs=1e-5)
    assert second != first


def test_gradient_checkpointing_and_packing_change_nothing(tiny_dir, tok, tmp_path):
    found = []
    for options in ({}, {"gradient_checkpointing": True}, {"packing": True}):
        out = tmp_path / str(len(found))
        train(tiny_dir, tok, out, per_device_train_batch_size=24, max_steps=2, **options)
        found.append(load_file(out / WEIGHTS))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])
        # Adam's first steps have the sign of the gradient: where that is nothing but rounding, the
        # weights may be as far apart as both steps take them
        close = (value - found[2][name]).abs() <= 1e-5
        assert close.float().mean() > 0.99


def test_gradients_of_micro_batches_are_added_in_fp32(tiny_dir):
    """A thousand gradients of 1 make 1000; in bfloat16 the sum stays at 256."""
    model = lk.load_model(tiny_dir)
    sums = WideSum(list(model.parameters()))
    weight = model.model.norm.weight
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        sums.end_round(False)
        assert weight.grad is None
    sums.finish([], 1000)
    assert torch.equal(weight.grad, torch.full_like(weight, 1000))
    assert not sums.sums
    assert all(p.grad is None for p in model.parameters() if p is not weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freeze": ["layers.7"]}, "freeze: 'layers.7' is in the name of no weight"),
        ({"freeze": ["."]}, "train: full has nothing to train"),
    ],
)
def test_refuses_what_freezes_nothing_or_all(change, message, tiny_dir, tok, tmp_path):
    with pytest.raises(lk.LorakitError, match=message):
        train(tiny_dir, tok, tmp_path, **change)


def test_refuses_models_that_it_cannot_train(tiny_dir, copy, tok, tmp_path):
    config = lk.TrainConfig(**OPTIONS, output_dir=str(tmp_path / "out"))
    adapted = lk.attach(lk.load_model(tiny_dir), lk.LoraConfig())
    with pytest.raises(lk.LorakitError, match="an adapter is attached; detach it"):
        lk.train(adapted, tok, ROWS, config)
    with pytest.raises(lk.LorakitError, match=r"quantized \(nf4\); load it without quantize"):
        lk.train(lk.load_model(tiny_dir, quantize="nf4"), tok, ROWS, config)
    with pytest.raises(lk.LorakitError, match="gradients of a float16 model underflow"):
        lk.train(lk.load_model(tiny_dir, dtype="float16"), tok, ROWS, config)
    with pytest.raises(lk.LorakitError, match="whose files the result would replace"):
        train(copy, tok, copy)
    with pytest.raises(lk.LorakitError, match="no adapter is attached"):
        lk.train(lk.load_model(tiny_dir), tok, ROWS, lk.TrainConfig(str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_training_is_refused(tiny_dir, tok, tmp_path):
    train(tiny_dir, tok, tmp_path, max_steps=2, save_steps=2)
    with pytest.raises(lk.LorakitError, match="freeze"):
        train(tiny_dir, tok, tmp_path, resume="auto", freeze=["norm"])
    adapted = lk.attach(lk.load_model(tiny_dir, dtype="float32"), lk.LoraConfig())
    config = lk.TrainConfig(str(tmp_path), max_steps=6, resume="auto")
    with pytest.raises(lk.LorakitError, match=r"checkpoint-2"):
        lk.train(adapted, tok, ROWS, config)
