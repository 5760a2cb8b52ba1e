"""The settings of a training run, checked when they are made.

The names are those of transformers' TrainingArguments and of TRL, where they have one. A setting
with a few choices is a Literal: its annotation is the list of the choices.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from lorakit.config.distillation import DistillationConfig
from lorakit.config.errors import LorakitError
from lorakit.config.fields import check_below_one, check_positive, check_share, check_types
from lorakit.config.grpo import GrpoConfig
from lorakit.config.metrics import check_metrics
from lorakit.config.objectives import (
    BY_TOKENS,
    HEADED,
    LOSS_TYPES,
    PAIRS,
    LossType,
    Objective,
    check_loss,
)
from lorakit.config.patterns import valid_regex

Schedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "inverse_sqrt",
]
Optimizer = Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "muon"]
OverLength = Literal["truncate", "drop", "raise", "split"]
TrainOn = Literal["completion", "last_turn", "all"]
MLPActivations = Literal["auto", "keep", "recompute"]
CudaGraph = Literal["auto", "off"]
Reduce = Literal["ordered", "fast"]
TrackerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]
HubStrategy = Literal["end", "every_save", "checkpoint"]

# The rows and batches that "auto" stands for where the rows of a step are counted: the defaults.
ROWS, BATCHES = 8, 1

# The highest rate of what learns: that of an adapter is some ten times that of the weights
# themselves ("LoRA Without Regret", https://thinkingmachines.ai/blog/lora, 2025).
PEAK_RATES = {"adapter": 2e-4, "full": 2e-5}

SCHEDULES = get_args(Schedule)
OVER_LENGTH = get_args(OverLength)
TRAIN_ON = get_args(TrainOn)
# name -> the bits of AdamW's state, and whether the state is paged
OPTIMIZERS: dict[Optimizer, tuple[int, bool]] = {
    "adamw_torch": (32, False),
    "adamw_8bit": (8, False),
    "paged_adamw_32bit": (32, True),
    "paged_adamw_8bit": (8, True),
    "muon": (32, False),  # of what it leaves to AdamW
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    An optimizer step averages over per_device_train_batch_size x gradient_accumulation_steps rows,
    and each row counts by its label tokens. "auto" stands for its default in this product: the
    rows of a step do not depend on the memory, only how they are split does.
    """

    output_dir: str = "runs/lorakit"
    """Directory for the adapter or the model, metrics.jsonl and the checkpoints."""
    train: Literal["adapter", "full"] = "adapter"
    """What learns: an "adapter", or with "full" the weights of the model, which is saved whole."""
    freeze: list[str] = field(default_factory=list)
    """Regular expressions; with train: full a weight stays as it is if one is found in its name,
    such as "embed_tokens" or "layers\\.[0-9]\\."."""
    max_steps: int | None = None
    """Number of optimizer steps; null lets num_train_epochs decide."""
    num_train_epochs: float = 1.0
    """Number of passes over the rows, unless max_steps is given; it may be a fraction, such as
    0.5."""
    per_device_train_batch_size: int | Literal["auto"] = ROWS
    """Number of rows that are computed at a time; "auto" takes as many as the memory holds."""
    gradient_accumulation_steps: int | Literal["auto"] = BATCHES
    """Number of batches that make one optimizer step, on all processes together; "auto" makes steps
    of the same rows with as few batches as the memory allows."""
    reduce: Reduce = "ordered"
    """Sum of the gradients of several processes: "ordered" adds them batch by batch, with the bytes
    of one process, and "fast" in one go, with other last bits."""
    learning_rate: float | None = None
    """Highest learning rate, which is reached at the end of the warm-up; null takes 2e-4 for an
    adapter, and with train: full a tenth of that, 2e-5."""
    lr_scheduler_type: Schedule = "cosine"
    """Course of the learning rate after a linear warm-up: "constant", "constant_with_warmup" (the
    same), "linear", "cosine", "cosine_with_min_lr", "cosine_with_restarts" or "inverse_sqrt"."""
    warmup_ratio: float = 0.03
    """Share of all steps in which the learning rate rises, unless warmup_steps is given."""
    warmup_steps: int | None = None
    """Number of steps in which the learning rate rises; null lets warmup_ratio decide."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of cosine_with_min_lr, as a share of learning_rate."""
    num_cycles: int = 1
    """Number of times that cosine_with_restarts falls from learning_rate to 0."""
    optim: Optimizer = "adamw_torch"
    """AdamW with fp32 state ("adamw_torch") or 8-bit state ("adamw_8bit"), or with paged state
    ("paged_adamw_32bit", "paged_adamw_8bit"), which on a CPU lies in a file in output_dir; or, with
    train: full, Muon for the matrices of the blocks and AdamW for the rest ("muon")."""
    loraplus_lr_ratio: float | None = None
    """Learning rate of lora_B as a multiple of lora_A's (LoRA+, arXiv:2402.12354), such as 16; null
    gives both the same."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW, from 0 to below 1."""
    adam_beta1: float = 0.9
    """Decay of AdamW's running mean of the gradient, per step."""
    adam_beta2: float = 0.999
    """Decay of AdamW's running mean of the squared gradient, per step."""
    adam_epsilon: float = 1e-8
    """Number that AdamW adds to the divisor of its step."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient; a longer gradient is scaled down to it."""
    max_seq_length: int = 1024
    """Largest number of tokens in a row; over_length says what becomes of longer ones."""
    over_length: OverLength = "truncate"
    """Treatment of a row that is too long: "truncate" (the prompt's start goes first), "drop",
    "raise", or "split", which cuts a text into several rows, so that all of it is learned."""
    skip_empty: bool = False
    """Leave out rows with an empty output or completion, or an empty turn of the assistant, and say
    how many; false stops at an empty output or completion."""
    objective: Objective = "sft"
    """Aim of the training: "sft" learns the rows; "dpo", "orpo", "cpo" and "simpo" learn to prefer
    `chosen` to `rejected`; "kto" learns from completions with a `label`, true for a good one;
    "grpo" learns from rewards of the model's own completions; "distillation" learns what a teacher
    makes of the rows; "classification" learns the `label` of a text, and "reward" a number that is
    higher for `chosen` than for `rejected`."""
    grpo: GrpoConfig | None = None
    """Settings of objective grpo."""
    distillation: DistillationConfig | None = None
    """Settings of objective distillation."""
    loss_type: LossType | None = None
    """Form of the loss: of sft "nll" or "dft", which weighs each token by its probability; of dpo
    "sigmoid", "hinge", "ipo", "robust", "apo_zero" or "apo_down"; of cpo "sigmoid", "hinge" or
    "ipo"; of kto "kto" or "apo_zero_unpaired". Null takes the first."""
    beta: float = 0.1
    """Strength of the preference term in dpo, orpo, cpo, simpo and kto; grpo and distillation have
    their own beta."""
    simpo_gamma: float = 0.5
    """Margin by which SimPO wants the chosen completion to be ahead."""
    desirable_weight: float = 1.0
    """Weight of the good completions in KTO."""
    undesirable_weight: float = 1.0
    """Weight of the bad completions in KTO."""
    center_rewards_coefficient: float = 0.0
    """Weight in objective reward of the squared sum of both rewards, which keeps them near 0."""
    packing: bool = False
    """Put several rows into one instead of padding them. The rows in it do not see each other, and
    it has at most per_device_train_batch_size * max_seq_length tokens."""
    group_by_length: bool = True
    """Put rows of like length into a batch, which saves padding. With false the order of the rows
    follows from their number and the seed alone, so that it is the same for every tokenizer."""
    label_smoothing_factor: float = 0.0
    """Share of each label that is spread over all tokens, from 0 to below 1. In DPO, CPO and SimPO
    it is the share of pairs that are taken to be the wrong way round, below 0.5."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's normalizer in the loss, from 0 to below 1."""
    neftune_noise_alpha: float | None = None
    """Strength of the noise on the embeddings in training (NEFTune, arXiv:2310.05914), such as 5;
    null adds none."""
    train_on: TrainOn = "completion"
    """Tokens that are learned: "completion" (every turn of the assistant in a chat), "last_turn" of
    a chat, or "all"."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the model's blocks, and compute the rest again in backward."""
    activation_offloading: bool = False
    """Keep the inputs of the blocks in host memory; this needs gradient_checkpointing."""
    mlp_activations: MLPActivations = "auto"
    """Two largest activations of each block, gate and up: "keep" holds them for backward,
    "recompute" computes them again, and "auto" keeps those of as many blocks as a GPU has memory
    for."""
    cuda_graph: CudaGraph = "auto"
    """Launch of a step of packed rows on a GPU: "auto" records it as a CUDA graph where that can
    be, and says why where it cannot; "off" launches it op by op."""
    frozen_dtype: Literal["float8"] | None = None
    """Dtype that the frozen weights are multiplied in: "float8", faster and less exact, on NVIDIA
    GPUs from compute capability 8.9 on; null computes in the model's dtype."""
    eval_steps: int | None = None
    """Number of steps between evaluations on the validation rows; null evaluates at the end
    only."""
    eval_metrics: list[str] = field(default_factory=list)
    """Scores of the model's own completions of the validation rows, beside the loss: accuracy,
    macro_f1, weighted_f1, exact_match, partial_match, entity_f1, rouge_l, bleu and chrf."""
    eval_samples: int = 0
    """Number of validation rows, the first ones, whose completions each evaluation writes to
    samples.jsonl; 0 writes none."""
    early_stopping_patience: int | None = None
    """Number of evaluations in a row without a better loss that stop the run; null never stops
    it."""
    load_best_model_at_end: bool = False
    """End with the adapter, or the model, of the best evaluation instead of the last one."""
    save_steps: int | None = None
    """Number of steps between checkpoints, with one more at the end; null writes one only when the
    run is interrupted, or when load_best_model_at_end needs it."""
    save_total_limit: int = 2
    """Number of checkpoints to keep; the one of the best evaluation stays as well."""
    resume: str | None = None
    """Checkpoint to go on from: its directory, or "auto" for the last one in output_dir, if there
    is one; null starts from the beginning, and output_dir must hold no checkpoint."""
    report_to: list[TrackerName] | TrackerName | None = None
    """Other places for the metrics beside metrics.jsonl, one or a list: "tensorboard", "trackio",
    "wandb" and "mlflow"; null has none."""
    push_to_hub: bool = False
    """Upload the adapter or the model to the Hub, with a README.md that tells of the run; false
    uploads nothing."""
    hub_model_id: str | None = None
    """Repository to upload to, "organization/name"; it is made if it is missing."""
    hub_strategy: HubStrategy = "end"
    """Time of the uploads: "end" of the run, "every_save" for each checkpoint's adapter too, or
    "checkpoint" for the last checkpoint too, as last-checkpoint."""
    hub_private_repo: bool | None = None
    """Make a private repository, and upload into no public one; null takes the organization's
    default."""
    seed: int = 0
    """Seed of the order of the rows and of dropout; `lorakit train` starts the adapter from it
    too."""

    def __post_init__(self) -> None:
        check_types(self)
        self._check_full()
        self._check_length()
        self._check_learning_rate()
        check_loss(self)
        self._check_grpo()
        self._check_distillation()
        self._check_evaluation_and_checkpoints()
        self._check_upload()
        if self.activation_offloading and not self.gradient_checkpointing:
            raise LorakitError(
                "activation_offloading keeps what gradient_checkpointing keeps: set that too"
            )
        if not 0 <= self.seed < 2**63:
            raise LorakitError(f"seed is {self.seed}; it must be in [0, 2^63)")

    @property
    def trackers(self) -> list[TrackerName]:
        """The trackers that report_to names, each once."""
        names = self.report_to
        return list(dict.fromkeys(names if isinstance(names, list) else [names] if names else []))

    def _check_full(self) -> None:
        if self.train == "full":
            given = {"loraplus_lr_ratio": self.loraplus_lr_ratio, "frozen_dtype": self.frozen_dtype}
            for name, value in given.items():
                if value is not None:
                    raise LorakitError(f"{name} goes with an adapter, not with train: full")
        elif self.freeze:
            raise LorakitError("freeze goes with train: full; an adapter freezes all other weights")
        elif self.optim == "muon":
            raise LorakitError("optim: muon goes with train: full; an adapter learns by AdamW")
        for pattern in self.freeze:
            if not valid_regex(pattern):
                raise LorakitError(f"freeze: {pattern!r} is no valid regular expression")

    @property
    def splits_itself(self) -> bool:
        """Whether the memory decides how many rows of a step are computed at a time."""
        return "auto" in (self.per_device_train_batch_size, self.gradient_accumulation_steps)

    @property
    def rows_of_step(self) -> int:
        """Number of rows that an optimizer step averages over."""
        rows, steps = self.per_device_train_batch_size, self.gradient_accumulation_steps
        return (ROWS if rows == "auto" else rows) * (BATCHES if steps == "auto" else steps)

    @property
    def rows_at_a_time(self) -> int:
        """Number of rows that are computed at a time.

        Raises LorakitError if the memory still has to decide it.
        """
        return self.rows_of_step // self.batches_of_step

    @property
    def prompts_of_step(self) -> int:
        """Number of prompts whose completions make a step of objective grpo."""
        return self.rows_of_step // (1 if self.grpo is None else self.grpo.num_generations)

    @property
    def batches_of_step(self) -> int:
        """Number of batches that make an optimizer step.

        Raises LorakitError if the memory still has to decide it.
        """
        steps = self.gradient_accumulation_steps
        if steps == "auto" or self.splits_itself:
            raise LorakitError(
                "per_device_train_batch_size or gradient_accumulation_steps is auto, which only a "
                "training run settles: give both as numbers"
            )
        return steps

    def split(self, rows: int) -> "TrainConfig":
        """Return the settings with so many rows at a time and the same rows in a step.

        Raises LorakitError if the rows of a step are no multiple of them.
        """
        steps, rest = divmod(self.rows_of_step, rows)
        if rest:
            raise LorakitError(f"{rows} rows at a time do not divide {self.rows_of_step} of a step")
        return replace(self, per_device_train_batch_size=rows, gradient_accumulation_steps=steps)

    def _check_length(self) -> None:
        check_positive(self, "max_steps", or_null=True)
        check_positive(self, "num_train_epochs")
        if self.num_train_epochs >= 1e9:
            raise LorakitError("num_train_epochs must be below 10^9")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) != "auto":
                check_positive(self, name)
        if self.max_seq_length < 2:
            raise LorakitError("max_seq_length must be at least 2")

    def _check_learning_rate(self) -> None:
        check_positive(self, "max_grad_norm", "num_cycles")
        check_positive(self, "learning_rate", "loraplus_lr_ratio", or_null=True)
        check_share(self, "warmup_ratio", "min_lr_ratio")
        check_below_one(self, "weight_decay")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise LorakitError(
                f"warmup_steps must be null or not negative, not {self.warmup_steps}"
            )
        schedule = self.lr_scheduler_type
        if self.min_lr_ratio != 0 and schedule != "cosine_with_min_lr":
            raise LorakitError(
                f"min_lr_ratio goes with lr_scheduler_type cosine_with_min_lr, not with {schedule}"
            )
        if self.num_cycles != 1 and schedule != "cosine_with_restarts":
            raise LorakitError(
                f"num_cycles goes with lr_scheduler_type cosine_with_restarts, not with {schedule}"
            )

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate: learning_rate, or the default of what learns."""
        return self.learning_rate or PEAK_RATES[self.train]

    @property
    def pairs(self) -> bool:
        """Whether a row has two answers, a better and a worse one."""
        return self.objective in (*PAIRS, "reward")

    @property
    def compares(self) -> bool:
        """Whether the loss compares the model with a reference, itself before the first step."""
        if self.distillation is not None:
            return self.distillation.compares_with_itself
        return self.objective in ("dpo", "kto") or (self.grpo is not None and self.grpo.beta > 0)

    @property
    def by_tokens(self) -> bool:
        """Whether the loss of a step is a mean over label tokens, and not over rows."""
        return self.objective in BY_TOKENS

    @property
    def form(self) -> LossType | None:
        """The form of the loss: loss_type or the default of the objective, None if it has one."""
        return self.loss_type or LOSS_TYPES.get(self.objective, (None,))[0]

    def _check_grpo(self) -> None:
        """Raise LorakitError for settings that do not go with objective grpo, or without it."""
        if (self.objective == "grpo") != (self.grpo is not None):
            raise LorakitError(
                "objective grpo has its settings in a mapping `grpo`, and the others have none"
            )
        if self.grpo is not None:
            without = {
                "beta (say it in grpo)": self.beta != 0.1,
                "neftune_noise_alpha": self.neftune_noise_alpha is not None,
                "frozen_dtype": self.frozen_dtype is not None,
            }
            others = [name for name, given in without.items() if given]
            self.grpo.check_run(None if self.splits_itself else self.rows_of_step, others)

    def _check_distillation(self) -> None:
        """Raise LorakitError for settings that do not go with objective distillation."""
        if (self.objective == "distillation") != (self.distillation is not None):
            raise LorakitError(
                "objective distillation has its settings in a mapping `distillation`, and the "
                "others have none"
            )
        if self.distillation is not None:
            without = {"beta (say it in distillation)": self.beta != 0.1}
            self.distillation.check_run([name for name, given in without.items() if given])

    def _check_evaluation_and_checkpoints(self) -> None:
        check_positive(self, "eval_steps", "save_steps", "early_stopping_patience", or_null=True)
        check_metrics(self.eval_metrics)
        if self.objective in HEADED and (self.eval_metrics or self.eval_samples):
            raise LorakitError(
                f"eval_metrics and eval_samples are about completions, and objective "
                f"{self.objective} has none: its evaluations say accuracy anyway"
            )
        if self.eval_samples < 0:
            raise LorakitError(f"eval_samples must be 0 or more, not {self.eval_samples}")
        if self.save_total_limit < 1:
            raise LorakitError("save_total_limit must be at least 1")

    def _check_upload(self) -> None:
        repo = self.hub_model_id
        if repo is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo):
            raise LorakitError(f"hub_model_id is {repo!r}; give organization/name")
        if self.push_to_hub and repo is None:
            raise LorakitError("push_to_hub needs a repository: give hub_model_id")
        named = {
            "hub_model_id": repo is not None,
            "hub_strategy": self.hub_strategy != "end",
            "hub_private_repo": self.hub_private_repo is not None,
        }
        for name, given in named.items():
            if given and not self.push_to_hub:
                raise LorakitError(f"{name} uploads nothing by itself: set push_to_hub: true too")
