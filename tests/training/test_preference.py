"""DPO and ORPO against TRL on the same logits, and against fp64 on a model."""

import json
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers

B, T, V = 3, 11, 17


@pytest.fixture(scope="module")
def logits():
    """Of a policy and its reference: [2 B, T, V]."""
    torch.manual_seed(0)
    return torch.randn(2 * B, T, V) * 3, torch.randn(2 * B, T, V) * 3


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(1)
    return torch.randint(V, (2 * B, T))


@pytest.fixture(scope="module")
def mask():
    """Which tokens are of the completion: from 4 on, of different length."""
    lengths = torch.tensor([5, 7, 2, 6, 3, 7])
    at = torch.arange(T)
    return (at >= 4) & (at < 4 + lengths[:, None])


def log_probabilities(logits, ids):
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def summed(logits, ids, mask):
    return (log_probabilities(logits, ids) * mask[:, 1:]).sum(1)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_dpo_is_trls(logits, ids, mask, beta):
    """TRL's own loss, from the logits of a policy and a reference."""
    from trl.trainer.dpo_trainer import DPOTrainer

    policy, reference = logits

    def model(labels, **_):  # as TRL's fused head returns it: zero where there is no label
        found = log_probabilities(policy, ids) * (labels[:, 1:] != -100)
        unused = dict.fromkeys(("entropy", "mean_logits"), found)  # of its log
        return SimpleNamespace(log_probs=found, is_top1=found > 0, **unused)

    def same(x):
        return x

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=same, gather=same),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, ref_model=None,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], beta=beta,
        label_smoothing=0.0, use_weighting=False, args=SimpleNamespace(),
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    chosen, rejected = summed(policy, ids, mask).chunk(2)
    better, worse = summed(reference, ids, mask).chunk(2)
    ours = lk.dpo_loss(chosen, rejected, better, worse, beta=beta)
    inputs = {
        "input_ids": ids, "completion_mask": mask.long(), "attention_mask": torch.ones_like(ids),
        "ref_chosen_logps": better, "ref_rejected_logps": worse,
    }  # fmt: skip
    theirs = DPOTrainer._compute_loss(trainer, model, inputs, False)
    assert abs(theirs - ours.mean()) <= 1e-5 * ours.mean()


@given(
    values=st.lists(st.floats(-200, 0), min_size=4, max_size=4),
    beta=st.floats(0.01, 5),
    smoothing=st.floats(0, 0.49),
)
def test_smoothed_dpo_in_fp64(values, beta, smoothing):
    """- (1 - e) log sigmoid(d) - e log sigmoid(-d), also where a sigmoid underflows."""
    a, b, c, d = torch.tensor(values, dtype=torch.float64).split(1)
    ours = lk.dpo_loss(a, b, c, d, beta=beta, label_smoothing=smoothing)
    margin = beta * ((a - c) - (b - d))
    zero = torch.zeros_like(margin)  # softplus is cut off at 20
    truth = (1 - smoothing) * zero.logaddexp(-margin) + smoothing * zero.logaddexp(margin)
    assert torch.allclose(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_orpo_is_trls(logits, ids, mask, beta):
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    policy, _ = logits
    mean = summed(policy, ids, mask) / mask[:, 1:].sum(1)
    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    theirs, *_ = ORPOTrainer.odds_ratio_loss(trainer, *mean.chunk(2))
    ours = lk.orpo_loss(*mean.chunk(2), beta=beta)
    assert torch.allclose(ours, -theirs, rtol=1e-5)  # TRL subtracts it


def test_orpo_near_certainty_is_finite():
    log_p = torch.tensor([0.0, -1e-9, -1e-3, -50.0], requires_grad=True)
    losses = lk.orpo_loss(log_p, log_p.detach().flip(0))
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(log_p.grad).all()


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
@pytest.mark.parametrize("packed", [False, True])
def test_pairs_on_a_model(tiny_dir, objective, packed):
    """From the model's own logits, with the adapter on and off; packed or padded the same."""
    model = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    ids = torch.arange(4 * 9).view(4, 9) * 7 % 300
    labels = ids.clone()
    labels[:, :4] = -100
    base = model(ids).detach()
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, 0, 0.1)

    def log_p(logits):
        found = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return found[:, 3:].sum(1)

    (chosen, rejected), (better, worse) = log_p(model(ids)).chunk(2), log_p(base).chunk(2)
    if objective == "dpo":
        truth = F.softplus(-0.3 * ((chosen - better) - (rejected - worse)))
        prefers = chosen - better > rejected - worse
    else:
        mean, worst = chosen / 5, rejected / 5
        odds = [(p.exp() / (1 - p.exp())).log() for p in (mean, worst)]
        truth, prefers = -mean + 0.3 * F.softplus(odds[1] - odds[0]), mean > worst
    batch = {"input_ids": ids, "labels": labels}
    if packed:
        batch = {name: x.reshape(1, -1) for name, x in batch.items()}
        batch["cu_seqlens"] = torch.arange(0, 37, 9)
    losses, found = lk.pair_losses(model, **batch, objective=objective, beta=0.3)
    # fp32 sums of five log-probabilities of some 5 nats
    assert torch.allclose(losses.double(), truth, atol=1e-4)
    assert torch.equal(found, prefers)
    losses.sum().backward()
    assert all(layer.lora_B.grad.abs().max() > 0 for layer in lora_layers(model).values())


def test_bad_options():
    one = torch.zeros(1)
    for options, message in (({"beta": 0.0}, "beta must be"), ({"label_smoothing": 0.5}, "0.5")):
        with pytest.raises(lk.LorakitError, match=message):
            lk.dpo_loss(one, one, one, one, **options)
    with pytest.raises(lk.LorakitError, match="beta must be positive"):
        lk.orpo_loss(one, one, beta=-1.0)


PAIRS = [
    {"prompt": f"{a} plus {b} is ", "chosen": f"{a + b}.", "rejected": f"{a + b + 1}, I think."}
    for a in range(6)
    for b in range(4)
]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_a_run_learns_to_prefer(tiny_dir, tmp_path, objective, packing):
    model, tok = (
        lk.load_model(tiny_dir, dtype="float32", quantize="nf4"),
        lk.load_tokenizer(tiny_dir),
    )
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8))
    config = lk.TrainConfig(
        str(tmp_path), max_steps=30, learning_rate=1e-2, objective=objective, packing=packing,
        max_seq_length=64, eval_steps=15, save_steps=20,
    )  # fmt: skip
    result = lk.train(model, tok, {"train": PAIRS, "validation": PAIRS[:6]}, config)
    first, last = result.evaluations[0], result.evaluations[-1]
    assert last["loss"] < first["loss"]
    assert last["preference_accuracy"] == 1
    assert last["rows"] == 6


def test_rows_and_objective_must_fit(tiny_dir, tmp_path):
    model, tok = lk.attach(lk.load_model(tiny_dir, dtype="float32")), lk.load_tokenizer(tiny_dir)
    sft, dpo = (lk.TrainConfig(str(tmp_path), objective=o) for o in ("sft", "dpo"))
    rows = [{"prompt": "a", "completion": "b"}]
    for data, config in ((PAIRS, sft), (rows, dpo)):
        with pytest.raises(lk.LorakitError, match="does not fit the training rows"):
            lk.train(model, tok, data, config)


def test_pairs_of_chats(tiny_dir):
    """With a prompt of their own, or with messages that both begin with."""
    tok = lk.load_tokenizer(tiny_dir)
    before = [{"role": "user", "content": "hi"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("hello", "no"))
    apart = {"prompt": before, "chosen": good, "rejected": bad}
    whole = {"chosen": before + good, "rejected": before + bad}
    a, b = (
        lk.encode_rows(lk.read_rows([row]), tok, max_seq_length=200)[0] for row in (apart, whole)
    )
    assert a == b
    assert a.chosen.input_ids == tok.apply_chat_template(before + good)
    assert a.rejected.labels.count(-100) == a.chosen.labels.count(-100)
    with pytest.raises(lk.LorakitError, match="row 0: chosen and rejected need a prompt"):
        lk.read_rows([{"chosen": "a", "rejected": "b"}])
    with pytest.raises(lk.LorakitError, match="row 0, rejected: the completion is empty"):
        lk.read_rows([{"prompt": "x", "chosen": "a", "rejected": ""}])


def test_long_pairs_are_packed_and_scored(tiny_dir, tmp_path):
    """A pair is two rows of max_seq_length at most; the better answer is what is scored."""
    model, tok = lk.attach(lk.load_model(tiny_dir, dtype="float32")), lk.load_tokenizer(tiny_dir)
    pairs = [{"prompt": "p" * 90, "chosen": "b" * 50, "rejected": "c" * 50}] * 3
    config = lk.TrainConfig(
        str(tmp_path), max_steps=2, objective="dpo", packing=True, max_seq_length=64,
        per_device_train_batch_size=1, eval_metrics=["exact_match"],
    )  # fmt: skip
    short = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    result = lk.train(model, tok, {"train": pairs, "validation": short}, config)
    assert result.steps == 2
    assert result.evaluations[-1]["exact_match"] == 0


def test_long_pairs_are_counted_as_rows(tiny_dir, caplog):
    tok = lk.load_tokenizer(tiny_dir)
    rows = lk.read_rows([{"prompt": "p" * 90, "chosen": "b", "rejected": "c"}] * 2)
    lk.encode_rows(rows, tok, max_seq_length=60)
    assert "2 of 2 rows are longer than max_seq_length=60" in caplog.text


@pytest.mark.parametrize("chats", [False, True])
def test_a_pair_that_is_cut_keeps_one_prompt(tiny_dir, chats):
    """As little of it as the longer answer leaves room for; of chats the same exchanges."""
    tok = lk.load_tokenizer(tiny_dir)
    if chats:
        turns = [{"role": "user", "content": "a" * 9}, {"role": "assistant", "content": "b" * 9}]
        user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "c" * 9}
        worse = {"role": "assistant", "content": "d" * 30}
        row = {"prompt": [*turns, *turns, user], "chosen": [answer], "rejected": [worse]}
    else:
        prompt = "".join(chr(97 + i % 26) for i in range(30))
        row = {"prompt": prompt, "chosen": "x" * 5, "rejected": "y" * 25}
    limit = 60 if chats else 40
    [example] = lk.encode_rows(lk.read_rows([row]), tok, max_seq_length=limit)
    chosen, rejected = (
        [t for t, label in zip(each.input_ids, each.labels, strict=True) if label == -100]
        for each in (example.chosen, example.rejected)
    )
    assert chosen == rejected
    assert len(example.rejected.input_ids) <= limit
    assert len(chosen) > 5
    assert example.chosen.labels[-2:] == [tok.encode("c" if chats else "x")[-1], tok.eos_token_id]


def test_padding_of_pairs(tiny_dir, tmp_path):
    """Both answers of a pair are rows of the batch, each as long as the longest."""
    tok = lk.load_tokenizer(tiny_dir)
    model = lk.attach(lk.load_model(tiny_dir, dtype="float32"), lk.LoraConfig(r=4))
    pairs = [{"prompt": "ab", "chosen": "x" * 5, "rejected": "y" * 40}] * 4
    config = lk.TrainConfig(str(tmp_path), max_steps=1, objective="dpo")
    lk.train(model, tok, pairs, config)
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    short, long = 3 + 5 + 1, 3 + 40 + 1  # <s> and the end token
    assert json.loads(line)["padding"] == pytest.approx(1 - (short + long) / (2 * long))


@pytest.mark.parametrize("answer", [None, 3, True, {"role": "assistant", "content": "x"}])
@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_an_answer_that_is_none(name, answer):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"} | {name: answer}
    with pytest.raises(lk.LorakitError, match=f"row 0: {name} must be text or messages, not"):
        lk.read_rows([row])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "orpo", "label_smoothing_factor": 0.1}, "orpo does not know it"),
        ({"objective": "orpo", "z_loss": 0.1}, "z_loss is of sft alone"),
        ({"objective": "dpo", "z_loss": 0.1}, "z_loss is of sft alone"),
        ({"objective": "dpo", "label_smoothing_factor": 0.7}, r"must be in \[0, 0\.5\)"),
    ],
)
def test_options_that_an_objective_does_not_have(options, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.TrainConfig(**options)
