"""The settings of learning by rewards: what is sampled, what it is worth, and the loss.

The names are those of TRL's GRPOConfig, where it has one.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lorakit.config.errors import LorakitError, check
from lorakit.config.fields import check_positive, check_types, from_mapping
from lorakit.config.patterns import valid_regex

LossType = Literal["grpo", "dr_grpo", "dapo", "cispo", "gspo"]
ScaleRewards = Literal["group", "batch", "none"]
LOSS_TYPES = get_args(LossType)
BUILT_IN = ("exact_match", "numeric_answer", "regex", "length", "json_schema")


@dataclass(frozen=True)
class RewardConfig:
    """Settings of one reward."""

    name: str
    """Reward: "exact_match", "numeric_answer", "regex", "length", "json_schema", a name that
    `lk.train` was given a function for, or the function of a file, as "rewards.py:brevity", which
    runs your code."""
    weight: float = 1.0
    """Factor of this reward in the sum of all."""
    column: str = "answer"
    """Field of the row that exact_match and numeric_answer compare with."""
    pattern: str | None = None
    """Regular expression that regex looks for."""
    length: int | None = None
    """Number of characters that length wants."""
    schema: dict[str, Any] | None = None
    """JSON schema that json_schema wants a completion to fit, as a mapping."""

    def __post_init__(self) -> None:
        check_types(self)
        of = {"pattern": "regex", "length": "length", "schema": "json_schema"}
        for name, wanted in of.items():
            given = getattr(self, name) is not None
            if given != (self.name == wanted):
                says = f"goes with {wanted} alone" if given else "is missing"
                raise LorakitError(f"reward {self.name}: {name} {says}")
        if self.pattern is not None and not valid_regex(self.pattern):
            raise LorakitError(f"reward regex: {self.pattern!r} is no valid regular expression")
        check_positive(self, "length", or_null=True)


@dataclass(frozen=True)
class GrpoConfig:
    """Settings of objective grpo: the completions of a prompt, their rewards and the loss."""

    rewards: list[RewardConfig] = field(default_factory=list)
    """Rewards, whose weighted sum is learned: a list of names, or of mappings with the keys
    below."""
    num_generations: int = 8
    """Number of completions of each prompt, at least 2. A step has per_device_train_batch_size *
    gradient_accumulation_steps completions, of as many prompts as that makes."""
    max_completion_length: int = 256
    """Largest number of tokens of a completion. They come on top of max_seq_length, which the
    prompt may have."""
    temperature: float = 1.0
    """Temperature that completions are sampled with, and that their probabilities are taken at."""
    top_p: float = 1.0
    """Share of the probability that the tokens which may be drawn hold together."""
    loss_type: LossType = "dapo"
    """Loss: "dapo" averages over the tokens of the step, "grpo" over those of each completion,
    "dr_grpo" divides by the largest length, "cispo" clips weights alone, and "gspo" takes the
    ratio of a whole completion."""
    beta: float = 0.0
    """Weight of the distance (KL) from the model as it was before the first step; 0 computes
    none."""
    num_iterations: int = 1
    """Number of steps that learn from the same completions."""
    epsilon: float = 0.2
    """How far below 1 a ratio of probabilities counts."""
    epsilon_high: float | None = None
    """How far above 1 a ratio counts, and for cispo the largest weight; null takes epsilon, and
    for cispo 5."""
    scale_rewards: ScaleRewards = "group"
    """What advantages are divided by: the standard deviation of the rewards of the same prompt
    ("group") or of the step ("batch"), or nothing ("none")."""
    mask_truncated_completions: bool = False
    """Learn nothing from completions that max_completion_length cut off."""

    def __post_init__(self) -> None:
        check_types(self)
        check(bool(self.rewards), "grpo needs rewards; name one, such as exact_match")
        check_positive(self, "max_completion_length", "num_iterations", "temperature", "epsilon")
        check_positive(self, "epsilon_high", or_null=True)
        check(self.num_generations >= 2, "num_generations must be at least 2")
        check(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be in (0, 1]")
        check(self.beta >= 0, f"beta is {self.beta}; in grpo it must not be negative")
        names = [reward.name for reward in self.rewards]
        for name in names:
            check(names.count(name) == 1, f"reward {name!r} is there twice: keep one")

    def check_run(self, rows_of_step: int | None, others: list[str]) -> None:
        """Raise LorakitError for what does not go with these settings in a run.

        Args:
            rows_of_step: The number of completions of a step, or None if the memory decides it.
            others: Settings that were given and that GRPO has none of.
        """
        n = self.num_generations
        if rows_of_step is None or rows_of_step % n:
            raise LorakitError(
                f"a step of grpo is made of groups of {n} completions (num_generations): let "
                "per_device_train_batch_size * gradient_accumulation_steps be a multiple of it"
            )
        if others:
            raise LorakitError(f"objective grpo has no {others[0]}; leave it out")

    @property
    def highest(self) -> float:
        """Number that a ratio is clipped to from above, or in cispo a weight."""
        if self.loss_type == "cispo":
            return 5.0 if self.epsilon_high is None else self.epsilon_high
        return 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)


def grpo_config(values: Any, where: str) -> GrpoConfig | None:
    """Return the settings that a mapping of a run file holds; None for null.

    Raises LorakitError if a name or a value is wrong.
    """
    if values is None:
        return None
    if isinstance(values, dict) and isinstance(values.get("rewards"), list):
        rewards = [
            from_mapping(
                RewardConfig, {"name": item} if isinstance(item, str) else item, f"{where}, rewards"
            )
            for item in values["rewards"]
        ]
        values = {**values, "rewards": rewards}
    return from_mapping(GrpoConfig, values, where)
