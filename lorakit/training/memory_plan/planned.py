"""A run whose memory is to be forecast, as a value that can be changed and forecast again."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from lorakit.adapters.new_tokens import with_rows
from lorakit.adapters.peft_files.load import read_settings
from lorakit.config.adapters import LoraConfig, TargetConfig
from lorakit.config.classifier import ClassifierConfig
from lorakit.config.quantization import QuantConfig
from lorakit.config.run import RunConfig
from lorakit.config.training import TrainConfig
from lorakit.data.packing import pack_rows
from lorakit.kernels.pretend import H100
from lorakit.models.config import ModelConfig
from lorakit.models.empty import empty_model
from lorakit.models.tokenizer import Tokenizer
from lorakit.training.head import head_of_run
from lorakit.training.memory_plan.plan import MemoryPlan, model_config, plan_memory


@dataclass(frozen=True)
class PlannedRun:
    """What a forecast of memory depends on. `forecast` makes it once for each object."""

    model: str | Path | ModelConfig
    """Model: a path, a Hub id or its config. Its weights are not read."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Settings of the training."""
    lora: TargetConfig | None = field(default_factory=LoraConfig)
    """Settings of the adapter; None is a run without one."""
    quantize: QuantConfig | None = None
    """Storage of the frozen weights."""
    dtype: str = "bfloat16"
    """Dtype that the model computes in."""
    lengths: Sequence[int] | None = None
    """Number of tokens of each row; None takes rows of max_seq_length tokens."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device of the run: "cuda" or "cpu"."""
    capability: tuple[int, int] = H100
    """Compute capability of the GPU."""
    ranks: int = 1
    """Number of devices that train together."""
    shard: Literal["auto", "none", "full"] = "none"
    """Whether each device holds its part of the weights only ("full"), or all of them;
    `settled_run` decides "auto", which is "none" until then."""
    offload_weights: bool = False
    """Whether the frozen weights wait in host memory."""
    generate: tuple[int, int, int] | None = None
    """Texts at a time, tokens of a prompt and new tokens, to forecast inference instead."""
    kept_layers: int | None = None
    """Number of blocks that keep gate and up for backward where mlp_activations is "auto";
    `settled_run` decides it, and None stands for all."""
    vocabulary: int = 0
    """Number of tokens that the model is given rows for, if it has fewer."""
    classifier: ClassifierConfig | None = None
    """New head for classes that the model is given."""

    @classmethod
    def from_run(
        cls,
        run: RunConfig,
        lengths: Sequence[int] | None = None,
        tok: Tokenizer | None = None,
        **device: Any,
    ) -> "PlannedRun":
        """Return what the memory of a run file's run depends on.

        Args:
            run: The settings of the run file.
            lengths: The number of tokens of each row, as `encode_rows` says them.
            tok: The tokenizer of the run, with the run's add_tokens. Without it these are taken for
                new ones.
            **device: Further fields: device, capability, ranks.

        Returns:
            The run, to be forecast. The settings of an adapter to go on from are those in its
            files.

        Raises:
            LorakitError: The adapter, or the model that it is for, cannot be read.
        """
        head = head_of_run(run)
        lora: TargetConfig | None = None if run.train.train == "full" else run.lora
        if run.adapter is not None:
            model = empty_model(model_config(run.model, head), torch.float32, None)
            lora = read_settings(run.adapter, model)
        where = {"shard": run.shard, "offload_weights": run.offload_weights, **device}
        given = run.model, run.train, lora, run.quantize, run.dtype, lengths
        planned = cls(*given, classifier=head, **where)
        return planned.with_tokens(run.add_tokens, tok) if run.add_tokens else planned

    def with_tokens(self, tokens: Sequence[str], tok: Tokenizer | None) -> "PlannedRun":
        """Return the run with new tokens, as `add_tokens` gives a model rows for them."""
        size = self.config.vocab_size
        if tok is None:
            ids, vocabulary = list(range(size, size + len(tokens))), size + len(tokens)
        else:
            ids, vocabulary = tok.add_special_tokens(tokens), len(tok)
        lora = self.lora
        if isinstance(lora, LoraConfig):
            headed = self.config.classifier is not None
            lora = with_rows(lora, ids, headed or self.config.tie_word_embeddings)
        return dataclasses.replace(self, lora=lora, vocabulary=vocabulary)

    @cached_property
    def config(self) -> ModelConfig:
        """Config of the model, with the head that it is given."""
        return model_config(self.model, self.classifier)

    @property
    def rows(self) -> int:
        """Number of rows that are computed at a time."""
        return self.train.rows_at_a_time

    @property
    def rows_of_step(self) -> int:
        """Number of rows that make one optimizer step."""
        return self.train.rows_of_step

    def tokens(self) -> int:
        """Return the number of tokens of the longest row, and with objective grpo of a prompt.

        It is max_seq_length at most, and of a pair the longer answer may have so many.
        """
        longest = self.train.max_seq_length
        return longest if not self.lengths else min(longest, max(self.lengths))

    def documents(self) -> list[int] | None:
        """Return the lengths of the rows in the largest packed row; None without packing."""
        if not self.train.packing:
            return None
        if self.train.grpo is not None:  # completions of the longest prompt
            return [self.tokens() + self.train.grpo.max_completion_length] * self.rows
        budget = self.rows * self.train.max_seq_length
        if not self.lengths:
            return [self.train.max_seq_length] * self.rows
        lengths = [min(length, self.train.max_seq_length) for length in self.lengths]
        packs = pack_rows(lengths, budget)
        return max(([lengths[i] for i in pack] for pack in packs), key=sum)

    @cached_property
    def _forecast(self) -> MemoryPlan:
        return plan_memory(
            self.model,
            dtype=self.dtype,
            quantize=self.quantize,
            lora=self.lora,
            train=self.train,
            tokens=self.tokens(),
            documents=self.documents(),
            device=self.device,
            capability=self.capability,
            ranks=self.ranks,
            shard="full" if self.shard == "full" else "none",
            offload_weights=self.offload_weights,
            generate=self.generate,
            kept_layers=self.kept_layers if self.train.mlp_activations == "auto" else None,
            vocabulary=self.vocabulary,
            classifier=self.classifier,
        )

    def forecast(self) -> MemoryPlan:
        """Return the forecast, as `plan_memory` makes it.

        Raises:
            LorakitError: As `plan_memory` does.
        """
        return self._forecast

    def with_train(self, **settings: Any) -> "PlannedRun":
        """Return the run with other settings of the training.

        Raises:
            LorakitError: They cannot be together.
        """
        return dataclasses.replace(self, train=dataclasses.replace(self.train, **settings))

    def with_rows(self, rows: int) -> "PlannedRun":
        """Return the run with so many rows at a time, and as many rows in a step as before.

        Raises:
            LorakitError: They do not divide the rows of a step.
        """
        return dataclasses.replace(self, train=self.train.split(rows))
