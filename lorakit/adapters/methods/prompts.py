"""Prompts that are trained: n positions before the first one of every row of a frozen model.

    PromptTuningConfig   arXiv:2104.08691   n trained embeddings
    PromptEncoderConfig  arXiv:2103.10385   P-tuning: n embeddings that a small network makes of
                                            trained ones; it eases training and is then thrown away
    PrefixTuningConfig   arXiv:2101.00190   n trained keys and values of every layer, with
                                            prefix_projection made by such a network too

A row sees nothing of a prompt but keys and values. No position looks at a later one, so what the
model makes of n embeddings does not depend on the row. So all three methods are one thing here:

    embeddings [n, H] -> the blocks, once for all rows -> k, v [1, n, Hk, D] of every layer
    prefix     [n, 2 L Hk D]                           -> k, v [1, n, Hk, D] of every layer

The keys and values stand in the cache before the rows do. Labels, masks and outputs stay those of
the rows.

The finished prompt is stored, not the network that made it. It costs n positions of cache and of
context, and no time inside the layers. It adapts less than LoRA does, and wants a larger learning
rate.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorakit.adapters.layers.wrapper import Attached, Part
from lorakit.adapters.methods.method import Method, config_from, fields_of
from lorakit.adapters.peft_files.layout import AdapterFiles
from lorakit.adapters.plan import Plan
from lorakit.config.errors import LorakitError, check, nearest
from lorakit.models.cache import Cache
from lorakit.models.config import ModelConfig
from lorakit.models.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Settings of every kind of prompt."""

    num_virtual_tokens: int
    """The length of the prompt, in positions."""
    inference_mode: bool = False
    """Attach the finished prompt alone, without the network that makes it, as a file holds it."""

    def __post_init__(self) -> None:
        n = self.num_virtual_tokens
        check(type(n) is int and n > 0, f"num_virtual_tokens must be positive and whole, not {n}")


P = TypeVar("P", bound=PromptConfig)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    listed = ", ".join(choices)
    check(value in choices, f"{name} is {value!r}{nearest(value, choices)}; choose one of {listed}")


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(PromptConfig):
    """An adapter that trains the embeddings of a prompt (prompt tuning)."""

    prompt_tuning_init: str = "RANDOM"
    """How the embeddings start: "RANDOM", "SAMPLE_VOCAB" (those of random tokens) or "TEXT"."""
    prompt_tuning_init_text: str | None = None
    """The text whose tokens TEXT starts from, repeated or cut off to num_virtual_tokens."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer of that text: a directory or a Hub id."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice(
            "prompt_tuning_init", self.prompt_tuning_init, ("RANDOM", "SAMPLE_VOCAB", "TEXT")
        )
        check(
            self.prompt_tuning_init != "TEXT"
            or bool(self.prompt_tuning_init_text and self.tokenizer_name_or_path),
            "prompt_tuning_init TEXT needs prompt_tuning_init_text and tokenizer_name_or_path",
        )


@dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig(PromptConfig):
    """An adapter that trains a network which makes the embeddings of a prompt (P-tuning)."""

    encoder_reparameterization_type: str = "MLP"
    """The kind of network: "MLP" or "LSTM"."""
    encoder_hidden_size: int | None = None
    """The width of the network; null means the model's."""
    encoder_num_layers: int = 2
    """The number of layers of the LSTM."""
    encoder_dropout: float = 0.0
    """The share of numbers that is dropped between the layers of the LSTM, in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self.encoder_reparameterization_type
        _check_choice("encoder_reparameterization_type", kind, ("MLP", "LSTM"))


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(PromptConfig):
    """An adapter that trains keys and values of every layer (prefix tuning)."""

    prefix_projection: bool = False
    """Make the keys and values with a network from trained embeddings."""
    encoder_hidden_size: int | None = None
    """The width of that network; null means the width of a layer's keys."""
    init_weights: str | None = None
    """How keys and values start: "zero", or null for random numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.init_weights in (None, "zero"),
            f"init_weights is {self.init_weights!r}; it must be zero, or null",
        )


# ---- what is trained ----


class PromptPart(Part):
    """A prompt: embedding fp32 [n, any], and the network that makes the prompt of it, if any."""

    def __init__(self, config: PromptConfig, embedding: Tensor, encoder: nn.Module | None = None):
        super().__init__(config)
        self.length = len(embedding)
        self.embedding, self.encoder = nn.Parameter(embedding), encoder

    def finished(self) -> Tensor:
        """Return what is stored: embeddings [n, H], or keys and values [n, 2 L Hk D]."""
        return self.embedding if self.encoder is None else self.encoder(self.embedding)

    def keys_values(self, model: Decoder) -> list[tuple[Tensor, Tensor]]:
        """Return k and v [1, n, Hk, D] of each layer, in the dtype that the model computes in."""
        return _run(model, self.finished().to(model.dtype)[None])


class PrefixPart(PromptPart):
    """A prompt that is keys and values itself, [n, 2 L Hk D]."""

    def keys_values(self, model: Decoder) -> list[tuple[Tensor, Tensor]]:
        heads, head_dim = model.config.num_key_value_heads, model.config.head_dim
        found = self.finished().to(model.dtype).view(1, self.length, -1, 2, heads, head_dim)
        return [(layer[:, :, 0], layer[:, :, 1]) for layer in found.unbind(2)]


class _LSTMEncoder(nn.Module):
    """A network [n, H] -> [n, H]: a bidirectional LSTM along the prompt, then an MLP."""

    def __init__(self, size: int, inner: int, layers: int, dropout: float):
        super().__init__()
        self.lstm = nn.LSTM(
            size, inner, layers, dropout=dropout, bidirectional=True, batch_first=True
        )
        self.mlp = nn.Sequential(
            nn.Linear(2 * inner, 2 * inner), nn.ReLU(), nn.Linear(2 * inner, size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the finished embeddings [n, H] of trained ones x [n, H]."""
        return self.mlp(self.lstm(x)[0])


# ---- where it is in the model ----


class Prompt(Attached[PromptPart]):
    """A learned prompt, which stands in the place of a decoder's `NoPrompt` and is called as it."""

    @property
    def length(self) -> int:
        """How many positions the active prompt has, 0 if there is none."""
        if self.by_rows:
            raise LorakitError("adapter_rows: a prompt is the same for all rows of a batch")
        return 0 if self.active is None else self.active.length

    def trained_tensors(self, name: str) -> dict[str, nn.Parameter]:
        part = self.part_of(name)
        if part.encoder is None:
            return {"prompt_embeddings": part.embedding}
        return dict(part.named_parameters())

    def tensors_to_save(self, name: str) -> dict[str, Tensor]:
        part = self.part_of(name)
        training = part.training
        finished = part.eval().finished()
        part.train(training)
        return {"prompt_embeddings": finished.float()}

    def compute(self, part: PromptPart, model: Decoder, cache: Cache | None, rows: int) -> Cache:
        """Return a cache of so many rows that begins with the prompt; see `NoPrompt.forward`."""
        if cache is not None and cache.length > 0:
            return cache  # it holds the prompt already
        layers = [
            (k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1))
            for k, v in part.keys_values(model)
        ]
        if cache is None:
            return _Preceding(model.config, part.length, layers)
        for layer, (k, v) in enumerate(layers):
            cache.append(layer, k, v)
        return cache

    def make_merged(self, weight: Tensor | None) -> nn.Module:
        raise LorakitError("merge: a prompt is no part of the weights; keep it beside them")


class _Preceding:
    """A cache that holds a prompt and keeps nothing of the call's own positions."""

    def __init__(self, config: ModelConfig, length: int, layers: list[tuple[Tensor, Tensor]]):
        self.config, self.length, self.layers = config, length, layers

    def _first(self, new: int, window: int | None) -> int:
        """Return the first position to show: a single new one must not see beyond the window."""
        return max(0, self.length + new - window) if new == 1 and window is not None else 0

    def positions(self, new: int, window: int | None) -> Tensor:
        """Return the positions that `append` returns when `new` ones come, int64 [S]."""
        device = self.layers[0][0].device
        return torch.arange(self._first(new, window), self.length + new, device=device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, S, Hk, D] of the prompt and the call in this layer."""
        first = self._first(k.shape[1], self.config.window(layer))
        before = self.layers[layer]
        k, v = torch.cat([before[0], k], 1), torch.cat([before[1], v], 1)
        return k[:, first:], v[:, first:]


class _Keeping:
    """A cache that starts empty and keeps what a single call gives it."""

    length = 0

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def positions(self, new: int, window: int | None) -> Tensor:
        return torch.arange(new)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.layers.append((k, v))
        return k, v


def _run(model: Decoder, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return k and v [1, n, Hk, D] of each layer for embeddings x [1, n, H] that begin a row."""
    kept = _Keeping()
    cache = model.shared_keys(kept)
    ids = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)  # for the shape alone
    added: Tensor | None = None
    for block, view in zip(model.model.layers, model.views(ids), strict=True):
        x, added = block(x, added, view, cache)
    return kept.layers


# ---- the methods ----


class PromptMethod(Method[P]):
    """The base class of the three methods that train a prompt."""

    @abstractmethod
    def new_part(self, model: Decoder, config: P) -> PromptPart:
        """Return a new prompt for `model`."""

    def plan(self, model: nn.Module, config: P) -> Plan:
        """Plan a prompt before the first position; `model` must be a decoder of lorakit's."""
        if not isinstance(model, Decoder):
            raise LorakitError(
                "attach: a prompt goes on a lorakit Decoder (see load_model), not on a "
                f"{type(model).__name__}"
            )
        self.check_model(model.config)
        if any(model.config.linear_layers):
            raise LorakitError(
                "attach: a prompt is keys and values, and layers of linear attention have none; "
                "take another method, such as LoRA"
            )
        plan = Plan(model)
        beginning = plan.wrap("beginning", Prompt)
        assert beginning is not None, "a decoder has one beginning"
        plan.add(beginning, self.new_part(model, config).to(model.device))
        return plan

    def check_model(self, config: ModelConfig) -> None:
        """Raise LorakitError for a model that cannot have such a prompt."""
        if config.hidden_size_per_layer_input:
            raise LorakitError(
                "attach: the positions of a learned prompt are no tokens, so that the model's "
                "second embedding (embed_tokens_per_layer) has nothing for them; use LoRA"
            )

    def config_values(self, model: nn.Module, name: str, config: P) -> dict[str, Any]:
        """Return every field, and the sizes of the model that the prompt is for."""
        assert isinstance(model, Decoder), "only a decoder has a prompt"
        heads, width = self.heads_and_width(model.config)
        return fields_of(self, config) | {
            "token_dim": width,
            "num_attention_heads": heads,
            "num_layers": model.config.num_hidden_layers,
            "num_transformer_submodules": 1,
        }

    def heads_and_width(self, model: ModelConfig) -> tuple[int, int]:
        """Return how many heads and features of the model PEFT wants to read."""
        return model.num_attention_heads, model.hidden_size

    def read_config(self, files: AdapterFiles, model: nn.Module) -> P:
        """Return the config of a finished prompt: a file never holds the network that made it."""
        return config_from(self.config_type, files, inference_mode=True)

    def key(self, place: str, ending: str) -> str:
        """Return the ending alone: a prompt belongs to no module."""
        return ending


class PromptTuning(PromptMethod[PromptTuningConfig]):
    """The method that trains embeddings."""

    peft_type = "PROMPT_TUNING"
    config_type = PromptTuningConfig

    def new_part(self, model: Decoder, config: PromptTuningConfig) -> PromptPart:
        """Return embeddings; raises LorakitError for a text that has no tokens."""
        return PromptPart(config, _first_embeddings(model, config))


@torch.no_grad()
def _first_embeddings(model: Decoder, config: PromptTuningConfig) -> Tensor:
    """Return the embeddings [n, H] that a prompt starts from."""
    n, kind = config.num_virtual_tokens, config.prompt_tuning_init
    if kind == "RANDOM" or config.inference_mode:
        return torch.randn(n, model.config.hidden_size)
    if kind == "SAMPLE_VOCAB":
        ids = torch.randint(model.config.vocab_size, (n,))
    else:
        ids = _tokens_of_text(config)
    return model.embed(ids.to(model.device)[None])[0].float()


def _tokens_of_text(config: PromptTuningConfig) -> Tensor:
    """Return the tokens of prompt_tuning_init_text, int64 [n], repeated or cut off."""
    from lorakit.models.tokenizer_files import load_tokenizer

    text, source = config.prompt_tuning_init_text, config.tokenizer_name_or_path
    assert text is not None, "the config has checked it"
    assert source is not None, "the config has checked it"
    tokens = load_tokenizer(source).encode(text)
    check(bool(tokens), "prompt_tuning_init_text has no tokens")
    n = config.num_virtual_tokens
    return torch.tensor(tokens).repeat(-(-n // len(tokens)))[:n]


class PromptEncoder(PromptMethod[PromptEncoderConfig]):
    """The method that trains a network which makes embeddings, P-tuning."""

    peft_type = "P_TUNING"
    config_type = PromptEncoderConfig

    def new_part(self, model: Decoder, config: PromptEncoderConfig) -> PromptPart:
        """Return embeddings, and their network unless the prompt is finished."""
        n, H = config.num_virtual_tokens, model.config.hidden_size
        embedding, inner = torch.randn(n, H), config.encoder_hidden_size or H
        encoder: nn.Module
        if config.encoder_reparameterization_type == "LSTM":
            encoder = _LSTMEncoder(H, inner, config.encoder_num_layers, config.encoder_dropout)
        else:
            layers = [nn.Linear(H, inner), nn.ReLU(), nn.Linear(inner, inner), nn.ReLU()]
            encoder = nn.Sequential(*layers, nn.Linear(inner, H))
        return PromptPart(config, embedding, None if config.inference_mode else encoder)


class PrefixTuning(PromptMethod[PrefixTuningConfig]):
    """The method that trains keys and values."""

    peft_type = "PREFIX_TUNING"
    config_type = PrefixTuningConfig

    def new_part(self, model: Decoder, config: PrefixTuningConfig) -> PrefixPart:
        """Return keys and values, or with prefix_projection the network that makes them."""
        n = config.num_virtual_tokens
        width = model.config.num_key_value_heads * model.config.head_dim
        whole = 2 * width * model.config.num_hidden_layers
        zero = config.init_weights == "zero"
        if not config.prefix_projection or config.inference_mode:
            prefix = torch.randn(n, whole)
            return PrefixPart(config, prefix.zero_() if zero else prefix)
        embedding, inner = torch.randn(n, width), config.encoder_hidden_size or width
        last = nn.Linear(inner, whole)
        encoder = nn.Sequential(nn.Linear(width, inner), nn.Tanh(), last)
        if zero:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        return PrefixPart(config, embedding, encoder)

    def check_model(self, config: ModelConfig) -> None:
        """Raise LorakitError unless all layers have keys and values of one size."""
        if config.num_kv_shared_layers or config.global_head_dim not in (None, config.head_dim):
            # prompt tuning is refused beside a second embedding
            other = "LoRA" if config.hidden_size_per_layer_input else "LoRA or prompt tuning"
            raise LorakitError(
                "attach: a prefix is keys and values of one size for every layer, which layers of "
                f"this model differ in; use {other}"
            )

    def heads_and_width(self, model: ModelConfig) -> tuple[int, int]:
        """Return the numbers of the heads of keys and values, and of their features."""
        return model.num_key_value_heads, model.num_key_value_heads * model.head_dim
