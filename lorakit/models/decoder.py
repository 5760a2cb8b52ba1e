"""The decoder: one class for all families, whose differences are fields of ModelConfig.

    x = embed(ids)
    for each block:   x += attention(norm(x));   x += mlp(norm(x))
    logits = norm(x) head^T                       head = the embedding itself where they are tied

This file is the way from ids to logits and to the loss. Its parts have files of their own:

    blocks.py   a block: norms and attention; mlp.py has the MLP and the experts
    views.py    what the positions of a call see: masks, rotary tables, packed documents
    head.py     the head, which turns hidden states into logits and into the loss

Parameter names are those of the published files (`model.layers.0.self_attn.q_proj.weight`), so that
loading is an assignment. Tied models have no `lm_head` at all: one tensor, one name.

`load_model` builds a decoder on the meta device and fills it, so that no memory is spent on weights
that are about to be overwritten.

Shapes: B rows, T positions of this call, S positions with those in the cache, H hidden size,
V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakit import kernels
from lorakit.config.errors import LorakitError
from lorakit.models.blocks import Block, RMSNorm
from lorakit.models.cache import Cache, SharedKeys, Storage
from lorakit.models.config import ModelConfig
from lorakit.models.head import OutputHead
from lorakit.models.offload import Offload
from lorakit.models.per_layer import HostTable
from lorakit.models.recompute import run_recomputed
from lorakit.models.rows import before_padding, neftune_noise, next_tokens
from lorakit.models.sharding import TakesGradients, gathered
from lorakit.models.source import Source
from lorakit.models.views import AttentionView, PackedRow, attention_views

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Decoder(nn.Module):
    """A causal language model.

    Three keywords of the methods say what the rows of input_ids, int64 [B, T], are:

    - attention_mask [B, S]: true at real tokens, false at padding, on either side. Positions count
      real tokens, and so do the lengths of rows where the rotary embedding depends on them.
    - cu_seqlens, int [n + 1]: documents packed into one row (B = 1), document i from cu_seqlens[i]
      to cu_seqlens[i + 1]. Each starts at position 0 and sees none of the others.
    - cache: keys and values of earlier positions, which input_ids continue; S includes them.

    The methods raise a LorakitError if cu_seqlens do not cut the row into documents, or come
    together with a mask, a cache or a learned prompt.

    Attributes:
        config: What the decoder computes.
        gradient_checkpointing: Whether each block keeps only its input for backward, and is
            computed again there: less memory for one more forward pass. Off by default.
        offload_activations: Whether the inputs that gradient checkpointing keeps wait in host
            memory. Off by default.
        kept_layers: How many blocks, from the first on, keep gate and up of their MLP for backward,
            which otherwise computes them again. All do by default; a GPU may lack the memory.
        float8_head: The weight of the head for the loss in training, in float8, or None.
        neftune_noise_alpha: A number a; in training, uniform noise up to a / sqrt(T H) is added to
            the embeddings (NEFTune, arXiv:2310.05914). None, the default: no noise.
        source: The files that the weights came from, or None.
        mesh: The ranks that the weights are divided among (sharding.py); None: they are whole here.
        takes_gradients: What gets the gradients of a divided embedding and head, if they train.
        beginning: The learned prompt, or the empty place for one.
        model: The embedding, the blocks and the last norm.
        lm_head: The output head; None if it is the embedding itself.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = self.offload_activations = False
        self.kept_layers = config.num_hidden_layers
        self.neftune_noise_alpha: float | None = None
        self.float8_head: kernels.Float8Weight | None = None
        self.source: Source | None = None
        self.mesh: DeviceMesh | None = None
        self.takes_gradients: TakesGradients | None = None
        self.beginning = NoPrompt()  # the saved state of runs has this name
        self.model = Trunk(config)
        self.lm_head: nn.Module | None = None
        if not config.tie_word_embeddings and config.classifier is None:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        """The device that the model lies on."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in; packed weights are stored in fewer bits."""
        return self.model.norm.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the logits [B, T, V] of input_ids int64 [B, T]."""
        hidden = self.hidden_states(
            input_ids, attention_mask=attention_mask, cu_seqlens=cu_seqlens, cache=cache
        )
        return self.head(hidden)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the final, normalized hidden states [B, T, H] of input_ids int64 [B, T]."""
        if self.beginning.length:  # a learned prompt comes before the rows
            if cu_seqlens is not None:
                raise LorakitError("packed documents take no prompt; give them as rows of a batch")
            cache = self.beginning(self, cache, len(input_ids))
            if attention_mask is not None:  # the prompt is real in every row
                mask = attention_mask.bool()
                ones = mask.new_ones(len(mask), self.beginning.length)
                attention_mask = torch.cat([ones, mask], dim=1)
        views = self.views(input_ids, attention_mask, cu_seqlens, cache)
        x = self.embed(input_ids)
        if self.training and self.neftune_noise_alpha is not None:
            x = x + neftune_noise(x, self.neftune_noise_alpha, cu_seqlens)
        return self.through_blocks(input_ids, x, views, cache)

    def through_blocks(
        self, input_ids: Tensor, x: Tensor, views: list[AttentionView], cache: Storage | None
    ) -> Tensor:
        """Return the final, normalized hidden states [B, T, H] of embeddings x [B, T, H].

        Some models look input_ids int64 [B, T] up in a second embedding too.
        """
        parts = self.model.per_layer_inputs(input_ids, x)
        cache = self.shared_keys(cache)
        x, added = self.model.layers(x, views, cache, parts, self.offload_activations)
        return self.model.norm(x) if added is None else self.model.norm(added, x)[0]

    def shared_keys(self, cache: Storage | None) -> Storage | None:
        """Return the storage of one call where layers see others' keys, else `cache` as it is."""
        if not self.config.num_kv_shared_layers:
            return cache
        layers = range(self.config.num_hidden_layers)
        sources = [self.config.kv_source(layer) for layer in layers]
        return SharedKeys(cache, {source for source in sources if source is not None})

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings [B, T, H] of input_ids, scaled where the family does so."""
        with self._whole(self.model.embed_tokens):
            x = self.model.embed_tokens(input_ids)
        if self.config.scale_embeddings:
            # the factor is rounded to the model's dtype, as it was in training
            x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)
        multiplier = self.config.embedding_multiplier
        return x if multiplier == 1 else x * multiplier

    def views(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        packed: PackedRow | None = None,
    ) -> list[AttentionView]:
        """Return, for each layer, what the positions of a call see in it."""
        recomputed = self.gradient_checkpointing and torch.is_grad_enabled()
        given = input_ids, attention_mask, cu_seqlens, cache
        return attention_views(
            self.config, *given, packed=packed, recomputed=recomputed, kept_layers=self.kept_layers
        )

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., H]."""
        with self.whole_head() as head:
            return head.logits(hidden)

    def _whole(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Return the context in which the weights of the embedding or the head are whole."""
        return nullcontext() if self.mesh is None else gathered(layer, self.takes_gradients)

    @contextmanager
    def whole_head(self) -> Iterator[OutputHead]:
        """Return the context in which the head's weights are whole; the head, for `with ... as`."""
        with self._whole(self._head_layer()):
            yield self._output_head()

    def _head_layer(self) -> nn.Module:
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def _output_head(self) -> OutputHead:
        float8 = self.float8_head if self.training else None
        softcap, scaling = self.config.final_logit_softcapping, self.config.logits_scaling
        options = softcap, float8, scaling, self.mesh is not None
        return OutputHead(self._head_layer(), self.lm_head is None, *options)

    def frozen_head(self) -> Tensor | kernels.Packed | None:
        """Return the weight [V, H] of the head, unless it trains or the head computes more."""
        return self._output_head().frozen_weight()

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        dft: bool = False,
        statistics: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy of the next tokens, and how many labels counted.

        Position t predicts label t + 1. A label of -100 does not count, nor does the first one of a
        row or of a packed document.

        Padding on the right needs no attention_mask: it lies in the future of every real token.
        Where the rotary embedding depends on the length of a row (config.by_length), an
        attention_mask says how long each is; without one, a row ends before a run of tokens 0 that
        have no label.

        Args:
            input_ids: int64 [B, T].
            labels: int64 [B, T], input_ids or -100; in host memory they cost no wait for a GPU.
            attention_mask: See the class.
            cu_seqlens: See the class.
            label_smoothing: See `kernels.cross_entropy`.
            z_loss: See `kernels.cross_entropy`.
            dft: See `kernels.cross_entropy`.
            statistics: See `kernels.cross_entropy`.

        Returns:
            The sum, fp32 [], and the count, int64 [].
        """
        hidden = self.hidden_for_loss(input_ids, labels, attention_mask, cu_seqlens)
        targets = next_tokens(labels, cu_seqlens)
        options = label_smoothing, z_loss, dft, statistics
        with self.whole_head() as head:
            return head.loss(hidden, targets, None, *options)

    def packed_loss(
        self,
        row: PackedRow,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        dft: bool = False,
        statistics: Tensor | None = None,
    ) -> Tensor:
        """Return the `loss` of documents whose bounds and labels are tensors on the device.

        No Python number depends on the documents, so that a CUDA graph of it takes others. Rotary
        embeddings that depend on a length, learned prompts and NEFTune's noise are not for it.

        Args:
            row: The row. Labels of -100 do not count.
            label_smoothing: See `kernels.cross_entropy`.
            z_loss: See `kernels.cross_entropy`.
            dft: See `kernels.cross_entropy`.
            statistics: See `kernels.cross_entropy`.

        Returns:
            The sum, fp32 [].
        """
        ids = row.input_ids
        hidden = self.through_blocks(ids, self.embed(ids), self.views(ids, packed=row), None)
        options = label_smoothing, z_loss, dft, statistics
        total, _ = self._output_head().loss(hidden, row.targets, row.label_rows, *options)
        return total

    def row_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the `loss` of each row, or of each packed document.

        Returns:
            The sums, fp32 [n], and the counts, int64 [n].
        """
        hidden = self.hidden_for_loss(input_ids, labels, attention_mask, cu_seqlens)
        targets = next_tokens(labels, cu_seqlens)
        if cu_seqlens is None:
            rows = list(zip(hidden.split(1), targets.split(1), strict=True))
        else:
            parts = [slice(start, end) for start, end in pairwise(cu_seqlens.tolist())]
            rows = [(hidden[:, part], targets[:, part]) for part in parts]
        with self.whole_head() as head:
            sums, counts = zip(*(head.loss(*row) for row in rows), strict=True)
        return torch.stack(sums), torch.stack(counts)

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return the cross-entropy of each label that counts, row after row, fp32 [n].

        `temperature` divides the logits. The logits exist for a chunk of positions at a time.
        """
        hidden = self.hidden_for_loss(input_ids, labels, attention_mask, cu_seqlens)
        targets = next_tokens(labels, cu_seqlens)
        with self.whole_head() as head:
            head = head.tempered(temperature)
            return head.token_losses(hidden, targets, self.config.vocab_size)

    def hidden_for_loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """Return the final hidden states [B, T, H]; see `loss` for rows whose length matters."""
        if self.config.by_length and attention_mask is None and cu_seqlens is None:
            attention_mask = before_padding(input_ids, labels.to(input_ids.device))
        return self.hidden_states(input_ids, attention_mask=attention_mask, cu_seqlens=cu_seqlens)


class Trunk(nn.Module):
    """The embedding, the blocks and the last norm; the published files call them `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # nn.Embedding would draw its weight itself, and on the meta device that makes torch import
        # its compiler: 1.4 s, 80 MB.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        if not weight.is_meta:
            nn.init.normal_(weight)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = Blocks(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        self.parts = config.num_hidden_layers, config.hidden_size_per_layer_input
        self.embed_tokens_per_layer: HostTable | None = None
        if config.hidden_size_per_layer_input:
            layers, width = self.parts
            table = HostTable(config.vocab_size_per_layer_input, layers * width)
            self.embed_tokens_per_layer = table
            self.per_layer_model_projection = nn.Linear(
                config.hidden_size, layers * width, bias=False
            )
            self.per_layer_projection_norm = RMSNorm(width, config)

    def per_layer_inputs(self, input_ids: Tensor, x: Tensor) -> Sequence[Tensor | None]:
        """Return each layer's part of the second embedding [B, T, P], or None; see per_layer.py.

        Args:
            input_ids: int64 [B, T].
            x: Their embeddings [B, T, H], which are scaled already.
        """
        layers, width = self.parts
        if self.embed_tokens_per_layer is None:
            return [None] * layers
        of_states = self.per_layer_model_projection(x) * x.shape[-1] ** -0.5
        of_states = self.per_layer_projection_norm(of_states.unflatten(-1, self.parts))
        # the factor is rounded to the model's dtype, as it was in training
        rows = self.embed_tokens_per_layer(input_ids, x.dtype)
        rows = rows * torch.tensor(width**0.5, dtype=x.dtype)
        return ((of_states + rows.unflatten(-1, self.parts)) * 2**-0.5).unbind(-2)


class Blocks(nn.ModuleList):
    """The blocks, one after the other."""

    def forward(
        self,
        x: Tensor,
        views: Sequence[AttentionView],
        cache: Storage | None,
        parts: Sequence[Tensor | None],
        offload: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return x [B, T, H] after all blocks, and what is still to be added to it.

        Args:
            x: The embeddings [B, T, H].
            views: What the positions see, of each block.
            cache: The keys and values of earlier calls, if there are any.
            parts: Each block's part of the second embedding [B, T, P], if the model has one.
            offload: Whether inputs of blocks that are recomputed wait in host memory.
        """
        added: Tensor | None = None  # what the last block adds to x; the next norm reads both
        inputs = Offload(x.device) if offload and not kernels.dispatch.traces() else None
        for block, view, part in zip(self, views, parts, strict=True):
            if view.recomputed and not _keeps_for_others(cache, block):
                x = x if added is None else x + added
                x, added = run_recomputed(block, x, None, view, cache, part, offload=inputs)
            else:
                x, added = block(x, added, view, cache, part)
        return x, added


class NoPrompt(nn.Module):
    """The place of a learned prompt in a model that has none.

    A learned prompt comes before the first position of every row, as keys and values that all
    later positions see. `attach` puts it into this place (adapters/methods/prompts.py).
    """

    length = 0
    """Number of positions of the prompt."""

    def forward(self, model: Decoder, cache: Cache | None, rows: int) -> Cache | None:
        """Return a cache of so many rows that begins with the prompt; here, `cache` as it is.

        A cache that holds positions already has its prompt. For None a new cache is made.
        """
        return cache


def _keeps_for_others(cache: Storage | None, block: nn.Module) -> bool:
    """Return whether a compiler must not recompute a block, since others see its keys.

    It takes no change of what lies outside of a recomputed block.
    """
    if not isinstance(cache, SharedKeys) or not kernels.dispatch.traces():
        return False
    assert isinstance(block, Block)
    return block.mixer.layer in cache.sources
