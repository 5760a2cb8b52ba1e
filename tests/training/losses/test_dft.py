"""Dynamic fine-tuning against TRL on the same logits, against finite differences, and as a run."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import lorakit as lk
from lorakit import kernels
from lorakit.adapters.layers.lora import lora_layers
from tests.conftest import ROWS
from tests.training.runs import adapted, run

IDS = torch.arange(36).view(3, 12) * 5 % 300
LABELS = IDS.masked_fill(torch.arange(12) < 4, -100)


@pytest.fixture(scope="module")
def logits():
    torch.manual_seed(0)
    return torch.randn(2, 9, 40) * 3


@pytest.fixture(scope="module")
def labels():
    torch.manual_seed(1)
    return torch.randint(40, (2, 9)).masked_fill(torch.rand(2, 9) < 0.3, -100)


def trls(logits, labels):
    """TRL's own loss of logits and labels [B, T], divided by 7."""
    from trl.trainer.sft_trainer import SFTTrainer

    mask = labels != -100

    def model(**_):  # as TRL's fused head returns it: zero where there is no label
        found = logits.log_softmax(-1).gather(-1, labels.where(mask, 0)[..., None])[..., 0] * mask
        unused = dict.fromkeys(("entropy", "is_top1"), found)  # of its log
        return SimpleNamespace(log_probs=found, label_mask=mask, **unused)

    def same(x):
        return x

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), aux_loss_enabled=False, compute_loss_func=None,
        label_smoother=None, _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
        accelerator=SimpleNamespace(parallelism_config=None, gather_for_metrics=same),
        args=SimpleNamespace(loss_type="dft", average_tokens_across_devices=False),
    )  # fmt: skip
    return SFTTrainer.compute_loss(trainer, model, {"labels": labels}, num_items_in_batch=7)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("fused", [False, True])
def test_dft_is_trls(logits, labels, backend, fused):
    """The loss and its gradient, of logits and of a head whose hidden states they are."""
    exact, ours = logits.double().requires_grad_(), logits.clone().requires_grad_()
    theirs = trls(exact, labels)
    theirs.backward()
    with kernels.use_backend(backend):
        if fused:
            head = torch.eye(logits.shape[-1])
            loss, count = kernels.linear_cross_entropy(ours, head, labels, dft=True)
        else:
            loss, count = kernels.cross_entropy(ours, labels, dft=True)
        (loss / 7).backward()
    assert count == (labels != -100).sum()
    # fp32: some roundings of 2^-24 of logits up to 10
    assert abs(loss / 7 - theirs) <= 1e-5 * theirs
    assert (ours.grad - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()


def test_gradient_is_the_finite_difference_with_a_constant_weight(logits, labels):
    """(f(z + h) - f(z - h)) / 2h in fp64, f being the sum of p nll(z) with the p of before."""
    counted = labels != -100
    z, y = logits.double()[counted], labels[counted]

    def nll(z):
        return -z.log_softmax(-1).gather(-1, y[:, None])[:, 0]

    weight = (-nll(z)).exp()
    truth, h = torch.zeros_like(z), 1e-5
    for i in range(z.shape[-1]):
        step = torch.zeros(z.shape[-1], dtype=torch.float64)
        step[i] = h
        truth[:, i] = weight * (nll(z + step) - nll(z - step)) / (2 * h)
    leaf = logits[counted].clone().requires_grad_()
    kernels.cross_entropy(leaf, y, dft=True)[0].backward()
    # h^2 of the difference is 1e-10; the rest are fp32 roundings of logits up to 10
    assert (leaf.grad - truth).abs().max() <= 3e-6


@pytest.mark.parametrize("packed", [False, True])
def test_dft_on_a_model(tiny_dir, packed):
    """The truth is the model's logits; packed or padded, and with another way to the head."""
    model = adapted(tiny_dir)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, 0, 0.1)
    logits = model(IDS)[:, :-1].double()
    found = logits.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0][:, 3:]
    truth = -(found.exp() * found).sum()
    batch = {"input_ids": IDS, "labels": LABELS}
    if packed:
        batch = {name: x.reshape(1, -1) for name, x in batch.items()}
        batch["cu_seqlens"] = torch.arange(0, 37, 12)
    loss, count = model.loss(**batch, dft=True)
    assert count == found.numel()
    assert abs(loss - truth) <= 1e-5 * truth  # fp32 sums over 300 words
    if not packed:  # a hook on the head leaves the fused loss
        head = model.lm_head or model.model.embed_tokens
        head.register_forward_hook(lambda *_: None)
        again, _ = model.loss(**batch, dft=True)
        assert abs(again - truth) <= 1e-5 * truth


def test_a_run_of_dft_is_the_same_in_parts(tiny_dir, tok, tmp_path):
    """Micro-batches of 2 and 8 rows, padded and packed; its evaluation is that of any run."""
    options = {"max_steps": 2, "loss_type": "dft"}
    losses = []
    for i, more in enumerate(
        [
            {"per_device_train_batch_size": 8},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "packing": True},
        ]
    ):
        data = {"train": ROWS[:8], "validation": ROWS[:3]}
        model, result = run(tiny_dir, tok, tmp_path / str(i), data, **options, **more)
        losses.append(result.loss)
        evaluated = lk.evaluate(model, tok, ROWS[:3])
        assert result.evaluations[-1]["loss"] == pytest.approx(evaluated["loss"], rel=1e-6)
        assert result.loss < evaluated["loss"]  # each token of it weighs less than 1
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)  # fp32 sums in another order
