"""How an adapter starts: the A [r, in] and B [out, r] of one layer, as fp32 tensors.

With nothing but shapes the product B A is zero, so that an attached adapter changes nothing yet:

    True          A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0      LoRA, as nn.Linear starts
    "gaussian"    A ~ N(0, 1/r^2), B = 0                     the deviation is 1/r, as PEFT has it
    "orthogonal"  Q [r, r] orthogonal, its even rows E, its odd rows O [r/2, r]:
                  A = E^T G / 10, B = H O / 10, G and H normal. B A = H (O E^T) G / 100 = 0, and
                  both train from the first step
    False         A and B as nn.Linear starts both: B A is noise, for tests

From the weight W [out, in] itself, s B A being a part of W that training starts from. The layer
keeps W - s B A, so it computes what it did before:

    "pissa"          W = U S V^T;  A = sqrt(S_r / s) V_r^T, B = U_r sqrt(S_r / s): s B A is the best
                     approximation of W of rank r (arXiv:2404.02948)
    "pissa_niter_N"  the same from N subspace iterations with r vectors: products with W instead of
                     its whole decomposition, and a little less than the best
    "olora"          W = Q R;  A = the first r rows of R, B = the first r columns of Q
                     (arXiv:2406.01775). Note that s B A grows with s

"loftq" and "eva" start as True does: their own modules fill them in from a quantization's error
and from data.

`subspace_svd` is the one truncated decomposition of the library: products with W and small QR
factorizations only. Each iteration multiplies the weight of a direction by (S_i / S_j)^2: a gap in
the spectrum is found at once, a flat one never quite, but what is then missed was not much better.
"""

import math

import torch
from torch import Tensor

from lorakit.config.adapters import check_initialization
from lorakit.config.errors import LorakitError


def needs_weight(kind: bool | str) -> bool:
    """Whether `kind` starts from the weight of the layer (`from_weight`) and takes a part of it,
    or from its shape alone (`initial`)."""
    return isinstance(kind, str) and kind.startswith(("pissa", "olora"))


def initial(
    kind: bool | str,
    in_features: int,
    out_features: int,
    r: int,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A [r, in_features] and B [out_features, r], fp32 on `device`, for a kind that needs no
    weight. `generator` (of the same device) draws them; None: torch's global one.

    Raises LorakitError for an unknown kind, one that needs the weight, or an odd r with
    "orthogonal".
    """
    check_initialization(kind)
    if needs_weight(kind):
        raise LorakitError(f"init_lora_weights {kind!r} starts from the weight of the layer")

    fp32 = {"dtype": torch.float32, "device": device}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, **fp32, generator=generator)

    if kind == "orthogonal":
        if r % 2:
            raise LorakitError(f"init_lora_weights 'orthogonal' needs an even r, not {r}")
        Q = torch.linalg.qr(normal(r, r)).Q
        A = (normal(in_features, r // 2) @ Q[0::2]).t() / 10
        B = normal(r // 2, out_features).t() @ Q[1::2] / 10
        return A.contiguous(), B
    A, B = torch.empty(r, in_features, **fp32), torch.zeros(out_features, r, **fp32)
    if kind == "gaussian":
        return A.normal_(0, 1 / r, generator=generator), B
    bound = 1 / math.sqrt(in_features)
    A.uniform_(-bound, bound, generator=generator)
    if kind is False:
        bound = 1 / math.sqrt(r)
        B.uniform_(-bound, bound, generator=generator)
    return A, B


@torch.no_grad()
def from_weight(
    kind: str, W: Tensor, r: int, scaling: float, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], fp32, for a kind that takes scaling * B A out of W [out, in].

    W may have any floating dtype; all is computed in fp32 on its device. `generator` draws what
    "pissa_niter_N" starts its iterations from; None: torch's global one.

    Raises LorakitError for a kind that needs no weight, an r beyond the rank of W, a scaling that
    is not positive, and a W that is no matrix or not finite.
    """
    check_initialization(kind)
    if not needs_weight(kind):
        raise LorakitError(f"init_lora_weights {kind!r} does not start from the weight")
    if W.dim() != 2:
        raise LorakitError(f"init_lora_weights {kind!r}: W must be a matrix, not {tuple(W.shape)}")
    if not 1 <= r <= min(W.shape):
        raise LorakitError(
            f"init_lora_weights {kind!r}: r is {r}, and a weight of {tuple(W.shape)} has rank "
            f"{min(W.shape)} at most"
        )
    if not (math.isfinite(scaling) and scaling > 0):
        raise LorakitError(
            f"init_lora_weights {kind!r}: the scaling must be positive, not {scaling}"
        )
    W = W.float()
    if not torch.isfinite(W).all():
        raise LorakitError(f"init_lora_weights {kind!r}: the weight holds NaN or infinite values")
    if kind == "olora":
        Q, R = torch.linalg.qr(W)
        return R[:r].clone(), Q[:, :r].clone()
    if kind == "pissa":
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        U, S, Vt = U[:, :r], S[:r], Vt[:r]
    else:
        iterations = int(kind.removeprefix("pissa_niter_"))
        U, S, Vt = subspace_svd(W, r, width=r, iterations=iterations, generator=generator)
    root = (S / scaling).sqrt()
    return root[:, None] * Vt, U * root


def subspace_svd(
    W: Tensor,
    rank: int,
    *,
    width: int,
    iterations: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, rank], S [rank], V^T [rank, n] of nearly the best approximation of W [m, n], in its
    dtype (fp32 or fp64), by subspace iteration with `width` >= rank vectors (arXiv:0909.4061,
    algorithms 4.4 and 5.1). Where `width` is all of W it is the exact decomposition.
    """
    if width >= min(W.shape):
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        return U[:, :rank], S[:rank], Vt[:rank]
    if W.shape[0] < W.shape[1]:  # the small side is where the vectors are drawn
        V, S, Ut = subspace_svd(
            W.t(), rank, width=width, iterations=iterations, generator=generator
        )
        return Ut.t(), S, V.t()
    start = torch.randn(W.shape[1], width, dtype=W.dtype, device=W.device, generator=generator)
    Q = torch.linalg.qr(W @ start).Q  # [m, width]: a basis of what W makes of random vectors
    for _ in range(iterations):
        Q = torch.linalg.qr(W.t() @ Q).Q
        Q = torch.linalg.qr(W @ Q).Q
    U, S, Vt = torch.linalg.svd(Q.t() @ W, full_matrices=False)  # [width, n]
    return Q @ U[:, :rank], S[:rank], Vt[:rank]
