"""Muon: steps of matrices in the direction that has all singular values near 1.

The maths
---------
With the gradient G of a matrix W [M, N], momentum b, rate lr and decay wd (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon):

    B = b B + (1 - b) G                      the running mean; zeros before the first step
    U = b B + (1 - b) G                      Nesterov's look ahead
    W = (1 - lr wd) W - 0.2 sqrt(max(M, N)) lr O(U)

O(U) is U with its singular values moved near to 1: five steps of X <- a X + (b' A + c A A) X with
A = X X^T, from X = U over its Frobenius norm. The quintic grows small singular values fast, and
leaves those that were 0.01 or more between 0.68 and 1.13, which is near enough.

The factor 0.2 sqrt(max(M, N)) gives a step the root mean square that AdamW's have, so that both
take one learning rate and one weight decay (Moonlight, arXiv:2502.16982, section 2.2).

The trade-off
-------------
The state is one number a value where AdamW has two. Of a matrix with M <= N the products are
10 M N (2 M + M^2 / N) operations a step; forward and backward of T tokens are 6 T M N. So they
cost little in steps of many tokens. On a GPU they are in bf16, as the quintic allows; on a CPU in
fp32, where bf16 is no faster. One matrix after another is computed: what this takes is a few times
the largest one.
"""

from torch import Tensor

from . import reference


def muon_step(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    remainders: list[Tensor] | None = None,
) -> None:
    """Update matrices and their momentum in place by one step of Muon (arXiv:2502.16982).

    Args:
        params: the matrices W [M, N], of any floating-point dtype and strides.
        grads: their gradients G.
        momenta: their running means B, fp32 or wider; zeros before the first step.
        lr: the learning rate, that of AdamW beside it.
        momentum: b, the decay rate of B.
        weight_decay: wd, the share of W that lr times it takes away.
        remainders: what bf16 matrices leave out of fp32, int16 of their shapes; zeros before the
            first step. None rounds matrices to their dtype.
    """
    for i, (p, grad, mean) in enumerate(zip(params, grads, momenta, strict=True)):
        remainder = None if remainders is None else remainders[i]
        reference.muon_step(p, grad, mean, remainder, lr, momentum, weight_decay)
