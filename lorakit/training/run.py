"""A training run: prepare, resume, loop, end.

What a step does follows from its number, the seed and the checkpoint that the run goes on from. So
a run that was killed and resumed ends with the bytes of one that was not. Ctrl-C and SIGTERM end a
run after the current step, with a checkpoint. An evaluation that is due then waits for the run that
goes on from there.

A step whose loss or gradient is not finite is skipped and counted. After BAD_STEPS such steps in a
row the run stops.

On a GPU the host reads the loss of a step when it has issued the next one, so that the device need
not wait for it. `progress.step` is the step that was issued; the rest of `progress`, the log and
the count of bad steps are of the step that was read. An evaluation, a checkpoint, `after_step` and
the end of a run read first. On a CPU, which has nothing to gain, each step is read at once.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.config.training import TrainConfig
from lorakit.data.batching import Order
from lorakit.data.examples import Examples
from lorakit.evaluation.score import score_and_show
from lorakit.evaluation.share import ALL
from lorakit.files.local import as_path
from lorakit.models.decoder import Decoder
from lorakit.models.save import send_parts
from lorakit.models.tokenizer import Tokenizer
from lorakit.training import state as run_state
from lorakit.training.captured import CapturedStep, captured_step
from lorakit.training.cores import FewerThreads
from lorakit.training.device_step import DeviceStep, HostStep, Told
from lorakit.training.interrupt import Flag
from lorakit.training.late import Late
from lorakit.training.log import Log, RunFiles, SilentLog, say
from lorakit.training.losses.batch import padded_batches
from lorakit.training.losses.held_out import HeldOut, held_out_loss
from lorakit.training.losses.teacher import TopTokens, told_by_teacher
from lorakit.training.memory import peak_memory_mb
from lorakit.training.progress import Progress
from lorakit.training.publish import Publisher
from lorakit.training.ranks import Ranks
from lorakit.training.resume import (
    checkpoint_to_resume,
    end_with_the_best,
    must_match,
    reference_of_run,
    resume_from,
)
from lorakit.training.rollouts.rewards import RewardFunction
from lorakit.training.rollouts.rollouts import Rollouts
from lorakit.training.schedules import Rates, scheduled_rate
from lorakit.training.step import Prepared, backward, check_gradients, prepare, split_told
from lorakit.training.stepping import (
    gradient_sum,
    run_optimizer,
    run_update,
    whole_optimizer_state,
)
from lorakit.training.trainable import Trained, is_not_the_models

BAD_STEPS = 10


class Run:
    """One run of `train` into its output directory, which nobody else may write to meanwhile.

    `progress` says how far the run has come, and `ended` whether it came to its end. With sft a
    step tells of its tokens, unless `tells_tokens` is false.
    """

    def __init__(
        self,
        trained: Trained,
        tok: Tokenizer,
        examples: Examples,
        held_out: HeldOut | None,
        config: TrainConfig,
        base_model: str | None,
        ranks: Ranks,
        rewards: Mapping[str, RewardFunction],
        teacher: Decoder | TopTokens | None = None,
        tells_tokens: bool = True,
    ):
        """Prepare the first step, or the one after the checkpoint that the run resumes from."""
        model, self.part = trained.model, trained
        self.model, self.tok, self.config, self.base_model = model, tok, config, base_model
        self.examples, self.held_out, self.ranks = examples, held_out, ranks
        self.output_dir = as_path(config.output_dir)
        self.publisher = Publisher(self.output_dir, model, config, base_model)
        checkpoint = ranks.first(lambda: checkpoint_to_resume(self.output_dir, config))
        torch.manual_seed(config.seed)  # of what starts an adapter
        started = trained.start(lambda: padded_batches(model, examples, config))
        if started is not None:
            say(started)
        self.trained = trained.trained()
        self.optimizer, shares = run_optimizer(trained, config)
        self.order = Order(examples, config)
        validation = None if held_out is None else held_out.examples
        self.same = must_match(trained, tok, examples, validation, config)  # saved with checkpoints
        self.progress = Progress()
        self.rollouts: Rollouts | None = None  # of objective grpo
        if config.grpo is not None:
            self.rollouts = Rollouts(model, tok, examples, config, rewards, ranks.share)
        if checkpoint is not None:
            self.progress = resume_from(checkpoint, trained, self.optimizer, self.same, self.order)
        self.tensors = trained.everything()
        ranks.agree(lambda: {**self.same, **self._sums_of_tensors()})
        self.sums = gradient_sum(trained, config, ranks)
        self.update = self._optimizer_step(shares)
        self.reference = reference_of_run(model, config, checkpoint, teacher)
        if self.rollouts is not None and checkpoint is not None:
            self.rollouts.restore(run_state.read_values(checkpoint).get("rollouts"))
        self.own_tokenizer = is_not_the_models(tok, model)
        self.tells_tokens = tells_tokens and config.objective == "sft"
        self.ended, self.saved = False, self.progress.step  # that of the last checkpoint
        self.reads_late = model.device.type != "cpu" and self.rollouts is None
        self.captured: CapturedStep | None = None  # what takes steps as CUDA graphs, in the loop
        self._prepared: Prepared | None = None  # the next step
        self._begun: tuple[Prepared, Late] | None = None  # the last step, if it was not read
        self._clock = 0.0  # when it began, or the one before it was read

    def open_log(self) -> Log:
        """Return the log of the run, which goes on after the steps that are done."""
        kind = Log if self.ranks.is_writer else SilentLog
        return kind(self.output_dir, self.order.total, self.progress.step, self.config)

    def loop(self, log: Log, stop: Flag, after_step: Callable[[], None] | None) -> None:
        """Take steps until the run has ended or `stop` is set, with evaluations and checkpoints."""
        options = self.order, self.config, self.update, log.say
        self.captured = captured_step(self.model, self.part.layers, *options, self.sums)
        self.threads = FewerThreads(log.say)
        try:
            self._loop(log, stop, after_step)
        finally:
            self.threads.end()
            if self.captured is not None:
                self.captured.end()

    def _loop(self, log: Log, stop: Flag, after_step: Callable[[], None] | None) -> None:
        progress = self.progress
        saved = progress.step  # the step of the last checkpoint, if there is one
        while True:
            stopped = self.ranks.any(stop.is_set())
            evaluated, wanted = self.look(log, stopped)
            # Asked once for the checkpoint and for the end: a signal may come at any moment, and
            # between two questions it would end the run without a checkpoint.
            stopped = self.ranks.any(stop.is_set()) if evaluated else stopped
            if (stopped or wanted) and (progress.step != saved or evaluated):
                self.write_checkpoint(log, upload=not (self.ended or stopped))
                saved = progress.step
            if self.ended or stopped:
                self.read_begun(log)
                return
            self._step(log)
            if after_step is not None:
                self.read_begun(log)
                self.update.clip()
                after_step()
            self.optimizer.zero_grad(set_to_none=True)

    def look(self, log: RunFiles, stopped: bool) -> tuple[bool, bool]:
        """Evaluate the step that is done if that is due, and set `ended`.

        An evaluation that is due when the run is stopped waits for the run that goes on from here.

        Returns whether it was evaluated, and whether the config wants a checkpoint of it.
        """
        due = self.evaluation_is_due()
        evaluated = due and not stopped
        is_best = evaluated and self._evaluate(log)
        self.ended = self._is_done() and evaluated == due
        return evaluated, self._wants_checkpoint(is_best)

    def end(self, log: RunFiles) -> None:
        """Save what the last step or the best evaluation has made, as the config wants, and a card.

        Raises LorakitError if every step was skipped.
        """
        if self.progress.skipped == self.progress.step > 0:
            raise LorakitError(f"train: none of the {self.progress.step} steps was finite")
        if self.ended and self.config.load_best_model_at_end:
            end_with_the_best(self.part, self.output_dir, self.progress, log)
        self._by_the_writer(lambda: self._save_all(log))

    def _save_all(self, log: RunFiles) -> None:
        try:
            self._save(self.output_dir)
        except OSError as error:
            save = self._save if self.part.divided is None else None
            options = self.output_dir, self.part.what, save, error
            raise LorakitError(f"train: {run_state.kept_elsewhere(*options)}") from error
        if self.ranks.is_writer:
            self.publisher.write_card(self.progress, log.say)

    def _by_the_writer(self, function: Callable[[], None]) -> None:
        """Call on rank 0 what writes files; on all ranks if they divide what is written."""
        if self.part.divided is None:
            self.ranks.first(function)
        else:
            self.ranks.together(function)

    def stopped_early(self) -> bool:
        """Whether the evaluations ended the run before its last step."""
        return self.progress.step < self.order.total and self._is_done()

    # ---- between two steps ----

    def _is_done(self) -> bool:
        """Whether all steps are done, or the evaluations have not become better for too long."""
        patience = self.config.early_stopping_patience
        return self.progress.step == self.order.total or self.progress.has_lost_patience(patience)

    def evaluation_is_due(self) -> bool:
        """Whether the step that is done should be evaluated, and was not.

        A run that was interrupted before an evaluation makes up for it when it goes on.
        """
        if self.held_out is None or self.progress.step == 0 or self.progress.is_evaluated():
            return False
        every, step = self.config.eval_steps, self.progress.step
        return step == self.order.total or (every is not None and step % every == 0)

    def _evaluate(self, log: RunFiles) -> bool:
        """Evaluate the step that is done. Return whether it is the best one so far."""
        assert self.held_out is not None
        self.read_begun(log)
        if self.captured is not None:
            self.captured.free()  # what an evaluation needs
        if self.progress.step == self.order.total:
            # before an evaluation that may be cut short
            self._by_the_writer(lambda: self._save(self.output_dir))
        config, size = self.config, self.config.rows_at_a_time
        rows = self.held_out.rows
        # every pass through sharded weights is one of all ranks
        share = self.ranks.share if self.model.mesh is None else ALL
        options = config, self.reference, share
        result = held_out_loss(self.model, self.held_out.examples, size, *options)
        wanted = config.eval_metrics, config.eval_samples
        scores, samples = score_and_show(self.model, self.tok, rows, *wanted, size, share)
        result |= scores
        log.evaluation(self.progress.step, result)
        log.samples(self.progress.step, samples)
        return self.progress.add_evaluation(result)

    def _wants_checkpoint(self, is_best: bool) -> bool:
        """Whether the config wants a checkpoint of the step that is done."""
        every = self.config.save_steps
        if every is not None and (self.ended or self.progress.step % every == 0):
            return True
        return is_best and (self.config.load_best_model_at_end or every is not None)

    def write_checkpoint(self, log: RunFiles, upload: bool, prune: bool = True) -> None:
        """Let rank 0 write a checkpoint of the step that is done, and upload it if `upload`.

        All ranks must have the same adapter, which only other hardware or a defect could change.
        `prune` says whether earlier checkpoints make room, and `saved` is the step if all is
        written.
        """
        self.read_begun(log)
        self.ranks.agree(self._sums_of_tensors)
        rollouts = None if self.rollouts is None else self.rollouts.saved(self.progress.step)
        self._by_the_writer(lambda: self._write(log, rollouts, prune))
        if upload and self.config.hub_strategy != "end":
            now = self.publisher.upload_now
            self.ranks.first(lambda: now(self._save, self.progress, log.say))

    def _sums_of_tensors(self) -> dict[str, int]:
        """Return a sum of the bits of each trained tensor, by name."""
        return {f"tensor {name}": run_state.sum_of_bits(t) for name, t in self.tensors.items()}

    def _write(self, log: RunFiles, rollouts: dict[str, Any] | None, prune: bool) -> None:
        """Write a checkpoint. If the disk is full, say so and go on."""
        step, optimizer, divided = self.progress.step, self.optimizer, self.part.divided
        met = False  # the other ranks in `save`

        def save(path: Path) -> None:
            nonlocal met
            met = True
            self._save(path)

        values: dict[str, Any] = {"progress": asdict(self.progress), "same": self.same}
        try:
            tensors = self.part.tensors()
            # paged state takes disk for it
            tensors |= whole_optimizer_state(self.part, optimizer, self.ranks)
            values["groups"] = run_state.group_values(optimizer)
            if self.reference is not None:
                tensors |= run_state.reference_tensors(self.reference.tensors)
            values["reference"] = self.reference is not None
            if rollouts is not None:
                values["rollouts"] = rollouts
            if not self.ranks.is_writer:  # it is here for its parts
                save(self.output_dir)
                return
            run_state.write_checkpoint(self.output_dir, step, tensors, values, save)
            self.saved = step
            if prune:
                self.prune()
        except (OSError, LorakitError) as error:
            reason = isinstance(error, OSError) and error.strerror
            log.say(
                f"lorakit: the checkpoint of step {step} could not be written "
                f"({reason or error}); earlier ones are whole"
            )
            if divided is not None and not met:
                send_parts(self.model, self.output_dir)

    def prune(self) -> None:
        """Remove the checkpoints that the config does not want to keep."""
        run_state.prune(self.output_dir, self.config.save_total_limit, self.progress.best_step)

    def _save(self, path: Path) -> None:
        """Save the adapter or the model, with the tokenizer if the model's files hold another one.

        A tokenizer that an earlier run left in `path` would be taken for that of this one.
        """
        self.part.save(path, self.base_model)
        if not self.ranks.is_writer:
            return
        if self.own_tokenizer or (path / "tokenizer.json").exists():
            self.tok.save(path)
        else:
            self.tok.save_chat_template(path)

    # ---- a step ----

    def _step(self, log: RunFiles) -> None:
        """Take the next step. Its gradients stay.

        The step after it is prepared before the host waits for anything.
        """
        self.begin()
        number = self.progress.step + 1
        step = self._prepared or self._prepare(number, log)
        told = Late(self._compute(step))
        # completions wait for the step before them, and for a checkpoint that may come first
        ahead = number < self.order.total and self.rollouts is None
        self._prepared = self._prepare(number + 1, log) if ahead else None
        self.note(step, told, log)
        if not self.reads_late:
            self.threads.after_step()

    def begin(self) -> None:
        """Begin to measure the time of a step, unless it goes on from the one before it."""
        if self._begun is None:
            self._clock = time.perf_counter()

    def note(self, step: Prepared, told: Late, log: RunFiles) -> None:
        """Note a step that was issued; read the one before it, or it where nothing is gained."""
        before, self._begun = self._begun, None
        self.progress.step = step.number
        if before is not None:
            self._read(*before, log)
        self._begun = step, told
        if not self.reads_late:
            self.read_begun(log)

    def _compute(self, step: Prepared) -> Tensor:
        """Compute the gradients of a step, and let the optimizer take it. Return what it tells."""
        if self.captured is not None:
            told, statistics = self.captured(step.packed, step.parts), self.captured.statistics
            if step.number == 1:
                check_gradients(self.model, self.part.parameters())
        else:
            losses, statistics = backward(self.model, step, self.config, self.reference, self.sums)
            if step.number == 1:
                check_gradients(self.model, self.part.parameters())
            told = self.update(losses)
        return torch.cat([told, statistics.to(told.device)]) if self.tells_tokens else told

    def _prepare(self, n: int, log: RunFiles) -> Prepared:
        rows = self.order.step(n)
        if self.rollouts is not None:
            return self.rollouts.prepare(n, rows[0], lambda: self.write_checkpoint(log, False))
        options = self.config, self.captured, self.ranks.share
        return prepare(self.model, self.examples, n, rows, *options)

    def read_begun(self, log: RunFiles) -> None:
        """Read the step that was begun, if it was not read. The host waits for its end."""
        if self._begun is not None:
            (step, told), self._begun = self._begun, None
            self._read(step, told, log)

    def _read(self, step: Prepared, late: Late, log: RunFiles) -> None:
        """Wait for the end of a step, and note and log what it tells."""
        numbers, progress, now = late.read(), self.progress, time.perf_counter()
        told, more = split_told(numbers, step.count, self.tells_tokens)
        took, self._clock = now - self._clock, now
        progress.loss = sum(told.losses) / step.count
        if told.taken:
            progress.bad_in_a_row = 0
        else:
            self._skip(step, told, log)
        progress.tokens, progress.seconds = progress.tokens + step.tokens, progress.seconds + took
        if self.rollouts is not None:
            more, completions = self.rollouts.told(step)
            log.rollouts(completions)
        if self.config.distillation is not None:
            more = told_by_teacher(batch.taught for batch in step.batches if batch is not None)
        log.step(
            step=step.number,
            epoch=step.number / self.order.per_epoch,
            loss=progress.loss,
            learning_rate=self._rate(step.number),
            grad_norm=told.norm,
            tokens=progress.tokens,
            tokens_per_second=step.tokens / took,
            padding=1 - step.tokens / step.computed,
            peak_memory_mb=peak_memory_mb(self.model.device),
            **more,
        )

    def _rate(self, step: int) -> float:
        """Return the scheduled rate of a step."""
        return scheduled_rate(self.config, step, self.order.total)

    def _optimizer_step(self, shares: Sequence[float]) -> DeviceStep | HostStep:
        """Return what clips and steps, with the rates of the steps that are left.

        Each group takes its share of the scheduled rate.
        """
        total = self.order.total
        steps = range(min(self.progress.step + 1, total), total + 1)
        rates = Rates(steps, self._rate, shares)
        return run_update(self.part, self.optimizer, rates, self.config.max_grad_norm, self.ranks)

    def _skip(self, step: Prepared, told: Told, log: RunFiles) -> None:
        """Count a step whose loss or gradient is not finite. Raises LorakitError after too many."""
        progress = self.progress
        progress.skipped += 1
        progress.bad_in_a_row += 1
        first = "the loss" if told.first < 0 else list(self.trained)[told.first]
        what = (
            f"step {step.number} has loss {progress.loss} and gradient norm {told.norm}, first in "
            f"{first}, on {', '.join(self.examples.place(i) for i in step.rows)}"
        )
        if progress.bad_in_a_row >= BAD_STEPS:
            raise LorakitError(
                f"train: {BAD_STEPS} steps in a row were not finite: {what}; the learning rate may "
                "be too high, or the rows damaged"
            )
        log.say(f"lorakit: skipped: {what}")
