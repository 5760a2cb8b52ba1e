"""What trains one adapter of a session: its optimizer, its counts, and its state on disk.

A state has the files of a checkpoint of `train` (state.py), and goes on from one too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.adapters.manage import attached
from lorakit.adapters.start import start_adapter
from lorakit.config.errors import LorakitError, check
from lorakit.config.training import OPTIMIZERS, TrainConfig
from lorakit.data.encode import AnyExample, count_labels
from lorakit.files.local import as_path
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer
from lorakit.training import state as run_state
from lorakit.training.adamw import decays
from lorakit.training.device_step import HostStep, read
from lorakit.training.draws import drawing_from, seed_of
from lorakit.training.losses.batch import row_logprobs
from lorakit.training.losses.reference import Reference
from lorakit.training.resume import digest_of_frozen, in_words_of
from lorakit.training.step import backward, check_gradients, prepare
from lorakit.training.stepping import run_optimizer
from lorakit.training.trainable import TrainedAdapter

LossFunction = Callable[[list[Tensor], list[int]], Tensor]
"""f(logprobs, rows) -> loss []: of some rows, given by their numbers in the call, the fp32
log-probabilities of the tokens that are learned."""


@dataclass(frozen=True)
class Learned:
    """What a call of `forward_backward` tells."""

    loss: float
    """The mean loss: over the label tokens, of other objectives than sft over the rows; of a
    function its sum."""
    count: int
    """How many label tokens or rows the loss is the mean of; 1 of a function."""
    tokens: int
    """How many tokens the rows have, prompts included and padding not."""
    logprobs: list[list[float]]
    """Of a function: the log-probabilities of each row's learned tokens. Named losses form none."""


class Stepped(NamedTuple):
    """What a step tells."""

    step: int
    """How many steps the adapter has taken, this one included."""
    grad_norm: float
    """The norm of its gradients before they were clipped."""
    taken: bool
    """Whether it was taken; not if loss or gradients are not finite."""


class Learner:
    """Trains the adapter of a model that is selected when it is made.

    The config's groups of parameters and optimizer are used; its rates come with each step. Raises
    LorakitError if the adapter is merged, starts from rows, or the model is float16.
    """

    def __init__(self, model: Decoder, config: TrainConfig, name: str):
        self.name, self.config = name, config
        self.part = TrainedAdapter(model)
        with drawing_from(config.seed):
            start_adapter(model, _no_rows)
        self.named = list(self.part.parameters())
        self.params = list(self.part.trained().values())
        if OPTIMIZERS[config.optim][1]:
            with suppress(OSError):  # the optimizer says that it has no place for pages
                as_path(config.output_dir).mkdir(parents=True, exist_ok=True)
        self.optimizer, self.shares = run_optimizer(self.part, config)
        self.steps = self.batches = self.count = 0  # of them count is since the last step
        self.losses: list[Tensor] = []  # and these too
        self.loss: str | None = None  # their name
        self.before: Reference | None = None
        self.checked = False
        self.forget_gradients()

    def trains_what_is_there(self) -> bool:
        """Return whether the adapter of this name is still the one that the optimizer moves."""
        layers = attached(self.part.model).values()
        parts = [each.adapters[self.name] for each in layers if self.name in each.adapters]
        there = {id(p) for part in parts for p in part.parameters()}
        return any(id(p) in there for p in self.params)

    # ---- gradients ----

    def check_loss(self, name: str) -> None:
        """Raise LorakitError unless gradients of a loss can be added to those that wait."""
        if self.losses and name != self.loss:
            raise LorakitError(
                f"forward_backward: gradients of {self.loss} wait for optim_step; those of {name} "
                "are means over something else and cannot be added"
            )
        self.loss = name

    @contextmanager
    def adding(self, count: int) -> Iterator[int]:
        """Add gradients in the block, whose mean is over `count` more than that of those there are.

        Yields what the mean is over. An error in the block forgets all gradients, since some may be
        added and some not.
        """
        before, self.count = self.count, self.count + count
        try:
            if before:
                there = [p.grad for p in self.params if p.grad is not None]
                torch._foreach_mul_(there, before / self.count)
            yield self.count
        except BaseException:
            self.forget_gradients()
            raise

    def learn(
        self, examples: Sequence[AnyExample], batches: Sequence[list[int]], config: TrainConfig
    ) -> Learned:
        """Add the gradients of the mean loss of batches of examples by the config's objective."""
        number = self.batches + 1  # a batch draws by its number, as in a run
        step = prepare(self.part.model, examples, number, batches, config, None)
        if not step.count:
            raise LorakitError("forward_backward: no row has a token that is learned")
        reference = self._reference() if config.compares else None
        with self.adding(step.count) as total:
            losses, _ = backward(self.part.model, replace(step, count=total), config, reference)
            self.add(losses.unbind(), len(batches))
        return Learned(float(losses.sum()) / step.count, step.count, step.tokens, [])

    def learn_by(
        self,
        function: LossFunction,
        examples: Sequence[AnyExample],
        batches: Sequence[list[int]],
        config: TrainConfig,
    ) -> Learned:
        """Add the gradients of a function of the log-probabilities of batches of examples."""
        model, losses, found = self.part.model, list[Tensor](), list[list[float]]()
        check(all(map(count_labels, examples)), "forward_backward: a row has nothing to learn")
        with self.adding(0):
            for rows in batches:
                some = [examples[i] for i in rows]
                with drawing_from(seed_of(config.seed, self.batches), model.device):
                    logprobs = row_logprobs(model, some, config)
                    loss = function(logprobs, rows)
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                    raise LorakitError(
                        "forward_backward: the function must return a loss [] that is computed "
                        f"from the log-probabilities, not {loss!r}"
                    )
                loss.backward()
                losses.append(loss.detach().float().reshape(()))
                self.add(losses[-1:], 1)
                found += [each.tolist() for each in logprobs]
        tokens = sum(len(each.input_ids) for each in examples)
        return Learned(float(torch.stack(losses).sum()), 1, tokens, found)

    def add(self, losses: Sequence[Tensor], batches: int) -> None:
        """Note the losses of batches, whose gradients are there."""
        self.losses += losses
        self.batches += batches
        if not self.checked:
            check_gradients(self.part.model, self.named)
            self.checked = True

    def _reference(self) -> Reference:
        """Return the adapter as it was when a loss first compared with it."""
        if self.before is None:
            self.before = Reference(self.part.model)
        return self.before

    def step(self, config: TrainConfig) -> Stepped:
        """Take a step with the gradients that are there, and forget them."""
        for group in self.optimizer.param_groups:
            group["betas"] = config.adam_beta1, config.adam_beta2
            group["eps"] = config.adam_epsilon
            group["weight_decay"] = config.weight_decay if decays(group["params"][0]) else 0.0
        rates = [[share * config.peak_learning_rate for share in self.shares]]
        step = HostStep(self.optimizer, self.params, rates, config.max_grad_norm)
        told = read(step(torch.stack(self.losses)).tolist())
        self.forget_gradients()
        self.steps += told.taken
        return Stepped(self.steps, told.norm, told.taken)

    def forget_gradients(self) -> None:
        """Forget gradients and losses since the last step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.losses, self.count, self.loss = [], 0, None

    # ---- states ----

    def save(self, path: Path, tok: Tokenizer) -> None:
        """Write the state to a directory, whole or not at all.

        Raises LorakitError if gradients wait, or `path` holds something else or cannot be written.
        """
        if self.losses:
            raise LorakitError(
                f"save_state: adapter {self.name!r} has gradients, which a state has not: call "
                "optim_step first"
            )
        run_state.recover(path)
        if path.exists() and not (path / run_state.STATE_VALUES).is_file():
            raise LorakitError(f"save_state: {path} is there, and holds no state; choose another")
        tensors = self.part.tensors() | run_state.optimizer_tensors(self.optimizer)
        if self.before is not None:
            tensors |= run_state.reference_tensors(self.before.tensors)
        values = {
            "progress": {"step": self.steps, "batches": self.batches},
            "same": self._same(tok),
            "groups": run_state.group_values(self.optimizer),
            "reference": self.before is not None,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            run_state.write_whole(path, tensors, values, lambda to: self.part.save(to, None))
        except OSError as error:
            raise LorakitError(
                f"save_state: {path} cannot be written ({error.strerror or error})"
            ) from None

    def load(self, path: Path, tok: Tokenizer) -> None:
        """Go on from the state in a directory.

        Raises LorakitError if there is none, or it is damaged or of something else.
        """
        run_state.recover(path)
        if not (path / run_state.STATE_VALUES).is_file():
            raise LorakitError(
                f"load_state: {path} is neither a state of save_state nor a checkpoint of train"
            )
        checkpoint = run_state.Checkpoint(path, 0)
        values = run_state.read_values(checkpoint)
        self._check_same(path, values["same"], tok)
        progress = values["progress"]
        if "step" not in progress:
            raise LorakitError(f"{path} is damaged: its step is missing")
        run_state.restore(checkpoint, values, self.part.restore, self.optimizer)
        if values.get("reference"):
            run_state.restore_reference(path, self._reference().tensors)
        self.steps = progress["step"]
        of_run = self.steps * values["same"].get("gradient_accumulation_steps", 1)
        self.batches = progress.get("batches", of_run)

    def _same(self, tok: Tokenizer) -> dict[str, Any]:
        """Return what a session that goes on from a state shares with the one that wrote it."""
        config = self.config
        return {
            "optim": config.optim,
            "loraplus_lr_ratio": config.loraplus_lr_ratio,
            **self.part.same(tok),
            "model": digest_of_frozen(self.part.model),
        }

    def _check_same(self, path: Path, saved: Mapping[str, Any], tok: Tokenizer) -> None:
        """Raise LorakitError unless the state at `path` is of this model, adapter and optimizer."""
        now = self._same(tok)
        if run_state.has_tensors_of(path, self.part.model):
            now = in_words_of(saved, now)
        if saved.get("model") != now["model"]:
            raise LorakitError(f"load_state: {path} is the state of an adapter of another model")
        for key, value in now.items():
            if saved.get(key) != value:
                raise LorakitError(
                    f"load_state: {path} was written with {key} {saved.get(key)!r}, and adapter "
                    f"{self.name!r} has {value!r}"
                )


def _no_rows() -> Iterable[Mapping[str, Tensor]]:
    raise LorakitError(
        "Session: the adapter starts from rows (init_lora_weights eva): call lorakit.eva first"
    )
