"""KTO against TRL on the same logits, and against fp64 on a model."""

import json
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers
from lorakit.data.encode import Example, JudgedExample
from lorakit.training.losses.batch import collated, summed_loss
from lorakit.training.losses.unpaired import mismatched
from tests.conftest import ROWS
from tests.training.runs import JUDGED, PAIRS, run

B, T, V = 5, 11, 17
GOOD = torch.tensor([True, False, False, True, False])


@pytest.mark.parametrize("form", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("labels", [GOOD, torch.ones(B, dtype=torch.bool)])
@pytest.mark.parametrize("ahead", [0.0, 3.0])
def test_kto_is_trls(form, labels, ahead):
    """TRL's own loss, from the logits of a policy and a reference; z is 0 in one case."""
    from trl.trainer.kto_trainer import KTOTrainer

    torch.manual_seed(0)
    ids, mask = torch.randint(V, (B, T)), torch.arange(T) >= 4
    policy, reference, others, theirs = torch.randn(4, B, T, V, dtype=torch.float64) * 3

    def log_p(logits):
        return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask[1:]

    def model(labels, **_):
        return SimpleNamespace(
            log_probs=log_p(policy), entropy=log_p(policy), mean_logits=log_p(policy)
        )

    def same(x):
        return x

    divergence = (log_p(others) - log_p(theirs)).sum(1).mean() + ahead
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), calculate_KL=form == "kto", loss_type=form,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=same), beta=0.3, **weights,
        aux_loss_enabled=False, precompute_ref_logps=True, _metrics={"eval": defaultdict(list)},
        _compute_kl_logps=lambda model, batch: log_p(others).sum(1) + ahead, _total_train_tokens=0,
    )  # fmt: skip
    inputs = {
        "input_ids": ids, "completion_mask": mask.long().expand(B, T), "label": labels,
        "attention_mask": torch.ones_like(ids), "ref_logps": log_p(reference).sum(1),
        "ref_KL_logps": log_p(theirs).sum(1),
    }  # fmt: skip
    expected = KTOTrainer._compute_loss(trainer, model, inputs, False)
    z = divergence.clamp(min=0) if form == "kto" else 0.0
    ours = lk.kto_loss(
        log_p(policy).sum(1), log_p(reference).sum(1), labels, divergence=z, beta=0.3, **weights
    )
    assert abs(expected - ours.mean()) <= 1e-12 * expected  # fp64 sums in another order


@given(
    prompts=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    longest=st.integers(7, 12),
    data=st.data(),
)
def test_each_prompt_gets_the_completion_of_the_row_before(prompts, longest, data):
    """TRL cycles them so: the first one gets that of the last."""
    rows = []
    for i, n in enumerate(prompts):
        size = data.draw(st.integers(1, 6))
        ids = [10 * i + 1] * n + [10 * i + 2] * size
        rows.append(Example(ids, [-100] * n + ids[n:]))
    found = mismatched(rows, longest)
    for i, (n, example) in enumerate(zip(prompts, found, strict=True)):
        before = rows[i - 1].input_ids[prompts[i - 1] :]
        assert example.input_ids == ([10 * i + 1] * n + before)[:longest]
        assert example.labels == ([-100] * n + before)[:longest]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("form", ["kto", "apo_zero_unpaired"])
def test_kto_on_a_model(tiny_dir, packing, form):
    """The truth is the model's own logits with the adapter on and off, in fp64."""
    model = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8))
    reference = lk.Reference(model)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, 0, 0.1)
    rows = []
    for n, size, good in ((3, 5, True), (4, 2, False), (2, 6, False)):
        ids = torch.randint(3, 300, (n + size,)).tolist()
        rows.append(JudgedExample(Example(ids, [-100] * n + ids[n:]), good))

    def log_p(example):
        ids, n = torch.tensor([example.input_ids]), example.labels.count(-100)
        logits = model(ids).double()[0, :-1].log_softmax(-1)
        return logits.gather(-1, ids[0, 1:, None])[n - 1 :].sum()

    def ratios(examples):
        with torch.no_grad():
            policy = torch.stack([log_p(each) for each in examples])
            with reference.in_place():
                return policy - torch.stack([log_p(each) for each in examples])

    good = torch.tensor([each.desirable for each in rows])
    answers = [each.answer for each in rows]
    z = ratios(mismatched(answers, 64)).mean().clamp(min=0) if form == "kto" else 0.0
    ahead = torch.where(good, ratios(answers) - z, z - ratios(answers))
    truth = (1 - (0.3 * ahead).sigmoid()) * torch.where(good, 2.0, 0.5)
    weights = {"desirable_weight": 2.0, "undesirable_weight": 0.5}
    config = lk.TrainConfig(
        objective="kto", loss_type=form, beta=0.3, packing=packing, max_seq_length=64, **weights
    )
    loss, right = summed_loss(model, collated(model, rows, config), config, reference)
    # fp32 sums of a few log-probabilities of some 6 nats
    assert abs(loss - truth.sum()) <= 1e-5
    assert right == (ahead > 0).sum()
    loss.backward()
    assert all(layer.lora_B.grad.abs().max() > 0 for layer in lora_layers(model).values())


def test_the_first_loss_is_a_half(tiny_dir):
    """The model is its own reference before the first step, whatever dropout does to z."""
    model = lk.attach(
        lk.load_model(tiny_dir, dtype="float32"), lk.LoraConfig(r=4, lora_dropout=0.5)
    ).train()
    reference = lk.Reference(model)
    rows = [
        JudgedExample(Example([5, 6, 7, 8], [-100, -100, 7, 8]), good) for good in (True, False)
    ]
    config = lk.TrainConfig(objective="kto")
    loss, _ = summed_loss(model, collated(model, rows, config), config, reference)
    assert loss == 1.0  # B is zero, so that dropout changes nothing


def test_a_run_learns_which_answers_are_good(tiny_dir, tok, tmp_path):
    """Most log-ratios lie on the side of z that the label says, after a few passes."""
    options = {"objective": "kto", "learning_rate": 3e-2, "max_steps": 12, "eval_steps": 12}
    data = {"train": JUDGED[:16], "validation": JUDGED[:16]}
    model, result = run(tiny_dir, tok, tmp_path, data, **options)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert steps[0]["loss"] == 0.5
    assert result.evaluations[-1].keys() >= {"loss", "preference_accuracy", "rows"}
    assert result.evaluations[-1]["loss"] < 0.45
    assert result.evaluations[-1]["preference_accuracy"] >= 0.75
    for objective, rows in (("sft", JUDGED), ("dpo", JUDGED), ("kto", ROWS), ("kto", PAIRS)):
        with pytest.raises(lk.LorakitError, match=f"objective '{objective}' does not fit the tr"):
            lk.train(model, tok, rows, lk.TrainConfig(str(tmp_path / "b"), objective=objective))


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    given = [-torch.rand(5, dtype=torch.float64, requires_grad=True) * 3 for _ in range(2)]
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}

    def loss(completions, reference):
        return lk.kto_loss(completions, reference, GOOD, divergence=0.4, beta=0.3, **weights)

    assert torch.autograd.gradcheck(loss, given)


def test_bad_beta():
    one = torch.zeros(1)
    with pytest.raises(lk.LorakitError, match="beta must be positive"):
        lk.kto_loss(one, one, one > 0, beta=0.0)
