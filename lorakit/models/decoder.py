"""The one decoder. Families differ by ModelConfig fields; there is no class per family.

    x = embed(ids)
    for each layer:   x += attention(norm(x));   x += mlp(norm(x))
    logits = norm(x) head^T                       head = the embedding itself where they are tied

Parameter names are those of the published checkpoints (`model.layers.0.self_attn.q_proj.weight`),
so that loading is an assignment. Tied models have no `lm_head` at all: one tensor, one name.
Experts are plain linear layers under their published names, one module each, so that they quantize
and take adapters like any other.

Build it on the meta device and let `checkpoint.load_model` fill it; nothing here allocates weights
that are about to be overwritten. Shapes: B batch, T positions of this call, S positions with the
cache, Hq and Hk heads, D head_dim.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import kernels
from lorakit.config.errors import LorakitError
from lorakit.models.adapted_layer import AdaptedLayer, fused_weights
from lorakit.models.config import ModelConfig
from lorakit.models.hooks import has_hooks
from lorakit.models.packed_layers import PackedWeight
from lorakit.models.recompute import checkpoint
from lorakit.models.source import Source
from lorakit.models.views import View, document_lengths, key_mask, rotary_tables


class Cache(Protocol):
    """Keys and values of earlier positions, per layer (see decoding.KVCache)."""

    length: int

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, T, Hk, D] of new positions; those they may look at: [B, S, Hk, D]."""

    def positions(self, new: int, window: int | None) -> Tensor:
        """int64 [S]: which positions `append` will return for `new` ones, for layers of one window.
        For a single new one all of them lie in its window.
        """


def _noise(x: Tensor, alpha: float, cu_seqlens: Tensor | None) -> Tensor:
    """NEFTune's for embeddings x [B, T, H]: uniform, up to alpha / sqrt(T H), T of the document."""
    noise, length = torch.empty_like(x).uniform_(-alpha, alpha), x.new_tensor(x.shape[1])
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().to(x.device)
        length = lengths.repeat_interleave(lengths)[:, None].to(x.dtype)
    return noise / (length * x.shape[2]).sqrt()


Again = tuple[Callable[[Tensor], Tensor], Tensor] | None  # as kernels.lora_qkv takes it


def _targets(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """What each position but the last is to predict: int64 [B, T - 1]; not over documents."""
    targets = labels[:, 1:]
    if cu_seqlens is not None:
        targets = targets.clone()
        targets[:, cu_seqlens[1:-1].long() - 1] = -100
    return targets


class RMSNorm(nn.Module):
    def __init__(self, size: int, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = config.rms_norm_eps
        self.options = {
            "weight_offset": config.norm_weight_offset, "casting_mode": config.norm_casting_mode
        }  # fmt: skip

    def forward(self, x: Tensor, residual: Tensor | None = None):
        """Normalized x; with a residual, the sum of both normalized, and the sum."""
        if residual is None:
            return kernels.rms_norm(x, self.weight, self.eps, **self.options)
        return kernels.add_rms_norm(x, residual, self.weight, self.eps, **self.options)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.softcap = config.attn_logit_softcapping
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(hidden, heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * config.head_dim, hidden, bias=config.o_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config)
            self.k_norm = RMSNorm(config.head_dim, config)

    def forward(self, x: Tensor, view: View, cache: Cache | None, again: Again) -> Tensor:
        B, T, _ = x.shape
        layers = self.q_proj, self.k_proj, self.v_proj
        adapted = fused_weights(*layers)
        if adapted is None:
            projected = [layer(x) for layer in layers]
        else:
            projected = kernels.lora_qkv(x, adapted, again=again)
        heads = (y.shape[-1] // self.head_dim for y in projected)
        q, k, v = (y.view(B, T, n, self.head_dim) for y, n in zip(projected, heads, strict=True))
        if self.q_norm is None:
            q, k = kernels.rope(q, k, *view.tables)
        else:
            weights, norm = (self.q_norm.weight, self.k_norm.weight), self.q_norm
            q, k = kernels.norm_rope(q, k, *weights, norm.eps, *view.tables, **norm.options)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        out = kernels.attention(
            q,
            k,
            v,
            mask=view.mask,
            scale=self.scale,
            softcap=self.softcap,
            window=view.window,
            lengths=view.lengths,
        )
        return self.o_proj(out.reshape(B, T, -1))


class MLP(nn.Module):
    """The gated MLP, and an expert, whose layers some checkpoints name otherwise."""

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
        self.add_module(gate, nn.Linear(hidden, inner, bias=bias))
        self.add_module(up, nn.Linear(hidden, inner, bias=bias))
        self.add_module(down, nn.Linear(inner, hidden, bias=bias))

    def forward(self, x: Tensor, keep: bool = False, again: Again = None) -> Tensor:
        """keep: gate(x) and up(x) for backward, which otherwise computes them again; on a CPU they
        always are. again: how x was made, if it is to be made again rather than kept.
        """
        gate, up, down = layers = [self.get_submodule(name) for name in self.names]
        keep = keep or x.device.type == "cpu"
        if (adapted := fused_weights(*layers)) is not None:
            return kernels.lora_mlp(x, *adapted, self.hidden_act, keep=keep, again=again)
        return down(kernels.gated(gate(x), up(x), self.hidden_act))


class MoE(nn.Module):
    """Experts in the MLP's place: a router picks a few for every token and weighs their outputs.

    The tokens are grouped by expert: an expert runs once, on all rows that chose it, and one that
    none chose does not run. How many rows meet in a product depends on all documents of a packed
    row, and matrix libraries sum a product of few rows in another order than one of many; so there
    every group is filled up to a multiple of ROWS, from where on the order stays the same.
    """

    ROWS = 16

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.chosen, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        _, *names = config.moe_names
        self.experts = nn.ModuleList(
            MLP(config, config.moe_intermediate_size, tuple(names))
            for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor, packed: bool, keep: bool) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1, dtype=torch.float32).topk(self.chosen)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # choices, by expert
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        rows = (order // self.chosen).split(counts)
        weights = weights.flatten()[order].split(counts)
        out = torch.zeros_like(flat)
        for expert, mine, weight in zip(self.experts, rows, weights, strict=True):
            if len(mine):
                filling = -len(mine) % self.ROWS if packed else 0
                found = expert(F.pad(flat[mine], (0, 0, 0, filling)), keep)[: len(mine)]
                out.index_add_(0, mine, (found * weight[:, None]).to(out.dtype))
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        hidden = config.hidden_size
        self.input_layernorm = RMSNorm(hidden, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(hidden, config)
        self.pre_feedforward_layernorm = self.post_feedforward_layernorm = None
        if config.sandwich_norm:
            self.pre_feedforward_layernorm = RMSNorm(hidden, config)
            self.post_feedforward_layernorm = RMSNorm(hidden, config)
        self.moe_name = None
        if config.has_experts(layer):
            self.moe_name = config.moe_names[0]
            self.add_module(self.moe_name, MoE(config))
        else:
            self.mlp = MLP(config, config.intermediate_size)

    def forward(self, x: Tensor, view: View, cache: Cache | None) -> Tensor:
        # What the linear layers read is a norm of what is kept anyway. On a CPU it is cheap to
        # compute again; under checkpointing nothing is kept for long.
        forget = x.device.type == "cpu" and not view.again
        again = (self.input_layernorm, x) if forget else None
        attended = self.self_attn(self.input_layernorm(x), view, cache, again)
        norm = self.pre_feedforward_layernorm
        if norm is None:
            norm = self.post_attention_layernorm
        else:
            attended = self.post_attention_layernorm(attended)
        normalized, x = norm(attended, x)
        added = self._feed_forward(normalized, view, (norm, x) if forget else None)
        if self.post_feedforward_layernorm is not None:
            added = self.post_feedforward_layernorm(added)
        return x + added

    def _feed_forward(self, x: Tensor, view: View, again: Again) -> Tensor:
        if self.moe_name is None:
            return self.mlp(x, view.again, again)
        return self.get_submodule(self.moe_name)(x, view.lengths is not None, view.again)


class Trunk(nn.Module):
    """Everything but the head; the checkpoints call it `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size)
        if not weight.is_meta:  # there torch would import its compiler for it: 1.4 s, 80 MB
            nn.init.normal_(weight)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)


class NoPrompt(nn.Module):
    """What stands in the place of a learned prompt where there is none.

    A learned prompt comes before the first position of every row, as keys and values that all
    later positions see. `attach` puts one here (adapters/methods/prompts.py).
    """

    length = 0  # in positions

    def forward(self, model: "Decoder", cache: Cache | None, rows: int) -> Cache | None:
        """Return `cache` of so many rows; if it is None or empty, one that begins with the prompt."""
        return cache


class Decoder(nn.Module):
    """A causal language model.

    Three attributes, off by default, change training alone. `gradient_checkpointing` keeps only
    each block's input for backward and computes the block again: less memory, a forward pass more.
    `offload_activations` keeps these inputs in host memory until then. `neftune_noise_alpha` a adds
    uniform noise to the embeddings, up to a / sqrt(T H) (NEFTune, arXiv:2310.05914).

    Three keywords of the methods say what the rows of input_ids int64 [B, T] are:

    attention_mask [B, S]: true at real tokens, false at padding, on either side; positions count
        real tokens.
    cu_seqlens int [n + 1]: documents packed into one row (B = 1), document i from cu_seqlens[i] to
        cu_seqlens[i + 1]; each starts at position 0 and sees none of the others.
    cache: input_ids continue what it holds, and S includes that.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = self.offload_activations = False
        self.neftune_noise_alpha: float | None = None
        self.source: Source | None = None  # where the weights came from, if from files
        self.beginning = NoPrompt()  # named so in the saved state of runs
        self.model = Trunk(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The final, normalized hidden states [B, T, hidden_size] of input_ids int64 [B, T]."""
        if self.beginning.length:
            if cu_seqlens is not None:
                raise LorakitError("packed documents take no prompt; give them as rows of a batch")
            cache = self.beginning(self, cache, len(input_ids))
            if attention_mask is not None:
                mask = attention_mask.bool()
                ones = mask.new_ones(len(mask), self.beginning.length)
                attention_mask = torch.cat([ones, mask], dim=1)
        views = self.views(input_ids, attention_mask, cu_seqlens, cache)
        x = self.embed(input_ids)
        if self.training and self.neftune_noise_alpha is not None:
            x = x + _noise(x, self.neftune_noise_alpha, cu_seqlens)
        for i, block in enumerate(self.model.layers):
            view = views[self.config.slides(i)]
            if view.again:
                x = checkpoint(block, x, view, cache, offload=self.offload_activations)
            else:
                x = block(x, view, cache)
        return self.model.norm(x)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, hidden_size], scaled where the family does so."""
        x = self.model.embed_tokens(input_ids)
        if self.config.scale_embeddings:
            x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)
        return x

    def views(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: Cache | None,
    ) -> dict[bool, View]:
        """What the layers without and with a sliding window see in this call."""
        T, config, device = input_ids.shape[1], self.config, input_ids.device
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + T, device=device)
        position_ids, real, lengths = positions[None], None, None
        if cu_seqlens is not None:
            if attention_mask is not None or cache is not None:
                raise LorakitError("packed documents take neither a padding mask nor a cache")
            lengths = document_lengths(cu_seqlens, input_ids)
            position_ids = torch.cat([positions[:n] for n in lengths])[None]
        if attention_mask is not None:
            real = attention_mask.bool()
            position_ids = (real.cumsum(-1) - 1).clamp(min=0)[:, past:]
        local = tables = rotary_tables(config.rope, config.head_dim, position_ids, lengths)
        if config.rope_local is not None:
            local = rotary_tables(config.rope_local, config.head_dim, position_ids, lengths)
        views, again = {}, self.gradient_checkpointing and torch.is_grad_enabled()
        for slides in {config.slides(i) for i in range(config.num_hidden_layers)}:
            window = config.sliding_window if slides else None
            mask = None
            if lengths is None:
                seen = positions if cache is None else cache.positions(T, window)
                mask = key_mask(positions, seen, window, real)
            views[slides] = View(local if slides else tables, mask, window, lengths, again)
        return views

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states: [..., hidden_size] -> [..., vocab_size]."""
        logits, cap = self._uncapped(hidden), self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _uncapped(self, hidden: Tensor) -> Tensor:
        if self.lm_head is not None:
            return self.lm_head(hidden)
        embedding, update = self._tied_head()
        if update is not None:
            return kernels.lora_linear(hidden, update)
        if isinstance(embedding, PackedWeight):
            return kernels.frozen_linear(hidden, embedding.quantized)
        return F.linear(hidden, embedding.weight)

    def _tied_head(self) -> tuple[nn.Module, kernels.LoraWeights | None]:
        """The embedding that is the head too, and the low-rank update of both."""
        embedding = self.model.embed_tokens
        if not isinstance(embedding, AdaptedLayer):
            return embedding, None
        if embedding.row_groups is not None:
            raise LorakitError("adapter_rows: a head that is tied has one adapter for all rows")
        return embedding.current_module(), embedding.low_rank_update()

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab_size] of input_ids int64 [B, T]."""
        hidden = self.hidden_states(
            input_ids, attention_mask=attention_mask, cu_seqlens=cu_seqlens, cache=cache
        )
        return self.head(hidden)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Next-token cross-entropy of labels int64 [B, T], summed, and how many labels counted;
        label_smoothing and z_loss as in `kernels.cross_entropy`.

        Position t predicts label t + 1; labels of -100 do not count, nor the first one of a packed
        document, and their hidden states never meet the head. Padding on the right needs no
        attention_mask: it lies in the future of every real token.
        """
        hidden = self.hidden_states(input_ids, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
        targets = _targets(labels, cu_seqlens)
        return self._head_loss(
            hidden[:, :-1], targets, label_smoothing=label_smoothing, z_loss=z_loss
        )

    def row_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`loss` of each row, or of each packed document: summed fp32 [n], and counts int64 [n]."""
        hidden = self.hidden_states(input_ids, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
        hidden, targets = hidden[:, :-1], _targets(labels, cu_seqlens)
        if cu_seqlens is None:
            rows = zip(hidden.split(1), targets.split(1), strict=True)
        else:
            bounds = cu_seqlens.tolist()
            parts = [slice(start, end) for start, end in pairwise(bounds)]
            rows = [(hidden[:, part], targets[:, part]) for part in parts]
        found = [self._head_loss(*row) for row in rows]
        return torch.stack([loss for loss, _ in found]), torch.stack([n for _, n in found])

    def _head_loss(self, hidden: Tensor, targets: Tensor, **form: float) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy and count of targets int64 [B, T] for hidden [B, T, H]."""
        form["softcap"] = self.config.final_logit_softcapping
        weight, update = self._head_weight()
        if weight is None:
            rows = (targets != -100).nonzero(as_tuple=True)
            whole = isinstance(self.lm_head, AdaptedLayer) and self.lm_head.row_groups is not None
            logits = self._uncapped(hidden)[rows] if whole else self._uncapped(hidden[rows])
            return kernels.cross_entropy(logits, targets[rows], **form)
        lora = None if update is None else (update.lora_A, update.lora_B, update.scaling)
        return kernels.linear_cross_entropy(hidden, weight, targets, lora=lora, **form)

    def _head_weight(self) -> tuple[Tensor | kernels.Packed | None, kernels.LoraWeights | None]:
        """What the head multiplies with, and its low-rank update; no weight if that is not all."""
        head, update = self.lm_head, None
        if head is None:
            head, update = self._tied_head()
        elif has_hooks(head):
            return None, None
        elif isinstance(head, AdaptedLayer) and head.row_groups is None:
            update = head.low_rank_update()
            head = head.only_module() if update is None else head.current_module()
        more = update is not None and (update.dropout or update.magnitude is not None)
        if more or (update is not None and update.bias is not None):
            return None, None
        if isinstance(head, PackedWeight):
            return head.quantized, update
        return (head.weight if type(head) in (nn.Linear, nn.Embedding) else None), update
