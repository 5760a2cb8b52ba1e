"""The line at the start of a run that says which kernels it uses, and why some are slow.

    kernels: cpu avx512
    kernels: triton; attention 128: flash
    kernels: triton; attention 64: reference, no kernel for sm_75
    kernels: triton; delta_net: reference, no kernel for heads of 128 in float32
    kernels: reference, the library of CPU kernels was not built

What comes first all ops take (norms, rotary embedding, linear layers, loss, optimizer). Ops that
take another kernel on this device follow. Each op is asked by its own rule.
"""

import torch

from lorakit import kernels
from lorakit.kernels import dispatch
from lorakit.kernels.ops import causal_conv, delta_net
from lorakit.models.decoder import Decoder
from lorakit.models.mlp import Experts


def kernel_line(model: Decoder, tokens: int, packed: bool) -> str:
    """Return the line for a model and rows of at most `tokens` tokens, packed documents or not."""
    picked = dispatch.pick(model.device, "cpu", "triton")
    parts = [_whole(picked, model.device), *_attention(model, picked, tokens, packed)]
    if any(model.config.linear_layers):
        parts += _linear_attention(model, picked)
    if picked == "triton":
        x = torch.empty(1, model.config.hidden_size, device=model.device, dtype=model.dtype)
        experts = (each for each in model.modules() if isinstance(each, Experts))
        if not all(each.together(x) for each in experts):
            parts.append(f"experts: one by one, {_why_not(model.device, 'such layers')}")
    return "kernels: " + "; ".join(parts)


def _whole(picked: str, device: torch.device) -> str:
    """Name the backend of the ops, and say why it is the reference if it is."""
    if picked == "cpu":
        return f"cpu {dispatch.isa()}"
    if picked == "triton":
        return "triton"
    if dispatch.forced() is not None:
        return "reference, by use_backend"
    if device.type == "cpu":
        return "reference, the library of CPU kernels was not built"
    if device.type == "cuda":
        return "reference, the package triton is not installed"
    return f"reference, there are none for {device.type}"


def _attention(model: Decoder, picked: str, tokens: int, packed: bool) -> list[str]:
    """Return what to say of the attention of each kind of layer, by the width of its heads."""
    config, said = model.config, list[str]()
    for layer in range(config.num_hidden_layers):
        if config.is_linear(layer):
            continue
        width = config.layer_head_dim(layer)
        q, k = (
            torch.empty(1, 1, heads, width, device=model.device, dtype=model.dtype)
            for heads in (config.num_attention_heads, config.layer_kv_heads(layer))
        )
        q, k = (x.expand(-1, tokens, -1, -1) for x in (q, k))  # no memory for so many
        found = kernels.attention_kernel(
            q,
            k,
            k,
            scale=config.attention_scale,
            softcap=config.attn_logit_softcapping,
            window=config.window(layer),
            packed=packed,
            sinks=config.attention_sinks,
        )
        if found == picked:
            continue
        if found == "reference":
            found += f", {_why_not(model.device, _heads(width, model.dtype))}"
        part = f"attention {width}: {found}"
        if part not in said:
            said.append(part)
    return said


def linear_kernels(model: Decoder) -> dict[str, str]:
    """Name what each op of linear attention runs in the model's dtype: "triton", "cpu", ..."""
    config = model.config
    x, v = (
        torch.empty(1, 1, 1, width, device=model.device, dtype=model.dtype)
        for width in (config.linear_key_head_dim, config.linear_value_head_dim)
    )
    weight = v.new_empty(v.shape[-1], config.linear_conv_kernel_dim)
    return {
        "causal_conv": causal_conv.kernel(v[0], weight),
        "delta_net": delta_net.kernel(x, x, v),
    }


def _linear_attention(model: Decoder, picked: str) -> list[str]:
    """Return what to say of the ops of linear attention."""
    operands = _heads(model.config.linear_key_head_dim, model.dtype)
    return [
        f"{name}: {found}, {_why_not(model.device, operands)}"
        for name, found in linear_kernels(model).items()
        if found != picked
    ]


def _heads(width: int, dtype: torch.dtype) -> str:
    return f"heads of {width} in {str(dtype).removeprefix('torch.')}"


def _why_not(device: torch.device, operands: str) -> str:
    """Say why a backend that is there has no kernel for `operands`."""
    if device.type != "cpu" and dispatch.compiles_to() == "ptx":
        major, minor = dispatch.capability(device)
        if major < 8:
            return f"no kernel for sm_{major}{minor}"
    return f"no kernel for {operands}"
