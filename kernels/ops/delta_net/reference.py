"""The delta rule in plain torch, chunk by chunk; autograd keeps all that a chunk makes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens
EPS = 1e-6  # added to the sums of squares of q and k


def gated_delta_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    lengths: Sequence[int] | None,
    with_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return o [B, T, nv, dv] in v's dtype, and the last state in fp32 if that is asked for."""
    (B, T, nv, dv), dk = v.shape, q.shape[3]
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    q, k, v, g, beta = (x.to(wide).transpose(1, 2) for x in (q, k, v, g, beta))
    q, k = _normalized(q) * dk**-0.5, _normalized(k)
    q, k = (x.repeat_interleave(nv // x.shape[1], dim=1) for x in (q, k))
    start = v.new_zeros(B, nv, dk, dv) if state is None else state.detach().to(wide)
    documents = [T] if lengths is None else list(lengths)
    parts = zip(*(x.split(documents, dim=2) for x in (q, k, v, g, beta)), strict=True)
    found = [_document(part, start) for part in parts]
    out = torch.cat([o for o, _ in found], dim=2)
    return out.transpose(1, 2).to(dtype), found[-1][1].detach() if with_state else None


def _normalized(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt()


def _document(tokens: Sequence[Tensor], S: Tensor) -> tuple[Tensor, Tensor]:
    """Go through one document from the state S [B, H, dk, dv]: o [B, H, T, dv] and the new S.

    Args:
        tokens: q, k, v, g and beta, [B, H, T, ..]. The document is filled up to whole chunks by
            tokens whose beta and g are 0; they change nothing.
        S: the state before it.
    """
    T = tokens[0].shape[2]
    if T == 0:
        return tokens[2], S
    C = min(CHUNK, T)
    filled = [F.pad(x, (0, 0) * (x.dim() - 3) + (0, -T % C)).contiguous() for x in tokens]
    out = []
    for chunk in zip(*(x.split(C, dim=2) for x in filled), strict=True):
        o, S = _chunk(chunk, S)
        out.append(o)
    return torch.cat(out, dim=2)[:, :, :T], S


def _chunk(tokens: Sequence[Tensor], S: Tensor) -> tuple[Tensor, Tensor]:
    """Return o [B, H, C, dv] and the next S, in the letters of __init__.py."""
    q, k, v, g, beta = tokens
    beta, L = beta[..., None], g.double().cumsum(-1)
    later = torch.ones(L.shape[-1], L.shape[-1], dtype=torch.bool, device=L.device).triu(1)
    P = (L[..., :, None] - L[..., None, :]).masked_fill(later, -torch.inf).to(g.dtype).exp()
    decayed = L.to(g.dtype).exp()[..., None]
    rest = (L[..., -1:] - L).to(g.dtype).exp()[..., None]
    A = (beta * k @ k.mT) * P  # its diagonal is not read
    U, W = (
        torch.linalg.solve_triangular(A, x, upper=False, unitriangular=True)
        for x in (beta * v, beta * decayed * k)
    )
    N = U - W @ S
    o = decayed * (q @ S) + ((q @ k.mT) * P) @ N
    return o, S * decayed[..., -1:, :] + (rest * k).mT @ N
