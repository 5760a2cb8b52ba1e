"""What `lorakit.optim` has: the optimizers, the groups of parameters that they train, the rates."""

from lorakit.training.adamw import AdamW, decay_groups, loraplus_groups
from lorakit.training.muon import Muon, muon_groups
from lorakit.training.schedules import learning_rate

__all__ = ["AdamW", "Muon", "decay_groups", "learning_rate", "loraplus_groups", "muon_groups"]
