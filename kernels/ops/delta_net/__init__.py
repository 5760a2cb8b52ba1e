"""The gated delta rule, a memory that is written to and corrected token by token.

    q = q / |q| dk^-0.5        k = k / |k|        |x|^2 = sum x^2 + 1e-6
    S_t = e^g_t S_(t-1) + k_t d_t^T        d_t = beta_t (v_t - (e^g_t S_(t-1))^T k_t)
    o_t = S_t^T q_t

S [dk, dv] belongs to a value head and begins with zeros, or with the state of the call before. A
key head serves nv / nk consecutive value heads. Packed documents (`lengths`) begin with zeros
each, and none computes with another's tokens. All of it is in fp32, whatever the inputs are.

Tokens are taken in chunks, as in arXiv:2412.06464, section 3.3. L is the running sum of g in a
chunk, P_ij = e^(L_i - L_j) for j <= i and 0 elsewhere. No decay above 1 is ever computed:

    A = 1 + strictly lower part of (beta k k^T) P        U = A^-1 (beta v)
    W = A^-1 (beta e^L k)                                N = U - W S
    o = e^L q S + (q k^T P) N        S = e^L_last S + (e^(L_last - L) k)^T N

A backend chooses its own chunks: 64 tokens in the reference, 32 in the kernels. They begin at a
document's first token. L is summed in fp64: where a gate of -60 stands beside gates near 0, its
rounding in fp32 would be in the differences of all tokens that follow.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor

from ... import dispatch
from ..causal_conv import check_documents
from . import cpu

WIDEST = 128  # dk of the Triton kernels: a strip of a wider state would spill registers


@overload
def gated_delta_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    with_state: Literal[False] = False,
) -> Tensor: ...


@overload
def gated_delta_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    lengths: None = None,
    with_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def gated_delta_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    with_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Read and correct a memory token by token, by the gated delta rule (arXiv:2412.06464).

    Differentiable in q, k, v, g and beta; the states have no gradient.

    Args:
        q: the queries [B, T, nk, dk], any floating-point dtype; they are normalized here.
        k: the keys [B, T, nk, dk]; they are normalized here.
        v: the values [B, T, nv, dv]; nv is a multiple of nk.
        g: the logarithms of the decays, fp32 [B, T, nv], at most 0.
        beta: how far each token corrects the memory, [B, T, nv].
        state: S before the first token, fp32 [B, nv, dk, dv]. None for zeros.
        lengths: the tokens of each document packed along T, B == 1. `PaddedDocuments` of a CUDA
            graph are those of the moment in the Triton kernels, and the host's in the others.
        with_state: also return S after the last token of each row; not of packed documents.

    Returns:
        o [B, T, nv, dv] in v's dtype, and with `with_state` the state, fp32 [B, nv, dk, dv].

    Raises:
        ValueError: shapes do not go together, the lengths do not add up to T, or there are
            lengths beside a state.
    """
    _check(q, k, v, g, beta)
    check_documents(q, state, lengths)
    if lengths is not None and with_state:
        raise ValueError("packed documents have no common state; call without lengths to get one")
    if dispatch.traces():
        return dispatch.traced().gated_delta_net(q, k, v, g, beta, state, lengths, with_state)
    o, last = _module(q, k, v).gated_delta_net(q, k, v, g, beta, state, lengths, with_state)
    return (o, last) if with_state else o


def kernel(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Name what `gated_delta_net` runs on such tensors: "cpu", "triton" or "reference"."""
    fits, tiles = cpu.fits(q, k, v), _fits_tiles(q, k, v)
    return dispatch.backend(__package__, q.device, cpu=fits, triton=tiles).__name__.split(".")[-1]


def _module(q: Tensor, k: Tensor, v: Tensor) -> ModuleType:
    """Return the module of this folder that takes the operands; passes.py is that of a GPU."""
    found = kernel(q, k, v)
    return importlib.import_module(f".{'passes' if found == 'triton' else found}", __package__)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    nk, nv = q.shape[2], v.shape[2]
    gates = g.shape == beta.shape == v.shape[:3]
    if q.shape != k.shape or v.shape[:2] != q.shape[:2] or nv % nk or not gates:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v, g, beta))
        raise ValueError(f"the shapes of q, k, v, g and beta do not go together: {shapes}")


def _fits_tiles(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether the kernels of triton.py take the operands; their products need sm_80."""
    half = q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    if not half or not v.numel() or q.shape[3] > WIDEST:
        return False
    return dispatch.compiles_to() == "amdgcn" or dispatch.capability(q.device) >= (8, 0)
