"""What the steps of GRPO learn from: completions of the step's prompts, graded by rewards.

    prompts of the step x num_generations  ->  completions  ->  rewards  ->  advantages

    advantage = (reward - mean of its prompt's) / (standard deviation + 1e-4)
                                                                                (arXiv:2402.03300)

The standard deviation is that of the prompt's rewards or of the step's, or there is none
(arXiv:2503.20783). Completions of equal rewards have advantage 0, and nothing is learned of them:
without a beta their gradients are exactly 0, so they are not computed. They count in what the loss
is divided by, as if they were.

With several processes each samples and grades the prompts of its share, and all get all of it. They
deal the batches of completions as they deal those of other rows.

rollouts.jsonl has a line for each completion of the steps that are done.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorakit import kernels
from lorakit.config.errors import LorakitError
from lorakit.config.grpo import GrpoConfig, ScaleRewards
from lorakit.config.training import TrainConfig
from lorakit.data.encode import IGNORE, Example
from lorakit.data.examples import Examples
from lorakit.data.schemas import Prompt
from lorakit.evaluation.share import Share
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer
from lorakit.training.log import say
from lorakit.training.losses.batch import Batch, collated
from lorakit.training.losses.graded import TOLD, GradedBatch
from lorakit.training.losses.grpo import divisor
from lorakit.training.rollouts.rewards import Graded, RewardFunction, Rewards
from lorakit.training.rollouts.sampler import Asked, Completion, Sampler
from lorakit.training.step import Prepared


@dataclass
class Rollout:
    """The graded completions that one or more steps learn from."""

    step: int
    """The first of these steps."""
    asked: list[Asked]
    """What was asked for."""
    completions: list[Completion]
    """The completions, in the same order."""
    rewards: dict[str, list[float]]
    """The rewards of all completions, by name."""
    totals: list[float]
    """Their weighted sums."""
    advantages: list[float]
    """The advantage of each completion."""
    seconds: float
    """How long sampling and grading took."""
    old: list[list[float]] = field(default_factory=list)
    """The trainer's own log-probabilities at the first step, if it is done and others follow."""
    parts: list[list[int]] = field(default_factory=list)
    """The completions of each batch, by number."""
    batches: list[Batch] = field(default_factory=list)
    """The batches, on the model's device."""


def advantages_of(rewards: Sequence[float], group: int, scale: ScaleRewards) -> list[float]:
    """Return the advantages of completions, those of a prompt one after the other.

    Args:
        rewards: The reward of each completion.
        group: The number of completions of each prompt.
        scale: What advantages are divided by, as `GrpoConfig` says it.
    """
    above = _above_the_first(rewards, group)
    found = above - above.mean(1, keepdim=True)
    if scale == "group":
        found = found / (above.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        found = found / (torch.tensor(rewards, dtype=torch.float64).std() + 1e-4)
    return found.flatten().tolist()


def _above_the_first(rewards: Sequence[float], group: int) -> Tensor:
    """Return how far each reward is above the first of its prompt, fp64 [prompts, group].

    So rewards that are equal are exactly 0, and so is what follows from them: the mean of equal
    numbers may be rounded.
    """
    values = torch.tensor(rewards, dtype=torch.float64).view(-1, group)
    return values - values[:, :1]


class Rollouts:
    """The rollouts of a run; `prepare` makes its steps.

    Raises LorakitError if the model cannot be sampled, a reward is not there, or a row lacks what
    it is compared with.
    """

    def __init__(
        self,
        model: Decoder,
        tok: Tokenizer,
        examples: Examples,
        config: TrainConfig,
        functions: Mapping[str, RewardFunction],
        share: Share,
    ):
        assert config.grpo is not None
        self.model, self.examples, self.config, self.share = model, examples, config, share
        self.settings: GrpoConfig = config.grpo
        self.rewards = Rewards(self.settings.rewards, functions)
        self.rewards.check_columns(examples.rows)
        self.sampler = Sampler(model, tok, config, max(examples.lengths))
        self.current: Rollout | None = None

    def prepare(
        self, number: int, rows: Sequence[int], keep: Callable[[], None] | None = None
    ) -> Prepared:
        """Return a step whose prompts have these numbers, and sample if it is the first of them.

        Args:
            number: The number of the step.
            rows: The numbers of its prompts.
            keep: Writes a checkpoint of the step before, which no other step may lose. It is called
                if a reward fails, or two Ctrl-C end it, in a run of one process: of several, the
                others would not know that they are to come for it.

        Raises:
            LorakitError: A reward fails.
        """
        first = number - (number - 1) % self.settings.num_iterations
        rollout = self.current
        if rollout is None or rollout.step != first:
            try:
                rollout = self.current = self._sampled(first, rows)
            except (LorakitError, KeyboardInterrupt):
                if keep is not None and number > 1 and self.share.size == 1:
                    keep()
                    say(f"lorakit: step {number - 1} is saved; resume: auto goes on from there")
                raise
        if not rollout.batches:
            self._collate(rollout)
        lengths = [[_length(rollout, i) for i in part] for part in rollout.parts]
        tokens = sum(map(sum, lengths))
        padded = sum(len(part) * max(part) for part in lengths)
        return Prepared(
            number=number,
            rows=list(rows),
            parts=len(lengths),
            batches=self.share.rounds(rollout.batches),
            packed=[],
            count=divisor(
                self.settings.loss_type,
                len(rollout.completions),
                self._learned(rollout),
                self.settings.max_completion_length,
            ),
            tokens=tokens,
            computed=tokens if self.config.packing else padded,
        )

    def _sampled(self, step: int, rows: Sequence[int]) -> Rollout:
        """Let each process sample and grade the prompts of its share, and return all of it."""
        started = time.perf_counter()
        group = self.settings.num_generations
        mine = [
            Asked(row, i, self.examples[row].input_ids)
            for row in self.share.of(rows)
            for i in range(group)
        ]
        completions = self.sampler(step, mine)
        graded = [
            Graded(self._row(each.row), completion.text)
            for each, completion in zip(mine, completions, strict=True)
        ]
        rewards = self.rewards(graded)
        packed = [
            json.dumps(
                [
                    mine[i : i + group],
                    completions[i : i + group],
                    {name: values[i : i + group] for name, values in rewards.items()},
                ]
            )
            for i in range(0, len(mine), group)
        ]
        asked, done = list[Asked](), list[Completion]()
        every: dict[str, list[float]] = {each.name: [] for each in self.settings.rewards}
        for text in self.share.collect(packed):
            some, texts, values = json.loads(text)
            asked += [Asked(*each) for each in some]
            done += [Completion(*each) for each in texts]
            for name, numbers in values.items():
                every[name] += numbers
        totals = self.rewards.total(every)
        advantages = advantages_of(totals, group, self.settings.scale_rewards)
        seconds = time.perf_counter() - started
        return Rollout(step, asked, done, every, totals, advantages, seconds)

    def _row(self, number: int) -> Prompt:
        row = self.examples.rows[self.examples.numbers[number]]
        assert isinstance(row, Prompt)  # `encode_for` has seen to it
        return row

    def _counts(self, completion: Completion) -> bool:
        """Return whether a completion is learned from."""
        return not (completion.truncated and self.settings.mask_truncated_completions)

    def _learned(self, rollout: Rollout) -> int:
        """Return how many tokens are learned from."""
        return sum(len(each.tokens) for each in rollout.completions if self._counts(each))

    def _example(self, rollout: Rollout, i: int) -> Example:
        prompt, tokens = rollout.asked[i].prompt, rollout.completions[i].tokens
        return Example(prompt + tokens, [IGNORE] * len(prompt) + tokens)

    # ---- batches ----

    def _collate(self, rollout: Rollout) -> None:
        """Make the batches of a rollout, of completions of like length."""
        size = self.config.rows_at_a_time
        order = sorted(self._computed(rollout), key=partial(_length, rollout))
        rollout.parts = [order[i : i + size] for i in range(0, len(order), size)]
        for part in rollout.parts:
            batch = collated(self.model, [self._example(rollout, i) for i in part], self.config)
            rollout.batches.append(batch._replace(graded=self._graded(rollout, part)))

    def _computed(self, rollout: Rollout) -> list[int]:
        """Return the completions whose gradients may be other than 0, or else the shortest one."""
        every = range(len(rollout.completions))
        if self.settings.beta > 0:  # all have a distance
            return list(every)
        graded = [
            i for i in every if rollout.advantages[i] and self._counts(rollout.completions[i])
        ]
        return graded or [min(every, key=partial(_length, rollout))]

    def _graded(self, rollout: Rollout, part: Sequence[int]) -> GradedBatch:
        some = [rollout.completions[i] for i in part]
        lengths = torch.tensor([len(each.tokens) for each in some])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        counts = mask & torch.tensor([self._counts(each) for each in some])[:, None]
        given = [
            mask,
            counts,
            torch.tensor([rollout.advantages[i] for i in part]),
            _filled(mask, [each.logprobs for each in some]),
        ]
        if rollout.old:
            given.append(_filled(mask, [rollout.old[i] for i in part]))
        return GradedBatch(*(kernels.dispatch.sent(each, self.model.device) for each in given))

    # ---- what is told, and what is saved ----

    def told(self, step: Prepared) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return what the log says of a step that was taken, and its completions if they are new.

        All processes call it.
        """
        rollout = self.current
        assert rollout is not None
        told = self._told_of_tokens(rollout)
        if step.number != rollout.step:
            return told, []
        lines = [self._line(rollout, i) for i in range(len(rollout.completions))]
        return {**told, **self._told_of_rewards(rollout)}, lines

    def _told_of_tokens(self, rollout: Rollout) -> dict[str, float]:
        """Return the means over the tokens that a step computes; each process has some."""
        notes = [each.graded.told for each in self.share.of(rollout.batches) if each.graded]
        mine = [json.dumps(note.tolist()) for note in notes if note is not None]
        rows = torch.tensor([json.loads(text) for text in self.share.collect(mine)])
        each = (rollout.completions[i] for part in rollout.parts for i in part)
        count = sum(len(completion.tokens) for completion in each if self._counts(completion))
        means = rows[:, :-1].double().sum(0) / max(1, count)
        return dict(zip(TOLD, [*means.tolist(), rows[:, -1].max().item()], strict=True))

    def _told_of_rewards(self, rollout: Rollout) -> dict[str, float]:
        lengths = [len(each.tokens) for each in rollout.completions]
        spread = _above_the_first(rollout.totals, self.settings.num_generations).std(1)
        cut = [each.truncated for each in rollout.completions]
        means = {name: sum(each) / len(each) for name, each in rollout.rewards.items()}
        return {
            "reward": math.fsum(rollout.totals) / len(rollout.totals),
            "reward_std": spread.mean().item(),
            "frac_reward_zero_std": (spread == 0).double().mean().item(),
            **{f"reward_{name}": mean for name, mean in means.items()},
            "completion_length": sum(lengths) / len(lengths),
            "completion_length_max": max(lengths),
            "truncated_completions": sum(cut) / len(cut),
            "rollout_seconds": rollout.seconds,
        }

    def _line(self, rollout: Rollout, i: int) -> dict[str, Any]:
        """Return the line of rollouts.jsonl of a completion."""
        row, completion = self._row(rollout.asked[i].row), rollout.completions[i]
        return {
            "step": rollout.step,
            "row": row.place,
            "prompt": row.prompt,
            "completion": completion.text,
            "tokens": len(completion.tokens),
            "truncated": completion.truncated,
            "rewards": {name: values[i] for name, values in rollout.rewards.items()},
            "reward": rollout.totals[i],
            "advantage": rollout.advantages[i],
        }

    def saved(self, step: int) -> dict[str, Any] | None:
        """Return what a checkpoint after a step holds; None if the next one samples.

        All processes call it, and each gives the log-probabilities of its share.
        """
        rollout = self.current
        if step % self.settings.num_iterations == 0 or rollout is None:
            return None
        mine = []
        for batch in self.share.of(rollout.batches):
            assert batch.graded is not None
            assert batch.graded.old is not None  # a step was taken
            rows = zip(batch.graded.old.tolist(), batch.graded.mask.sum(1).tolist(), strict=True)
            mine.append(json.dumps([values[:n] for values, n in rows]))
        old: list[list[float]] = [[] for _ in rollout.completions]
        for part, text in zip(rollout.parts, self.share.collect(mine), strict=True):
            for i, values in zip(part, json.loads(text), strict=True):
                old[i] = values
        names = ("step", "asked", "completions", "rewards", "totals", "advantages", "seconds")
        return {name: getattr(rollout, name) for name in names} | {"old": old}

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from what a checkpoint held. Raises LorakitError if it is damaged."""
        if saved is None:
            return
        try:
            asked = [Asked(*each) for each in saved["asked"]]
            completions = [Completion(*each) for each in saved["completions"]]
            self.current = Rollout(**{**saved, "asked": asked, "completions": completions})
        except (KeyError, TypeError) as error:
            raise LorakitError(f"resume: the checkpoint's rollouts are damaged ({error})") from None


def _length(rollout: Rollout, i: int) -> int:
    """Return the tokens of a completion and its prompt."""
    return len(rollout.asked[i].prompt) + len(rollout.completions[i].tokens)


def _filled(mask: Tensor, rows: Sequence[Sequence[float]]) -> Tensor:
    """Return numbers at the places of a mask, fp32 [B, T], 0 elsewhere."""
    values = torch.tensor([value for row in rows for value in row], dtype=torch.float32)
    return torch.zeros(mask.shape).masked_scatter(mask, values)
