"""The ops as operators of torch.library, which tracers can follow.

torch.compile, torch.export, FakeTensorMode and make_fx follow tensors through operators of torch.
They see neither what a C++ function does to the memory behind an address nor what a Triton kernel
does. So an op has a second form here, an operator `torch.ops.lorakit.NAME`, with

    a schema     tensors, numbers and strings alone; packed weights are taken apart (packed.py)
    a run        the public function of the op, which picks the backend when the graph runs
    a fake run   shapes, dtypes and devices of the results, without values
    a gradient   made of such operators too

`dispatch.traces` tells the public functions that something traces. Then they call what has their
name here. Otherwise nothing of this is imported or called: the dispatcher would take longer than
some kernels do.

The trade-off: an operator is a box that no compiler looks into. Nothing is fused with it, and its
results are new, contiguous tensors. Some backwards compute their forward a second time
(`library.recomputed`): a graph keeps tensors, and what else an op knows does not pass through it. A
graph is differentiated once.
"""

from .attention import attention
from .delta_net import causal_conv, gated_delta_net
from .linear import dequantize_nf4, dequantize_nf4_rows, frozen_linear
from .lora import lora_mlp, lora_qkv
from .losses import cross_entropy, linear_cross_entropy
from .rows import add_rms_norm, gated, norm_rope, rms_norm, rope

__all__ = [
    "add_rms_norm",
    "attention",
    "causal_conv",
    "cross_entropy",
    "dequantize_nf4",
    "dequantize_nf4_rows",
    "frozen_linear",
    "gated",
    "gated_delta_net",
    "linear_cross_entropy",
    "lora_mlp",
    "lora_qkv",
    "norm_rope",
    "rms_norm",
    "rope",
]
