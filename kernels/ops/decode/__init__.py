"""One decoding step: a new token per row through a whole dense decoder, in one call.

The maths
---------
For token ids [B] and a cache of earlier keys and values, with the norm of a row
n(x) = (weight + offset) x / sqrt(mean(x^2) + eps), where offset is 0 or, for Gemma, 1:

    x = embedding[ids] * embedding_scale
    for each layer:
        q, k, v = n(x) Wq^T, n(x) Wk^T, n(x) Wv^T             + biases, if any
        q, k    = rotate(n(q)), rotate(n(k))                  n, per head, if the family has it
        cache[position] = k, v                                rounded to the cache's dtype
        s_t     = c tanh(scale <q, k_t> / c)                  without c no tanh; for the positions
                                                              up to its own, in the window
        x      += (sum_t softmax(s)_t v_t) Wo^T
        x      += (act(n(x) Wgate^T) * (n(x) Wup^T)) Wdown^T
    logits = c tanh(n(x) head^T / c)

Each product W x may have an update of the row's own adapter (arXiv:2106.09685), W x + scale B A x.
A sandwich layer (Gemma 2 and 3) also takes the norm of what attention and the MLP add to x. Keys
are stored rotated, so that rows with the same beginning may read the same ones.

Weights are fp32 or bf16 and widened exactly; everything else is fp32. Matrices may be packed in 4
bits or in 8, embedding and head too: a row is multiplied as it is packed, without rounding. The new
keys and values are the only activations that are rounded: when they are stored, and attention reads
them rounded.

Memory layout
-------------
    embedding, head             [V, H]      the layout of model files: an output is one row
    keys, values                [pages, size, Hk, D]        a row's position p in slot p % size of
                                                            page table[p // size]
    cos, sin                    fp32 [B, D / 2], half-split pairs (see rope)

Nothing is packed again or copied: a plan holds pointers to the model's own tensors. A page holds
`size` positions, a power of two. Every row has a table of its pages, or two: layers with a window
may have their own. Pages that a window has left behind are not looked at.

The trade-off
-------------
With one row, a step reads every weight once to use it once: its time is the weights' bytes over the
memory's bandwidth. A framework adds the launch of some 15 ops per layer, each of which waits for
the one before it. For a model of 135M parameters that costs more than the reading. The kernel runs
the layers inside one parallel region instead (cpu.cpp). The price is a second description of the
decoder, without training or hooks. It suits few rows: from a few dozen on, the products are worth a
matrix multiplication. Of an update, every thread computes all of A x, which is less work than to
wait for the others' shares.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import dispatch
from . import cpu, reference
from .operands import check_inputs, check_places
from .plan import DecodeCache, DecodeLayer, DecodePlace, DecodePlan, DecodeUpdate

__all__ = [
    "DecodeCache",
    "DecodeLayer",
    "DecodePlace",
    "DecodePlan",
    "DecodeUpdate",
    "decode_compiled",
    "decode_step",
]


def decode_compiled(device: torch.device) -> bool:
    """Return whether `decode_step` runs as compiled code on a device.

    Its reference is no faster than a model's own forward pass.

    Args:
        device: where the model lies.

    Returns:
        True if the C++ kernel runs there.
    """
    return dispatch.pick(device, "cpu") == "cpu"


def decode_step(
    plan: DecodePlan,
    ids: Tensor,
    tables: Sequence[tuple[Tensor, Tensor]],
    cache: DecodeCache,
    places: Sequence[DecodePlace],
    adapters: Sequence[int | None] | None = None,
) -> Tensor:
    """Take new tokens through a whole decoder, and compute the logits after the last one.

    Every row is at a position of its own. The cache gains the tokens' keys and values, in pages
    that are the row's own; rows may share pages of earlier positions. With T tokens a row (a
    prompt, or a piece of one) token t comes to position + t. One cache serves one step at a time.

    Args:
        plan: the model.
        ids: the tokens, int64 [B] or [B, T], contiguous.
        tables: cos and sin of the tokens' positions for each rope of the plan, fp32 [B, D / 2] or
            [B, T, D / 2], contiguous.
        cache: the keys and values of earlier tokens.
        places: for each row, the position of its first new token, and its pages.
        adapters: for each row, the number of its adapter in the plan, or None for the model alone;
            None for no adapters at all.

    Returns:
        The logits of the token after `ids`, fp32 [B, V].

    Raises:
        ValueError: an operand does not fit the plan; nothing has been written then.
    """
    B, T = len(ids), ids.shape[-1] if ids.dim() == 2 else 1
    rotations = check_inputs(plan, ids, tables)
    numbers = check_places(plan, B, T, cache, places, adapters)
    if dispatch.pick(plan.device, "cpu") == "reference":
        return reference.decode_tokens(plan, ids.view(B, T), tables, cache, places, adapters)
    return cpu.decode_step(plan.packed, ids, rotations, cache.contexts, numbers, plan.vocab_size)
