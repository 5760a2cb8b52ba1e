"""GRPO and its relatives against TRL's own loss on the same log-probabilities."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import lorakit as lk
from lorakit.training.losses.grpo import divisor

B, T, LONGEST = 6, 9, 12
LENGTHS = torch.tensor([9, 4, 1, 7, 0, 5])
MASK = torch.arange(T) < LENGTHS[:, None]
TYPES = ["grpo", "dr_grpo", "dapo", "cispo", "gspo"]


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    logps = -torch.rand(B, T) * 3
    return logps, logps + torch.randn(B, T) * 0.4, torch.randn(B), logps + torch.randn(B, T)


def trls(loss_type, beta, logps, old, advantages, reference):
    """Return TRL's loss of one step without accumulation."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    def same(x):
        return x

    def told(*_, **__):
        return logps, torch.zeros(B, T), None

    level = "sequence" if loss_type == "gspo" else "token"
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=told, aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level=level, beta=beta,
        loss_type="grpo" if loss_type == "gspo" else loss_type, epsilon_low=0.2,
        epsilon_high=1.3 if loss_type == "cispo" else 0.3, use_vllm=False,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST, _entropy_bonus_enabled=False, tools=None,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=same, reduce=lambda x, **_: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1),
        "completion_ids": torch.zeros(B, T), "completion_mask": MASK.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference,
        "num_items_in_batch": MASK.sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", TYPES)
def test_losses_are_trls(tensors, loss_type, beta):
    """Value and gradient agree but for the order of fp32 sums; one completion has no token."""
    start, old, advantages, reference = tensors
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    found = lk.grpo_loss(
        ours, old, advantages, MASK, loss_type=loss_type, epsilon=0.2, highest=1.3, beta=beta,
        reference_logps=reference if beta else None,
    )  # fmt: skip
    loss = found.losses.sum() / divisor(loss_type, B, int(MASK.sum()), LONGEST)
    truth = trls(loss_type, beta, theirs, old, advantages, reference)
    loss.backward()
    truth.backward()
    assert abs(loss - truth) <= 1e-6 * max(1, abs(truth))
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-7)
    assert found.clipped.any()
    assert not found.clipped[~MASK].any()


@pytest.mark.parametrize("loss_type", TYPES)
def test_gradients_in_fp64(tensors, loss_type):
    """Finite differences agree, where no ratio lies at a bend of the clipping."""
    start, old, advantages, reference = (t.double() for t in tensors)
    beta, options = 0.2, {"loss_type": loss_type, "epsilon": 0.2, "highest": 1.3}

    def loss(logps):
        given = {"beta": beta, "reference_logps": reference, **options}
        return lk.grpo_loss(logps, old, advantages, MASK, **given).losses

    if loss_type == "cispo":  # its weights have no gradient, which finite differences would see
        [found] = torch.autograd.grad(loss(start.requires_grad_()).sum(), start)
        ratio = (start - old).exp().clamp(max=1.3)
        pull = 1 - (reference - start).exp()
        truth = (-ratio * advantages[:, None] + beta * pull) * MASK
        torch.testing.assert_close(found, truth.detach())
    else:
        assert torch.autograd.gradcheck(loss, (start.requires_grad_(),))


def test_the_ratio_of_the_first_step_is_one(tensors):
    """Then the gradient is that of plain policy gradient: minus the advantage of each token."""
    logps = tensors[0].clone().requires_grad_()
    found = lk.grpo_loss(logps, logps.detach(), tensors[2], MASK)
    found.losses.sum().backward()
    assert torch.equal(logps.grad, -tensors[2][:, None] * MASK)
    assert not found.clipped.any()


def test_what_is_refused(tensors):
    logps, old, advantages, _ = tensors
    with pytest.raises(lk.LorakitError, match="loss_type is 'dappo' .did you mean 'dapo'"):
        lk.grpo_loss(logps, old, advantages, MASK, loss_type="dappo")
    with pytest.raises(lk.LorakitError, match="beta needs the log-probabilities of the reference"):
        lk.grpo_loss(logps, old, advantages, MASK, beta=0.1)
