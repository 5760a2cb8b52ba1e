"""What each token goes through by itself in a block: the gated MLP, or a mixture of experts.

    y = down(activation(gate(x)) * up(x))

Experts are plain linear layers under their published names, one module each, so that they are
quantized and take adapters like any other.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import kernels
from lorakit.kernels import pretend
from lorakit.models.adapted_layer import fused_weights
from lorakit.models.config import ModelConfig
from lorakit.models.dense_tiles import ROWS, takes_tiles, tiled_mlp
from lorakit.models.expert_layers import expert_layers

Recipe = tuple[Callable[[Tensor], Tensor], Tensor]
"""A function and its argument, whose result is the input of a layer.

Backward computes that input again with it, so that forward need not keep it (see
`kernels.lora_qkv`).
"""

Adapted = list[kernels.LoraWeights] | list[kernels.SpanWeights] | None
"""Layers that share an input, as the fused kernels take them; None if one is to be called."""


class MLP(nn.Module):
    """The gated MLP: y = down(activation(gate(x)) * up(x)).

    An expert is such an MLP too; some families give its layers other names.
    """

    def __init__(
        self,
        config: ModelConfig,
        inner: int,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ):
        super().__init__()
        hidden, bias = config.hidden_size, config.mlp_bias
        self.names, self.hidden_act = names, config.hidden_act
        gate, up, down = names
        self.gate_up_proj: nn.Module | None = None
        if config.fused_gate_up:
            self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=bias)
        else:
            self.add_module(gate, nn.Linear(hidden, inner, bias=bias))
            self.add_module(up, nn.Linear(hidden, inner, bias=bias))
        self.add_module(down, nn.Linear(inner, hidden, bias=bias))

    def adapted(self) -> Adapted:
        """Return gate, up and down as the fused kernels take them, or None."""
        if self.gate_up_proj is not None:
            return None
        return fused_weights(*[self.get_submodule(name) for name in self.names])

    def forward(
        self,
        x: Tensor,
        keep: bool,
        adapted: Adapted,
        room: int = 0,
        recipe: Recipe | None = None,
        recomputed: bool = False,
    ) -> Tensor:
        """Return y [..., H].

        Args:
            x: [..., H].
            keep: Whether gate(x) and up(x) are kept for backward, which otherwise computes them
                again.
            adapted: What the method of that name returned for this pass.
            room: Of `kernels.lora_room` for gate and up, which x was made with.
            recipe: Computes x again in backward; None: x is kept.
            recomputed: Whether this runs again right before its backward.
        """
        if self.gate_up_proj is not None:
            gate_x, up_x = self.gate_up_proj(x).chunk(2, dim=-1)
            down = self.get_submodule(self.names[2])
            return down(kernels.gated(gate_x, up_x, self.hidden_act))
        if adapted is None:
            layers = [self.get_submodule(name) for name in self.names]
            if recomputed and takes_tiles(x, layers):
                return tiled_mlp(x, layers, self.hidden_act)
            gate, up, down = layers
            return down(kernels.gated(gate(x), up(x), self.hidden_act))
        lora_gate, lora_up, lora_down = adapted
        return kernels.lora_mlp(
            x,
            lora_gate,
            lora_up,
            lora_down,
            self.hidden_act,
            keep=keep,
            recomputed=recomputed,
            again=recipe,
            room=room,
        )


class Experts(nn.ModuleList):
    """The experts of a layer, each an MLP that some of the tokens go through.

    The tokens are grouped by expert. On a GPU all experts run together, and the host does not ask
    how many tokens each has (`kernels.expert_mlp`). Elsewhere an expert runs by itself, once, on
    all tokens that it was picked for, and not at all if there are none. So it does on a GPU for a
    few tokens, and if an expert is more than frozen layers with low-rank updates.

    A packed row needs care, since no document may change a bit of another's result. The documents
    share the groups, and matrix libraries sum a product of few rows in another order than one of
    many. So the groups of a packed row are filled up to a multiple of ROWS; from that many rows on,
    the order stays the same. How many tokens a packed row has does not decide how it is computed.
    """

    ROWS = 16

    def __init__(self, config: ModelConfig):
        _, gate, up, down = config.moe_names
        names, width = (gate, up, down), config.moe_intermediate_size
        super().__init__(MLP(config, width, names) for _ in range(config.num_experts))
        self.names, self.hidden_act = names, config.hidden_act

    def forward(
        self,
        tokens: Tensor,
        picked: Tensor,
        weights: Tensor,
        packed: bool,
        keep: bool,
        recomputed: bool = False,
    ) -> Tensor:
        """Return the weighted sum of the picked experts' outputs, [n, H].

        Under gradient checkpointing more tokens than a tile has go through all experts a tile at a
        time, so that what frozen experts with adapters compute takes the memory of one tile.

        Args:
            tokens: [n, H].
            picked: The numbers of each token's experts, int64 [n, k].
            weights: Their weights, fp32 [n, k].
            packed: Whether the tokens are one row of packed documents.
            keep: As in MLP.
            recomputed: As in MLP.
        """
        if recomputed and len(tokens) > ROWS:
            parts = zip(*(t.split(ROWS) for t in (tokens, picked, weights)), strict=True)
            return torch.cat([self(*part, packed, keep=False) for part in parts])
        few = picked.numel() < len(self) and not packed  # most experts have no token
        layers = None if few else self.together(tokens)
        if layers is None:
            return self._one_by_one(tokens, picked, weights, packed, keep)
        gate, up, down = layers
        act = self.hidden_act
        return kernels.expert_mlp(tokens, picked, weights, gate, up, down, act, keep=keep)

    def together(self, tokens: Tensor) -> list[kernels.ExpertLayers] | None:
        """Return the layers of all experts, if the kernels compute them together.

        Of the tokens only dtype and device count. What a packed row computes follows from this
        alone.
        """
        if not kernels.dispatch.triton_runs(tokens):
            return None
        if pretend.autocasts(tokens.device):
            return None
        layers = expert_layers(self, self.names)
        return layers if layers is not None and kernels.takes_experts(tokens, *layers) else None

    def _one_by_one(
        self, tokens: Tensor, picked: Tensor, weights: Tensor, packed: bool, keep: bool
    ) -> Tensor:
        """Return the output for tokens [n, H], one expert after the other."""
        order = picked.flatten().argsort(stable=True)  # numbers of the picks, by expert
        counts = picked.flatten().bincount(minlength=len(self)).tolist()
        groups = (order // picked.shape[1]).split(counts)  # numbers of the tokens of each expert
        group_weights = weights.flatten()[order].split(counts)
        out = torch.zeros_like(tokens)
        for expert, group, weight in zip(self, groups, group_weights, strict=True):
            if len(group):
                assert isinstance(expert, MLP)  # as it was made
                filling = -len(group) % self.ROWS if packed else 0
                own = F.pad(tokens[group], (0, 0, 0, filling))
                found = expert(own, keep, expert.adapted())[: len(group)]
                out.index_add_(0, group, (found * weight[:, None]).to(out.dtype))
        return out


def _likeliest(scores: Tensor, count: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return the numbers of the experts with the largest softmax, and their weights.

    Args:
        scores: The router's output [n, experts].
        count: How many experts a token has, k.
        normalize: Whether the weights of a token are scaled to sum to one.

    Returns:
        The numbers, int64 [n, k], and the weights, fp32 [n, k].
    """
    weights, picked = scores.softmax(-1, dtype=torch.float32).topk(count)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return picked, weights


class Router(nn.Module):
    """Picks the experts of a token where these stand beside an MLP (Gemma 4).

    p = softmax(proj(x / rms(x) * scale / sqrt(H))). The k largest are divided by their sum, and
    each is multiplied by a number of its expert.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.per_token, self.eps = config.num_experts_per_tok, config.rms_norm_eps
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers of the experts of tokens [n, H], int64 [n, k], and weights, fp32."""
        hidden = tokens.shape[-1]
        x = F.rms_norm(tokens, (hidden,), eps=self.eps) * self.scale * hidden**-0.5
        picked, weights = _likeliest(self.proj(x), self.per_token, normalize=True)
        return picked, weights * self.per_expert_scale[picked]


class MoE(nn.Module):
    """Experts in the MLP's place: a router picks a few for every token and weighs their outputs.

    In some families all tokens take a shared expert too, y += sigmoid(x . g) shared(x).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.per_token, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        router = nn.Linear(config.hidden_size, config.num_experts, bias=config.router_bias)
        self.router_name = config.router_name
        self.add_module(self.router_name, router)
        self.experts = Experts(config)
        self.shared_expert: MLP | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = MLP(config, config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor, packed: bool, keep: bool, recomputed: bool = False) -> Tensor:
        """Return the output for x [B, T, H].

        Args:
            x: [B, T, H].
            packed: Whether x is one row of packed documents.
            keep: As in MLP.
            recomputed: As in MLP.
        """
        tokens = x.reshape(-1, x.shape[-1])  # [n, H]
        scores = self.get_submodule(self.router_name)(tokens)
        picked, weights = _likeliest(scores, self.per_token, self.normalize)
        out = self.experts(tokens, picked, weights, packed, keep, recomputed)
        if self.shared_expert is not None:
            adapted = self.shared_expert.adapted()
            shared = self.shared_expert(tokens, keep, adapted, recomputed=recomputed)
            out = out + self.shared_expert_gate(tokens).sigmoid() * shared
        return out.view_as(x)
