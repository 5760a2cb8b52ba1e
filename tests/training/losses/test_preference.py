"""The losses of pairs against TRL on the same logits, and against fp64 on a model."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers
from lorakit.config.objectives import LOSS_TYPES

B, T, V = 3, 11, 17


@pytest.fixture(scope="module")
def logits():
    """Return those of a policy and its reference, [2 B, T, V] each."""
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


FORMS = dict.fromkeys(LOSS_TYPES["dpo"], 0.0) | {"sigmoid": 0.2, "robust": 0.2}


@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize(("form", "smoothing"), [("sigmoid", 0.0), ("robust", 0.0), *FORMS.items()])
def test_dpo_is_trls(logits, ids, mask, beta, form, smoothing):
    """TRL's own loss, from the logits of a policy and a reference.

    TRL ignores label smoothing with sigmoid; there the truth is its cDPO, as CPO has it.
    """
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer

    policy, reference = (each.double() for each in logits)

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
        f_divergence_type="reverse_kl", loss_types=[form], loss_weights=[1.0], beta=beta,
        label_smoothing=smoothing, use_weighting=False, args=SimpleNamespace(),
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    chosen, rejected = summed(policy, ids, mask).chunk(2)
    better, worse = summed(reference, ids, mask).chunk(2)
    pairs = [chosen, rejected, better, worse]
    if form == "ipo":
        pairs = [each / n for each, n in zip(pairs, [*mask.sum(1).chunk(2)] * 2, strict=True)]
    options = {"beta": beta, "label_smoothing": smoothing}
    ours = lk.dpo_loss(*pairs, **options, loss_type=form)
    inputs = {
        "input_ids": ids, "completion_mask": mask.long(), "attention_mask": torch.ones_like(ids),
        "ref_chosen_logps": better, "ref_rejected_logps": worse,
    }  # fmt: skip
    theirs = DPOTrainer._compute_loss(trainer, model, inputs, False)
    if form == "sigmoid" and smoothing:
        trainer = SimpleNamespace(
            alpha=0.0, loss_type="sigmoid", **options, accelerator=SimpleNamespace(device="cpu")
        )
        theirs = CPOTrainer.cpo_loss(trainer, chosen - better, rejected - worse)[0].mean()
    assert abs(theirs - ours.mean()) <= 1e-12 * ours.mean().abs()  # fp64 sums in another order


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


@pytest.mark.parametrize("beta", [0.05, 2.0])
@pytest.mark.parametrize(
    ("form", "smoothing"),
    [
        ("sigmoid", 0.0),
        ("sigmoid", 0.2),
        ("hinge", 0.0),
        ("ipo", 0.0),
        ("simpo", 0.0),
        ("simpo", 0.2),
    ],
)
def test_cpo_and_simpo_are_trls(logits, ids, mask, beta, form, smoothing):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    found = summed(logits[0].double(), ids, mask)
    if form in ("ipo", "simpo"):  # as TRL has it too (average_log_prob)
        found = found / mask[:, 1:].sum(1)
    options = {"beta": beta, "label_smoothing": smoothing}
    trainer = SimpleNamespace(
        alpha=0.0, loss_type=form, simpo_gamma=0.7, **options,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs, *_ = CPOTrainer.cpo_loss(trainer, *found.chunk(2))
    if form == "simpo":
        ours = lk.simpo_loss(*found.chunk(2), **options, gamma=0.7)
    else:
        ours = lk.cpo_loss(*found.chunk(2), **options, loss_type=form)
    assert torch.allclose(ours, theirs, rtol=1e-12)  # fp64 sums in another order


@given(
    values=st.lists(st.floats(-200, 0), min_size=4, max_size=4),
    form=st.sampled_from(LOSS_TYPES["dpo"]),
    beta=st.floats(0.01, 5),
)
def test_every_form_has_a_finite_gradient(values, form, beta):
    """It moves the better completion up and the worse one down, or not at all; apo_down both."""
    pairs = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    smoothing = 0.1 if form == "robust" else 0.0
    options = {"beta": beta, "label_smoothing": smoothing, "loss_type": form}
    lk.dpo_loss(*pairs.split(1), **options).sum().backward()
    assert torch.isfinite(pairs.grad).all()
    if form in ("sigmoid", "hinge", "apo_zero"):
        assert pairs.grad[0] <= 0 <= pairs.grad[1]


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_orpo_is_trls(logits, ids, mask, beta):
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    policy, _ = logits
    mean = summed(policy, ids, mask) / mask[:, 1:].sum(1)
    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    theirs, *_ = ORPOTrainer.odds_ratio_loss(trainer, *mean.chunk(2))
    ours = lk.orpo_loss(*mean.chunk(2), beta=beta)
    # TRL subtracts it; the logarithm of fp32 odds is taken in another way
    assert torch.allclose(ours, -theirs, rtol=1e-5)


OPTIONS = {
    **{f"dpo {form}": (lk.dpo_loss, 4, {"loss_type": form}) for form in LOSS_TYPES["dpo"]},
    **{f"cpo {form}": (lk.cpo_loss, 2, {"loss_type": form}) for form in LOSS_TYPES["cpo"]},
    "dpo robust": (lk.dpo_loss, 4, {"loss_type": "robust", "label_smoothing": 0.2}),
    "simpo": (lk.simpo_loss, 2, {"gamma": 0.7, "label_smoothing": 0.2}),
    "orpo": (lk.orpo_loss, 2, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_finite_differences(name):
    loss, count, options = OPTIONS[name]
    torch.manual_seed(0)
    given = [-torch.rand(5, dtype=torch.float64) * 3 for _ in range(count)]
    given = [each.requires_grad_() for each in given]
    assert torch.autograd.gradcheck(lambda *pairs: loss(*pairs, beta=0.3, **options), given)


def test_orpo_near_certainty_is_finite():
    log_p = torch.tensor([0.0, -1e-9, -1e-3, -50.0], requires_grad=True)
    losses = lk.orpo_loss(log_p, log_p.detach().flip(0))
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(log_p.grad).all()


@pytest.mark.parametrize(
    ("objective", "form"),
    [("dpo", None), ("dpo", "ipo"), ("dpo", "apo_zero"), ("orpo", None), ("cpo", None),
     ("cpo", "ipo"), ("simpo", None)],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_pairs_on_a_model(tiny_dir, objective, form, packed):
    """The truth is the model's logits with the adapter on and off; packed or padded the same."""
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
    mean, worst = chosen / 5, rejected / 5
    prefers = mean > worst
    if objective == "dpo":
        up, down = chosen - better, rejected - worse
        truth, prefers = F.softplus(-0.3 * (up - down)), up > down
        if form == "apo_zero":
            truth = (-0.3 * up).sigmoid() + (0.3 * down).sigmoid()
        elif form == "ipo":
            truth = ((up - down) / 5 - 1 / 0.6).square()
    elif objective == "simpo":
        truth = F.softplus(0.7 - 0.3 * (mean - worst))
    elif objective == "cpo":
        apart = F.softplus(-0.3 * (chosen - rejected))
        truth = -mean + ((mean - worst - 1 / 0.6).square() if form else apart)
    else:
        odds = [(p.exp() / (1 - p.exp())).log() for p in (mean, worst)]
        truth = -mean + 0.3 * F.softplus(odds[1] - odds[0])
    batch = {"input_ids": ids, "labels": labels}
    if packed:
        batch = {name: x.reshape(1, -1) for name, x in batch.items()}
        batch["cu_seqlens"] = torch.arange(0, 37, 9)
    form = {} if form is None else {"loss_type": form}
    options = {"objective": objective, "beta": 0.3, "gamma": 0.7} | form
    losses, found = lk.pair_losses(model, **batch, **options)
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
    with pytest.raises(lk.LorakitError, match="loss_type is 'hing' \\(did you mean 'hinge'"):
        lk.dpo_loss(one, one, one, one, loss_type="hing")
    with pytest.raises(lk.LorakitError, match="cpo has sigmoid, hinge, ipo"):
        lk.cpo_loss(one, one, loss_type="apo_zero")
    with pytest.raises(lk.LorakitError, match="does not go with loss_type ipo"):
        lk.cpo_loss(one, one, loss_type="ipo", label_smoothing=0.1)
    with pytest.raises(lk.LorakitError, match="objective is 'kto'; of pairs there are dpo, orpo"):
        lk.pair_losses(None, one, one, objective="kto", beta=0.1)
