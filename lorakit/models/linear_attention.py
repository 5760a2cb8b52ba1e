"""Linear attention of a block: a gated delta net (arXiv:2412.06464) in attention's place.

    q, k, v = silu(causal_conv(in_proj_qkv(x)));   z = in_proj_z(x)
    beta = sigmoid(in_proj_b(x));                  g = -exp(A_log) softplus(in_proj_a(x) + dt_bias)
    o = gated_delta_net(q, k, v, g, beta)
    y = out_proj(rms_norm(o) * silu(z))

In place of keys and values, a row keeps a state of fixed size: a matrix S for each head of values,
and the last K - 1 inputs of the convolution. So memory and time for a token do not grow with the
row.

Parameter names are those of the published files. Qwen3-Next publishes the input layers as two,
in_proj_qkvz and in_proj_ba, whose rows are grouped by the heads of keys; they stay two.

A_log, dt_bias, the convolution and the norm stay in fp32 if the model is turned to 16 bits: they
are small, and the decay over a long row is a product of thousands of factors.

Shapes: B rows, T positions of this call, H hidden size, nk heads of queries and keys of width dk,
nv heads of values of width dv, C = 2 nk dk + nv dv channels of the convolution over K positions.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import kernels
from lorakit.models.adapted_layer import fused_weights
from lorakit.models.cache import States, Storage
from lorakit.models.config import ModelConfig
from lorakit.models.mlp import Adapted, Recipe
from lorakit.models.views import AttentionView


class _Wide(nn.Module):
    """A module whose own parameters are not rounded to 16 bits by `.to(dtype)`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)
        for name, exact in before.items():
            after = self._parameters[name]
            if after is not None and after.dtype.itemsize < exact.dtype.itemsize:
                after.data = exact.to(after.device)
        return self


class _Weight(_Wide):
    """The weight of the convolution [C, 1, K], or of the norm [dv], under its published name."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


class LinearAttention(_Wide):
    """A gated delta net, which stands in a block as attention does."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.eps = layer, config.rms_norm_eps
        self.key_heads, self.value_heads = (
            config.linear_num_key_heads,
            config.linear_num_value_heads,
        )
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.widths = [keys, keys, values]
        hidden, channels = config.hidden_size, sum(self.widths)
        self.fused = config.fused_qkvz

        def layer_of(width: int) -> nn.Linear:
            return nn.Linear(hidden, width, bias=False)

        if self.fused:
            self.in_proj_qkvz = layer_of(channels + values)
            self.in_proj_ba = layer_of(2 * self.value_heads)
        else:
            self.in_proj_qkv, self.in_proj_z = layer_of(channels), layer_of(values)
            self.in_proj_b, self.in_proj_a = layer_of(self.value_heads), layer_of(self.value_heads)
        self.A_log = nn.Parameter(torch.zeros(self.value_heads))
        self.dt_bias = nn.Parameter(torch.ones(self.value_heads))
        self.conv1d = _Weight(channels, 1, config.linear_conv_kernel_dim)
        self.norm = _Weight(self.value_dim)
        self.out_proj = nn.Linear(values, hidden, bias=False)

    def adapted(self) -> Adapted:
        """Return the layers of q, k, v and of z as the fused kernels take them, or None."""
        return None if self.fused else fused_weights(self.in_proj_qkv, self.in_proj_z)

    def forward(
        self,
        x: Tensor,
        view: AttentionView,
        cache: Storage | None,
        adapted: Adapted,
        room: int,
        recipe: Recipe | None,
    ) -> Tensor:
        """Return the output [B, T, H]; the arguments are those of `Attention.forward`."""
        B, T, _ = x.shape
        qkv, z, b, a = self._project(x, adapted, room, recipe)
        beta, g = b.float().sigmoid(), -self.A_log.exp() * F.softplus(a.float() + self.dt_bias)
        if view.real is not None:  # padding is no input of the convolution, and changes no state
            padding = ~view.real[..., None]
            qkv, beta, g = (tensor.masked_fill(padding, 0) for tensor in (qkv, beta, g))
        o = self._mix(qkv, g, beta, view, cache)
        weight = self.norm.weight.to(x.dtype)  # the kernels take one dtype
        normalized = kernels.rms_norm(o, weight, self.eps)
        gated = kernels.swiglu(z.reshape(o.shape), normalized)
        return self.out_proj(gated.view(B, T, -1))

    def _project(
        self, x: Tensor, adapted: Adapted, room: int, recipe: Recipe | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the convolution's input [B, T, C], z [B, T, nv dv], b and a [B, T, nv]."""
        if not self.fused:
            if adapted is None:
                qkv, z = self.in_proj_qkv(x), self.in_proj_z(x)
            else:
                qkv, z = kernels.lora_qkv(x, adapted, again=recipe, room=room)
            return qkv, z, self.in_proj_b(x), self.in_proj_a(x)
        heads, each = self.key_heads, self.value_heads // self.key_heads  # values to one key
        inner = [self.key_dim, self.key_dim, each * self.value_dim, each * self.value_dim]
        qkvz = self.in_proj_qkvz(x).unflatten(-1, (heads, sum(inner)))
        *qkv, z = (part.flatten(2) for part in qkvz.split(inner, dim=-1))
        ba = self.in_proj_ba(x).unflatten(-1, (heads, 2 * each))
        b, a = (part.flatten(2) for part in ba.split(each, dim=-1))
        return torch.cat(qkv, dim=-1), z, b, a

    def _mix(
        self, qkv: Tensor, g: Tensor, beta: Tensor, view: AttentionView, cache: Storage | None
    ) -> Tensor:
        """Return what the delta net makes of its inputs [B, T, nv, dv], and keep the state."""
        B, T, _ = qkv.shape
        states = cast(States | None, cache)  # learned prompts are refused for such models
        before, state = (states and states.state(self.layer)) or (None, None)
        weight = self.conv1d.weight.squeeze(1)
        mixed = kernels.causal_conv(qkv, weight, state=before, lengths=view.lengths)
        q, k, v = mixed.split(self.widths, dim=-1)
        q, k = (t.view(B, T, self.key_heads, self.key_dim) for t in (q, k))
        v = v.view(B, T, self.value_heads, self.value_dim)
        if states is None:
            return kernels.gated_delta_net(q, k, v, g, beta, lengths=view.lengths)
        o, state = kernels.gated_delta_net(q, k, v, g, beta, state=state, with_state=True)
        if before is None:
            before = qkv.new_zeros(B, weight.shape[1] - 1, qkv.shape[2])
        states.keep_state(self.layer, before, qkv, state)
        return o
