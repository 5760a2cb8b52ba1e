"""The settings of objective distillation: the teacher, and what is learned from it."""

from dataclasses import dataclass
from typing import Literal

from lorakit.config.errors import LorakitError, check
from lorakit.config.fields import check_positive, check_share, check_types


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of objective distillation: the teacher, and how the model is compared with it."""

    teacher: str | None = None
    """Model to learn from: a directory, a .gguf file or a Hub id. Null compares with the model as
    it was before the first step."""
    quantize: Literal["nf4", "fp4", "int8"] | None = None
    """Storage of the teacher's weights; null leaves them dense."""
    logits: str | None = None
    """File of the teacher's most likely tokens, which `lorakit teach` writes; training then loads
    no teacher."""
    top_k: int = 64
    """Number of tokens that `lorakit teach` keeps of each position, with their probabilities."""
    beta: float = 0.0
    """Divergence from the teacher: 0 is the forward KL divergence, 1 the reverse one, and what
    lies between the generalized Jensen-Shannon divergence, as 0.5."""
    temperature: float = 1.0
    """Number that the logits of both are divided by."""
    alpha: float = 0.0
    """Share of the plain loss of the labels in the loss, from 0 to 1; the rest is the
    divergence."""

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "temperature", "top_k")
        check_share(self, "beta", "alpha")
        check(
            self.quantize is None or self.teacher is not None,
            "quantize in distillation is about the teacher: name one",
        )

    @property
    def compares_with_itself(self) -> bool:
        """Whether the teacher is the model as it was before the first step."""
        return self.teacher is None and self.logits is None

    def check_run(self, others: list[str]) -> None:
        """Raise LorakitError for what does not go with these settings in a run.

        Args:
            others: Settings that were given and that distillation has none of.
        """
        if others:
            raise LorakitError(f"objective distillation has no {others[0]}; leave it out")
        if self.compares_with_itself and self.alpha == 0:
            raise LorakitError(
                "distillation learns nothing from the model itself: name a teacher, or logits, or "
                "give the labels a share of the loss (alpha)"
            )
