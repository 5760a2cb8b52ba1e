"""How an adapter starts: A [r, in] and B [out, r] of one layer, as fp32 tensors.

Some initializations need nothing but shapes. The product B A is zero at first, so an attached
adapter changes nothing yet; only False differs:

    True          A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0      as nn.Linear starts its weight
    "gaussian"    A ~ N(0, 1/r^2), B = 0                     the deviation is 1/r, as in PEFT
    "orthogonal"  Q [r, r] orthogonal, its even rows E, its odd rows O [r/2, r]:
                  A = E^T G / 10, B = H O / 10, G and H normal. B A = H (O E^T) G / 100 = 0, and
                  both train from the first step
    False         A and B as nn.Linear starts both: B A is noise, for tests

Others start from the weight W [out, in] itself: s B A is a part of W, and training moves that part.
The layer keeps W - s B A, so it computes what it did before:

    "pissa"          W = U S V^T;  A = sqrt(S_r / s) V_r^T, B = U_r sqrt(S_r / s): s B A is the best
                     approximation of W of rank r (arXiv:2404.02948)
    "pissa_niter_N"  nearly that, from N subspace iterations with r vectors: it takes products with
                     W instead of its whole decomposition
    "olora"          W = Q R;  A = the first r rows of R, B = the first r columns of Q
                     (arXiv:2406.01775). Note that s B A grows with s

"loftq" and "eva" start as True does. Their own modules fill them in, from the error of a
quantization and from data.

`subspace_svd` is a truncated decomposition from products with W and small QR factorizations only.
LoftQ and EVA use it too. Each iteration multiplies the weight of a direction by (S_i / S_j)^2. So a
gap in the spectrum is found at once. A flat spectrum is never quite found, but what is then missed
was not much better than what was found.
"""

import math

import torch
from torch import Tensor

from lorakit.config.adapters import check_initialization
from lorakit.config.errors import LorakitError


def needs_weight(kind: bool | str) -> bool:
    """Return whether `kind` starts from a part of the weight (see `from_weight`).

    Any other kind starts from the layer's shape alone (see `initial`).
    """
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
    """Return A [r, in_features] and B [out_features, r] for a kind that needs no weight.

    Both are fp32 on `device`. `generator` draws the random numbers, and must be of that device;
    None means torch's global one. Raises LorakitError for an unknown kind, one that needs the
    weight, or an odd r with "orthogonal".
    """
    check_initialization(kind)
    if needs_weight(kind):
        raise LorakitError(f"init_lora_weights {kind!r} starts from the weight of the layer")
    if kind == "orthogonal":
        return _orthogonal(in_features, out_features, r, device, generator)
    A = torch.empty(r, in_features, dtype=torch.float32, device=device)
    B = torch.zeros(out_features, r, dtype=torch.float32, device=device)
    if kind == "gaussian":
        return A.normal_(0, 1 / r, generator=generator), B
    bound = 1 / math.sqrt(in_features)
    A.uniform_(-bound, bound, generator=generator)
    if kind is False:
        bound = 1 / math.sqrt(r)
        B.uniform_(-bound, bound, generator=generator)
    return A, B


def _orthogonal(
    in_features: int,
    out_features: int,
    r: int,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Return A and B whose product is zero although neither of them is."""
    if r % 2:
        raise LorakitError(f"init_lora_weights 'orthogonal' needs an even r, not {r}")

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=torch.float32, device=device, generator=generator)

    Q = torch.linalg.qr(normal(r, r)).Q
    A = (normal(in_features, r // 2) @ Q[0::2]).t() / 10
    B = normal(r // 2, out_features).t() @ Q[1::2] / 10
    return A.contiguous(), B


@torch.no_grad()
def from_weight(
    kind: str, W: Tensor, r: int, scaling: float, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r] for a kind that takes scaling * B A out of W [out, in].

    W may have any floating dtype. Both are computed in fp32 on its device. `generator` draws the
    vectors that "pissa_niter_N" starts from; None means torch's global one.

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
    """Return U [m, rank], S [rank] and V^T [rank, n] of nearly the best approximation of W [m, n].

    They are in the dtype of W, fp32 or fp64. The method is subspace iteration with `width` >= rank
    vectors (arXiv:0909.4061, algorithms 4.4 and 5.1). Where `width` spans all of W, the
    decomposition is exact.
    """
    if width >= min(W.shape):
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        return U[:, :rank], S[:rank], Vt[:rank]
    if W.shape[0] < W.shape[1]:  # the vectors are drawn on the small side
        V, S, Ut = subspace_svd(
            W.t(), rank, width=width, iterations=iterations, generator=generator
        )
        return Ut.t(), S, V.t()
    start = torch.randn(W.shape[1], width, dtype=W.dtype, device=W.device, generator=generator)
    Q = torch.linalg.qr(W @ start).Q  # [m, width]: W times random vectors, orthonormal
    for _ in range(iterations):
        Q = torch.linalg.qr(W.t() @ Q).Q
        Q = torch.linalg.qr(W @ Q).Q
    U, S, Vt = torch.linalg.svd(Q.t() @ W, full_matrices=False)  # [width, n]
    return Q @ U[:, :rank], S[:rank], Vt[:rank]
