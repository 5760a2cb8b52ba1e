"""The losses of pairs of a better (chosen) and a worse (rejected) completion.

log p(y) is the log-probability of a completion under the model, summed over its tokens.

    DPO  (arXiv:2305.18290)   r(y) = log p(y) - log p_ref(y),  d = r(chosen) - r(rejected)
                              loss = -log sigmoid(beta d)

p_ref is the model as it was before the first step (reference.py). There r = 0 for every y, so the
loss of the first step is log 2, unless dropout or noise on the embeddings makes the model another
than it is. The reference costs one more forward pass, without gradients. The other forms of DPO:

    sigmoid with a share e of     -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)
    pairs the wrong way round     (Mitchell 2023, "conservative DPO")
    robust  (arXiv:2403.00409)    the same, but the second term is added, and all divided by 1 - 2 e
    hinge   (arXiv:2305.10425)    max(0, 1 - beta d)
    ipo     (arXiv:2310.12036)    (d - 1 / (2 beta))^2, r(y) the mean over the tokens of y
    apo_zero (arXiv:2408.06266)   sigmoid(-beta r(chosen)) + sigmoid(beta r(rejected))
    apo_down                      sigmoid(beta r(chosen)) + sigmoid(-beta d)

These need no reference:

    ORPO (arXiv:2403.07691)   odds(y) = p / (1 - p), where log p is the mean over the tokens of y
                              loss = nll(chosen) - beta log sigmoid(log odds(chosen)
                                                                    - log odds(rejected))
    CPO  (arXiv:2401.08417)   loss = nll(chosen) - log sigmoid(beta d), r(y) = log p(y); or with
                              hinge or ipo, as above
    SimPO (arXiv:2405.14734)  loss = -log sigmoid(beta d - gamma), r(y) the mean of log p over the
                              tokens of y

ORPO and CPO add preference to plain training on the chosen completions, whose nll is the mean over
the tokens of each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit import kernels
from lorakit.config.errors import LorakitError, nearest
from lorakit.config.objectives import LOSS_TYPES, PAIRS, SMOOTHED, Objective
from lorakit.models.decoder import Decoder
from lorakit.training.losses.reference import Reference, losses_of_reference


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> Tensor:
    """Return the DPO loss of each pair (arXiv:2305.18290).

    Args:
        chosen: The log-probabilities of the better completions, [B]: the sums over their tokens, of
            loss_type "ipo" the means.
        rejected: Those of the worse completions, [B].
        reference_chosen: Those of the better completions under the reference model, [B].
        reference_rejected: Those of the worse completions under the reference model, [B].
        beta: How strongly the model is held to the reference, above 0.
        label_smoothing: The share of pairs supposed to be the wrong way round, in [0, 0.5), for
            "sigmoid" and "robust".
        loss_type: "sigmoid", "hinge", "ipo", "robust", "apo_zero" or "apo_down"; the head of this
            file has the formulas.

    Returns:
        The losses, [B].

    Raises:
        LorakitError: beta or label_smoothing is out of its range, or DPO has no such loss_type.
    """
    _check("dpo", beta, label_smoothing, loss_type)
    better, worse = chosen - reference_chosen, rejected - reference_rejected
    if loss_type == "apo_zero":
        return torch.sigmoid(-beta * better) + torch.sigmoid(beta * worse)
    if loss_type == "apo_down":
        return torch.sigmoid(beta * better) + torch.sigmoid(beta * (worse - better))
    return _of_margin(better - worse, beta, label_smoothing, loss_type)


def cpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> Tensor:
    """Return what CPO adds to the loss of each pair (arXiv:2401.08417).

    Args:
        chosen: The log-probabilities of the better completions, [B]: the sums over their tokens, of
            loss_type "ipo" the means.
        rejected: Those of the worse completions, [B].
        beta: The strength of the preference, above 0.
        label_smoothing: The share of pairs supposed to be the wrong way round, in [0, 0.5), for
            "sigmoid".
        loss_type: "sigmoid", "hinge" or "ipo".

    Returns:
        The losses, [B], without those of plain training.

    Raises:
        LorakitError: beta or label_smoothing is out of its range, or CPO has no such loss_type.
    """
    _check("cpo", beta, label_smoothing, loss_type)
    return _of_margin(chosen - rejected, beta, label_smoothing, loss_type)


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the SimPO loss of each pair (arXiv:2405.14734).

    Args:
        chosen: The log-probabilities of the better completions, the mean over their tokens, [B].
        rejected: Those of the worse completions, [B].
        beta: The strength of the preference, above 0.
        gamma: The margin by which the better one is to be ahead.
        label_smoothing: The share of pairs supposed to be the wrong way round, in [0, 0.5).

    Returns:
        The losses, [B].

    Raises:
        LorakitError: beta or label_smoothing is out of its range.
    """
    _check("simpo", beta, label_smoothing)
    return _smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def orpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """Return what ORPO adds to the loss of each pair (arXiv:2403.07691).

    Args:
        chosen: The log-probabilities of the better completions, the mean over their tokens, [B].
        rejected: Those of the worse completions, [B].
        beta: The weight of the preference, above 0 (lambda in the paper).

    Returns:
        The losses, [B], without those of plain training.

    Raises:
        LorakitError: beta is not positive.
    """
    _check("orpo", beta)
    odds = chosen - rejected - (_log_of_rest(chosen) - _log_of_rest(rejected))
    return -beta * F.logsigmoid(odds)


def _check(
    objective: Objective, beta: float, label_smoothing: float = 0.0, loss_type: str | None = None
) -> None:
    """Raise LorakitError unless a loss can be computed with these settings."""
    if not beta > 0:
        raise LorakitError(f"beta must be positive, not {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise LorakitError(
            f"label_smoothing is {label_smoothing}; for pairs it must be in [0, 0.5)"
        )
    if loss_type is None:
        return
    forms = LOSS_TYPES[objective]
    if loss_type not in forms:
        raise LorakitError(
            f"loss_type is {loss_type!r}{nearest(loss_type, forms)}; {objective} has "
            f"{', '.join(forms)}"
        )
    if label_smoothing and loss_type not in SMOOTHED:
        raise LorakitError(f"label_smoothing does not go with loss_type {loss_type}")


def _check_objective(objective: str) -> None:
    if objective not in PAIRS:
        raise LorakitError(
            f"objective is {objective!r}{nearest(objective, PAIRS)}; of pairs there are "
            f"{', '.join(PAIRS)}"
        )


def _of_margin(margin: Tensor, beta: float, label_smoothing: float, loss_type: str) -> Tensor:
    """Return the losses of pairs by how far the better completion is ahead."""
    if loss_type == "hinge":
        return torch.relu(1 - beta * margin)
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)).square()
    if loss_type == "robust":
        right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
        likely = 1 - label_smoothing
        return (label_smoothing * wrong - likely * right) / (likely - label_smoothing)
    return _smoothed(beta * margin, label_smoothing)


def _smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    wrong = label_smoothing * F.logsigmoid(-margin)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - wrong


def _log_of_rest(log_p: Tensor) -> Tensor:
    """Return log(1 - p).

    Near p = 1 the difference is small, and expm1 keeps its digits. p = 1 counts as the number below
    it, so that the gradient stays finite.
    """
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    # -log 2, from which on expm1 is the better one (Maechler 2012, "log1mexp")
    return torch.where(
        log_p > -0.6931, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p))
    )


def pair_losses(
    model: Decoder,
    input_ids: Tensor,
    labels: Tensor,
    *,
    objective: str,
    beta: float,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    gamma: float = 0.5,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reference: Reference | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of each pair, and whether the model prefers the chosen completion.

    Args:
        model: The model.
        input_ids: int64 [2 B, T], the chosen completions first, padded on the right; or [1, T] with
            cu_seqlens, packed into one row.
        labels: The same shape, -100 where a token is not learned.
        objective: "dpo", "orpo", "cpo" or "simpo".
        beta: As `dpo_loss` and the others take it.
        label_smoothing: As `dpo_loss` and the others take it.
        loss_type: As `dpo_loss` and `cpo_loss` take it.
        gamma: As `simpo_loss` takes it.
        attention_mask: bool [2 B, T], false at padding. Only a model whose rotary embedding depends
            on the length of a row needs it.
        cu_seqlens: int [2 B + 1], where each completion starts and the last one ends, if packed.
        reference: The reference of DPO, made of `model` before its first step. None means the model
            with its adapter switched off: that is the same only for a LoRA whose B is still zero.

    Returns:
        The losses [B], and bool [B].

    Raises:
        LorakitError: A setting is out of its range, or there is no such objective or loss_type.
    """
    _check_objective(objective)
    rows = {"attention_mask": attention_mask, "cu_seqlens": cu_seqlens}
    before = None
    if objective == "dpo":  # first, before the graph of the policy takes memory
        before = losses_of_reference(model, reference, input_ids, labels, rows)
    found, counts = model.row_losses(input_ids, labels, **rows)
    if loss_type == "ipo" or objective in ("orpo", "simpo"):
        found = _mean(found, counts)
        before = None if before is None else _mean(before, counts)
    chosen, rejected = (-found).chunk(2)
    options = {"beta": beta, "label_smoothing": label_smoothing}
    if before is not None:
        better, worse = (-before).chunk(2)
        losses = dpo_loss(chosen, rejected, better, worse, **options, loss_type=loss_type)
        return losses, chosen - better > rejected - worse
    if objective == "simpo":
        return simpo_loss(chosen, rejected, **options, gamma=gamma), chosen > rejected
    if objective == "orpo":
        return -chosen + orpo_loss(chosen, rejected, beta=beta), chosen > rejected
    learned = chosen if loss_type == "ipo" else _mean(chosen, counts.chunk(2)[0])
    losses = cpo_loss(chosen, rejected, **options, loss_type=loss_type) - learned
    return losses, chosen > rejected


def _mean(summed: Tensor, counts: Tensor) -> Tensor:
    """Return sums over the tokens of rows as means; the counts come from host memory."""
    return summed / kernels.dispatch.sent(counts.clamp(min=1), summed.device)
