"""The ops of lorakit, each a public function that picks its backend by the tensor's device.

`ops/` has a folder for each op, with its maths, a torch reference and faster backends; dispatch.py
picks among them. To import this package has no side effects: no library is loaded and no GPU is
touched until an op runs.
"""

from .dispatch import use_backend
from .ops.adamw import Moment8bit, adamw_step, adamw_step_8bit
from .ops.adamw.clipped import AdamWGroup, AdamWRow, ClippedAdamW
from .ops.attention import attention, attention_kernel
from .ops.attention.documents import Documents, PaddedDocuments
from .ops.causal_conv import causal_conv
from .ops.cross_entropy import (
    cross_entropy,
    labelled,
    linear_cross_entropy,
    token_cross_entropy,
)
from .ops.decode import (
    DecodeCache,
    DecodeLayer,
    DecodePlace,
    DecodePlan,
    DecodeUpdate,
    decode_compiled,
    decode_step,
)
from .ops.delta_net import gated_delta_net
from .ops.dropout import seeded_dropout
from .ops.experts import expert_mlp, takes_experts
from .ops.experts.layers import ExpertLayers
from .ops.float8 import Float8Linear, Float8Weight
from .ops.frozen_linear import frozen_linear
from .ops.frozen_linear.dense import Packed, dequantize, dequantize_rows
from .ops.gguf_blocks import dequantize_blocks, quantize_blocks
from .ops.int8 import Int8Tensor, dequantize_int8, quantize_int8
from .ops.lora_linear import LoraWeights, lora_linear, lora_mlp, lora_qkv, lora_room, lora_row_norms
from .ops.lora_linear.spans import LoraSpan, SpanWeights, lora_spans
from .ops.lora_linear.straight_through import QuantizedWeight, straight_through_linear
from .ops.muon import muon_step
from .ops.nf4 import NF4Tensor, dequantize_nf4, quantize_fp4, quantize_nf4
from .ops.rms_norm import add_rms_norm, rms_norm
from .ops.rope import norm_rope, rope
from .ops.swiglu import gated, gated_backward_, geglu, swiglu

__all__ = [
    "AdamWGroup",
    "AdamWRow",
    "ClippedAdamW",
    "DecodeCache",
    "DecodeLayer",
    "DecodePlace",
    "DecodePlan",
    "DecodeUpdate",
    "Documents",
    "ExpertLayers",
    "Float8Linear",
    "Float8Weight",
    "Int8Tensor",
    "LoraSpan",
    "LoraWeights",
    "Moment8bit",
    "NF4Tensor",
    "Packed",
    "PaddedDocuments",
    "QuantizedWeight",
    "SpanWeights",
    "adamw_step",
    "adamw_step_8bit",
    "add_rms_norm",
    "attention",
    "attention_kernel",
    "causal_conv",
    "cross_entropy",
    "decode_compiled",
    "decode_step",
    "dequantize",
    "dequantize_blocks",
    "dequantize_int8",
    "dequantize_nf4",
    "dequantize_rows",
    "expert_mlp",
    "frozen_linear",
    "gated",
    "gated_backward_",
    "gated_delta_net",
    "geglu",
    "labelled",
    "linear_cross_entropy",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "lora_room",
    "lora_row_norms",
    "lora_spans",
    "muon_step",
    "norm_rope",
    "quantize_blocks",
    "quantize_fp4",
    "quantize_int8",
    "quantize_nf4",
    "rms_norm",
    "rope",
    "seeded_dropout",
    "straight_through_linear",
    "swiglu",
    "takes_experts",
    "token_cross_entropy",
    "use_backend",
]
