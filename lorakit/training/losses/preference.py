"""Learning from pairs of a better (chosen) and a worse (rejected) completion: DPO and ORPO.

With log p(y), the log-probability of a completion under the model, summed over its tokens:

    DPO  (arXiv:2305.18290)   r(y) = beta (log p(y) - log p_ref(y))
                              loss = -log sigmoid(r(chosen) - r(rejected))

The reference model is the same model with its adapter switched off: no second copy, one forward
pass more, without gradients. Label smoothing e supposes that a share e of the pairs is the wrong
way round: loss = -(1 - e) log sigmoid(d) - e log sigmoid(-d) (Mitchell 2023, "conservative DPO").

    ORPO (arXiv:2403.07691)   odds(y) = p / (1 - p), log p the mean over the tokens of y
                              loss = nll(chosen) - beta log sigmoid(log odds(chosen)
                                                                    - log odds(rejected))

needs no reference: it adds preference to plain training on the chosen ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.adapters.manage import disable_adapters
from lorakit.config.errors import LorakitError
from lorakit.models.decoder import Decoder


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of each pair [B], from the summed log-probabilities [B] of its completions. Raises
    LorakitError for a beta that is not positive or a label_smoothing outside of [0, 0.5).
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
    """What ORPO adds to the loss of each pair [B], from the log-probabilities [B] of its
    completions, each the mean over the tokens. Raises LorakitError for a beta that is not positive.
    """
    _check_beta(beta)
    odds = chosen - rejected - (_log_of_rest(chosen) - _log_of_rest(rejected))
    return -beta * F.logsigmoid(odds)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise LorakitError(f"beta must be positive, not {beta}")


def _log_of_rest(log_p: Tensor) -> Tensor:
    """log(1 - p). Near p = 1 the difference is small: expm1 keeps its digits. p = 1 counts as the
    number below it, lest the gradient be infinite.
    """
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
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
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of each pair [B], and whether the model prefers the chosen one, bool [B].

    input_ids, labels: int64 [2 B, T], the chosen completions first, padded on the right; or with
        cu_seqlens [2 B + 1] packed into one row. objective: "dpo" or "orpo".
    """
    found, counts = model.row_losses(input_ids, labels, cu_seqlens=cu_seqlens)
    chosen, rejected = (-found).chunk(2)
    if objective == "dpo":
        with torch.no_grad(), disable_adapters(model):
            training = model.training
            model.eval()
            reference, _ = model.row_losses(input_ids, labels, cu_seqlens=cu_seqlens)
            model.train(training)
        better, worse = (-reference).chunk(2)
        options = {"beta": beta, "label_smoothing": label_smoothing}
        losses = dpo_loss(chosen, rejected, better, worse, **options)
        return losses, chosen - better > rejected - worse
    lengths = counts.clamp(min=1).chunk(2)
    chosen, rejected = chosen / lengths[0], rejected / lengths[1]
    return -chosen + orpo_loss(chosen, rejected, beta=beta), chosen > rejected
