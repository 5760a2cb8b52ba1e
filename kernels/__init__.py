"""The ops of lorakit: one folder per op, with its maths, a torch reference and faster backends.

Every op here is one public function that picks its backend by the tensor's device (see `dispatch`).
Importing this package has no side effects: no library is loaded and no GPU is touched until an op
runs.
"""

from .adamw import adamw_step
from .attention import attention
from .cross_entropy import cross_entropy, linear_cross_entropy
from .decode import DecodeCache, DecodeLayer, DecodePlan, decode_compiled, decode_step
from .dispatch import use_backend
from .lora_linear import lora_linear
from .nf4 import NF4Tensor, dequantize_nf4, nf4_linear, quantize_nf4
from .rms_norm import rms_norm
from .rope import rope
from .swiglu import geglu, swiglu

__all__ = [
    "DecodeCache",
    "DecodeLayer",
    "DecodePlan",
    "NF4Tensor",
    "adamw_step",
    "attention",
    "cross_entropy",
    "decode_compiled",
    "decode_step",
    "dequantize_nf4",
    "geglu",
    "linear_cross_entropy",
    "lora_linear",
    "nf4_linear",
    "quantize_nf4",
    "rms_norm",
    "rope",
    "swiglu",
    "use_backend",
]
