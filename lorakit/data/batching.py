"""The order of the rows of a run, and the tensors of a batch.

The rows that a step takes are a function of the seed, the lengths of the rows, the settings and the
number of the step. So a checkpoint saves nothing of the order. Without `group_by_length` the
lengths do not matter, unless the rows are packed.
"""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.config.training import TrainConfig
from lorakit.data.encode import IGNORE, Example
from lorakit.data.examples import Examples
from lorakit.data.packing import pack_rows


class Order:
    """Which rows each step takes.

    `total` is the number of steps of the run, and `largest` the most tokens that a batch may have,
    the padding included.
    """

    def __init__(self, examples: Examples, config: TrainConfig):
        self.lengths, self.config = examples.lengths, config
        self._rows_of_one = 1 + config.pairs  # a pair is two rows
        grpo = config.grpo
        self._completion = 0 if grpo is None else grpo.max_completion_length
        self._repeats = 1 if grpo is None else grpo.num_iterations
        self.packs: list[list[int]] | None = None
        if config.packing and grpo is None:
            self.packs = packs(self.lengths, config)
        self.epoch, self.micro_batches = -1, list[list[int]]()
        self._load(0)
        self.largest = self._largest()
        self.per_epoch = self._repeats * math.ceil(len(self.micro_batches) / self._accumulate)
        self.total = config.max_steps or math.ceil(config.num_train_epochs * self.per_epoch)

    def _load(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        self.epoch, config = epoch, self.config
        if self.packs is None:
            lengths = self.lengths if config.group_by_length else [0] * len(self.lengths)
            size = config.rows_at_a_time if config.grpo is None else config.prompts_of_step
            self.micro_batches = batches(lengths, size, config.seed, epoch)
        else:
            self.micro_batches = list(self.packs)
            random.Random(f"{config.seed}/{epoch}").shuffle(self.micro_batches)

    def _largest(self) -> int:
        if self.packs is not None:
            return max(sum(self.lengths[i] for i in pack) for pack in self.packs)
        longest = max(self.lengths) + self._completion
        return self.config.rows_at_a_time * longest * self._rows_of_one

    @property
    def _accumulate(self) -> int:
        """Number of micro-batches of a step; the prompts of GRPO are sampled all at once."""
        return 1 if self.config.grpo is not None else self.config.batches_of_step

    def step(self, step: int) -> list[list[int]]:
        """Return the micro-batches of step 1, 2, ...: lists of row numbers.

        Of GRPO it is one list, the prompts, which are the same in `num_iterations` steps.
        """
        epoch, i = divmod(step - 1, self.per_epoch)
        self._load(epoch)
        i, accumulate = i // self._repeats, self._accumulate
        return self.micro_batches[i * accumulate : (i + 1) * accumulate]


def packs(lengths: Sequence[int], config: TrainConfig) -> list[list[int]]:
    """Return the row numbers of packed batches, in no order of their own.

    A pair is two rows, whose lengths are given as one.
    """
    size = config.rows_at_a_time * config.max_seq_length * (1 + config.pairs)
    return pack_rows(lengths, size)


def in_order(lengths: Sequence[int], config: TrainConfig) -> list[list[int]]:
    """Return the row numbers of batches that keep the order of the rows, or are packed."""
    if config.packing:
        return packs(lengths, config)
    numbers, size = range(len(lengths)), config.rows_at_a_time
    return [list(numbers[i : i + size]) for i in range(0, len(numbers), size)]


def batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the row numbers of an epoch's batches: shuffled, yet rows of like length together.

    Rows are shuffled, sorted by length within groups of 16 batches, and cut into batches, which are
    shuffled. So the order is random across groups, while a batch holds little padding. Only seed
    and epoch decide the order.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    group = 16 * batch_size
    cut = []
    for i in range(0, len(order), group):
        chunk = sorted(order[i : i + group], key=lengths.__getitem__)
        cut += [chunk[j : j + batch_size] for j in range(0, len(chunk), batch_size)]
    rng.shuffle(cut)
    return cut


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return input_ids and labels of examples, int64 [B, longest], padded on the right.

    The padding is token 0. No real token sees it, and its labels do not count. `real_tokens` tells
    it from the rows.
    """
    longest = max(len(e.input_ids) for e in examples)

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    ids = torch.tensor([pad(e.input_ids, 0) for e in examples])
    labels = torch.tensor([pad(e.labels, IGNORE) for e in examples])
    return ids, labels


def real_tokens(examples: Sequence[Example]) -> Tensor:
    """Return which tokens of `collate`'s batch belong to the examples: bool [B, longest]."""
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    return torch.arange(int(lengths.max())) < lengths[:, None]
