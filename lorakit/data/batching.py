"""Which rows each step of a run takes: a function of the seed, the rows' lengths and the step, so
that there is nothing of it to save.
"""

import math
import random

from .config import TrainConfig
from .data import Examples, batches
from .packing import pack


class Order:
    """Which rows each step takes: a function of the seed, the lengths and the step."""

    def __init__(self, examples: Examples, config: TrainConfig):
        self.lengths, self.config = examples.lengths, config
        self.packs = None
        if config.packing:
            size = config.per_device_train_batch_size * config.max_seq_length
            size *= 1 if config.objective == "sft" else 2  # a pair is two rows
            self.packs = pack(self.lengths, size)
        self.epoch, self.micro_batches = -1, []
        self._load(0)
        self.per_epoch = math.ceil(len(self.micro_batches) / config.gradient_accumulation_steps)
        self.total = config.max_steps or math.ceil(config.num_train_epochs * self.per_epoch)

    def _load(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        self.epoch, config = epoch, self.config
        if self.packs is None:
            size = config.per_device_train_batch_size
            self.micro_batches = batches(self.lengths, size, config.seed, epoch)
        else:
            self.micro_batches = list(self.packs)
            random.Random(f"{config.seed}/{epoch}").shuffle(self.micro_batches)

    def step(self, step: int) -> list[list[int]]:
        """The micro-batches of step 1, 2, ...: row numbers."""
        epoch, i = divmod(step - 1, self.per_epoch)
        self._load(epoch)
        accumulate = self.config.gradient_accumulation_steps
        return self.micro_batches[i * accumulate : (i + 1) * accumulate]
