"""How far a run has come: a few numbers that are saved with its checkpoints."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Counts of the steps that are done, and the evaluations so far."""

    step: int = 0
    loss: float = math.nan
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    bad_in_a_row: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float = math.inf
    worse_in_a_row: int = 0  # evaluations since the best one

    def is_evaluated(self) -> bool:
        """Whether the step that is done has been evaluated."""
        return bool(self.evaluations) and self.evaluations[-1]["step"] == self.step

    def add_evaluation(self, result: Mapping[str, float]) -> bool:
        """Note an evaluation of the step that is done. Return whether it is the best one so far."""
        self.evaluations.append({"step": self.step, **result})
        better = result["loss"] < self.best_loss
        if better:
            self.best_step, self.best_loss, self.worse_in_a_row = self.step, result["loss"], 0
        else:
            self.worse_in_a_row += 1
        return better

    def has_lost_patience(self, patience: int | None) -> bool:
        """Whether `patience` evaluations in a row were worse than the best one."""
        return patience is not None and self.worse_in_a_row >= patience
