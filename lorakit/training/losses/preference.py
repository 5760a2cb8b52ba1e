"""The losses of pairs of a better (chosen) and a worse (rejected) completion: DPO and ORPO.

log p(y) is the log-probability of a completion under the model, summed over its tokens.

    DPO  (arXiv:2305.18290)   r(y) = beta (log p(y) - log p_ref(y))
                              loss = -log sigmoid(r(chosen) - r(rejected))

p_ref is the model as it was before the first step (reference.py). There r = 0 for every y, so the
loss of the first step is log 2, unless dropout or noise on the embeddings makes the model another
than it is. The reference costs one more forward pass, without gradients. Label smoothing e supposes
that a share e of the pairs is the wrong way round:

    loss = -(1 - e) log sigmoid(d) - e log sigmoid(-d),  d = r(chosen) - r(rejected)

(Mitchell 2023, "conservative DPO").

    ORPO (arXiv:2403.07691)   odds(y) = p / (1 - p), where log p is the mean over the tokens of y
                              loss = nll(chosen) - beta log sigmoid(log odds(chosen)
                                                                    - log odds(rejected))

ORPO needs no reference. It adds preference to plain training on the chosen completions.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit import kernels
from lorakit.adapters.manage import disable_adapters
from lorakit.config.errors import LorakitError
from lorakit.models.decoder import Decoder
from lorakit.training.losses.reference import Reference


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the DPO loss of each pair (arXiv:2305.18290).

    Args:
        chosen: The summed log-probabilities of the better completions, [B].
        rejected: Those of the worse completions, [B].
        reference_chosen: Those of the better completions under the reference model, [B].
        reference_rejected: Those of the worse completions under the reference model, [B].
        beta: How strongly the model is held to the reference, above 0.
        label_smoothing: The share of pairs supposed to be the wrong way round, in [0, 0.5).

    Returns:
        The losses, [B].

    Raises:
        LorakitError: beta or label_smoothing is out of its range.
    """
    _check_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise LorakitError(
            f"label_smoothing is {label_smoothing}; for pairs it must be in [0, 0.5)"
        )
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    wrong = label_smoothing * F.logsigmoid(-margin)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - wrong


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
    _check_beta(beta)
    odds = chosen - rejected - (_log_of_rest(chosen) - _log_of_rest(rejected))
    return -beta * F.logsigmoid(odds)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise LorakitError(f"beta must be positive, not {beta}")


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
        objective: "dpo" or "orpo".
        beta: As `dpo_loss` and `orpo_loss` take it.
        label_smoothing: As `dpo_loss` takes it.
        attention_mask: bool [2 B, T], false at padding. Only a model whose rotary embedding depends
            on the length of a row needs it.
        cu_seqlens: int [2 B + 1], where each completion starts and the last one ends, if packed.
        reference: The reference of DPO, made of `model` before its first step. None means the model
            with its adapter switched off: that is the same only for a LoRA whose B is still zero.

    Returns:
        The losses [B], and bool [B].

    Raises:
        LorakitError: beta or label_smoothing is out of its range.
    """
    rows = {"attention_mask": attention_mask, "cu_seqlens": cu_seqlens}
    if objective == "dpo":  # first, before the graph of the policy takes memory
        before = _reference_losses(model, reference, input_ids, labels, rows)
        better, worse = (-before).chunk(2)
    found, counts = model.row_losses(input_ids, labels, **rows)
    chosen, rejected = (-found).chunk(2)
    if objective == "dpo":
        options = {"beta": beta, "label_smoothing": label_smoothing}
        losses = dpo_loss(chosen, rejected, better, worse, **options)
        return losses, chosen - better > rejected - worse
    # counted where the labels lie, which is host memory
    lengths = kernels.dispatch.sent(counts.clamp(min=1), found.device).chunk(2)
    chosen, rejected = chosen / lengths[0], rejected / lengths[1]
    return -chosen + orpo_loss(chosen, rejected, beta=beta), chosen > rejected


@torch.no_grad()
def _reference_losses(
    model: Decoder,
    reference: Reference | None,
    input_ids: Tensor,
    labels: Tensor,
    rows: Mapping[str, Tensor | None],
) -> Tensor:
    """Return the summed loss of each row under the reference, [2 B], in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        with disable_adapters(model) if reference is None else reference.in_place():
            return model.row_losses(input_ids, labels, **rows)[0]
    finally:
        model.train(was_training)
