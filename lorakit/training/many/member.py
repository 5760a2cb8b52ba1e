"""One adapter of several that are trained in one pass: its run, its files, and how it ended.

The run is that of `train` (run.py): rows and their order, optimizer, schedule, evaluations, early
stopping and files are what they are for the adapter alone. Only the gradients come from the pass.
"""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.adapters.manage import selected
from lorakit.config.errors import LorakitError
from lorakit.config.run import RunConfig
from lorakit.config.training import TrainConfig
from lorakit.data.encode import AnyExample, count_labels
from lorakit.data.examples import Examples
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer
from lorakit.training.late import Late
from lorakit.training.losses.held_out import HeldOut
from lorakit.training.many.log import MemberLog, Shown
from lorakit.training.mode import bytes_of
from lorakit.training.ranks import Ranks
from lorakit.training.run import Run
from lorakit.training.state import only_run_in
from lorakit.training.step import Prepared, check_gradients
from lorakit.training.train import TrainResult, made_directory, recorded_run, result_of
from lorakit.training.trainable import trained_part


class Member:
    """An adapter that is trained with others. `going` says whether it takes the next step."""

    def __init__(
        self,
        name: str,
        model: Decoder,
        config: TrainConfig,
        examples: Examples,
        held_out: HeldOut | None,
        run_file: RunConfig | None,
    ):
        self.name, self.model = name, model
        # as log and card tell it
        self.config = replace(config, learning_rate=config.peak_learning_rate)
        self.examples, self.held_out, self.run_file = examples, held_out, run_file
        self.held = ExitStack()  # its lock, its files and its run.json
        self.going = True
        self.error: str | None = None  # why it ended while the others went on
        self.address: str | None = None
        self.step: Prepared | None = None  # the one that is computed
        self.batches = list[list[AnyExample]]()
        self.losses = list[Tensor]()

    def lock(self) -> None:
        """Hold the lock of the folder, up to the end of the run.

        Raises LorakitError if another run has it.
        """
        self.held.enter_context(only_run_in(made_directory(self.config.output_dir)))

    def prepare(self, tok: Tokenizer, base_model: str | None, step: int) -> None:
        """Prepare the run, which goes on from its checkpoint of a step, 0 for none.

        Raises LorakitError if it cannot go on from there.
        """
        path = f"{self.config.output_dir}/checkpoint-{step}" if step else None
        config = replace(self.config, resume=path)
        with selected(self.model, self.name):
            part = trained_part(self.model, config)
            self.bytes = bytes_of(self.model, config)
            rows = self.examples, self.held_out
            # the pass has no more of tokens than their losses
            self.run = Run(part, tok, *rows, config, base_model, Ranks(), {}, tells_tokens=False)
            self.parameters = list(self.run.part.parameters())

    def open(self, shown: Shown) -> None:
        """Open the files of the run, which then is going on."""
        run = self.run
        done = run.progress.step
        self.log = MemberLog(self.name, shown, run.output_dir, done, self.config)
        self.held.callback(self.log.close)
        self.held.enter_context(recorded_run(run, self.run_file))

    # ---- between two steps ----

    def look(self, stopped: bool) -> tuple[bool, bool]:
        """Evaluate the step that is done if that is due.

        Returns:
            Whether there is something new to save, and whether the config wants that saved now.
        """
        run = self.run
        place: AbstractContextManager[None] = nullcontext()
        if run.evaluation_is_due() and not stopped:
            place = selected(self.model, self.name)
        with place:
            evaluated, wanted = run.look(self.log, stopped)
        # the one of the end comes before the best takes its place
        wanted = wanted or (run.ended and self.config.load_best_model_at_end)
        return run.progress.step != run.saved or evaluated, wanted

    def write_checkpoint(self, upload: bool) -> bool:
        """Write its part of a checkpoint, and return whether that was possible."""
        step = self.run.progress.step
        self.run.saved = -1
        with selected(self.model, self.name):
            self.run.write_checkpoint(self.log, upload=upload, prune=False)
        return self.run.saved == step

    def end(self) -> None:
        """Save the adapter as the run has made it, and upload it if the run has come to its end."""
        self.going = False
        try:
            with selected(self.model, self.name):
                self.run.read_begun(self.log)
                self.run.end(self.log)
        except LorakitError as error:
            self.fail(error)
            return
        progress = self.run.progress
        if self.run.ended:
            self.address = self.run.publisher.upload(progress, self.log.say)
            early = ", stopped early" if self.run.stopped_early() else ""
            self.log.say(f"done after {progress.step} steps{early}, loss {progress.loss:.4f}")
        self.held.close()

    def fail(self, error: LorakitError) -> None:
        """End the run by an error, which its run.json keeps, while the others go on."""
        self.going, self.error = False, str(error)
        self.log.say(f"lorakit: {error}; the others go on")
        self.held.__exit__(type(error), error, error.__traceback__)

    def result(self) -> TrainResult:
        """Return what the run did."""
        found = result_of(self.run, self.address)
        if self.error is None:
            return found
        return replace(found, error=self.error, interrupted=False)

    # ---- a step ----

    def begin(self) -> int:
        """Take the rows of the next step, and return how many of their tokens are learned."""
        self.run.begin()
        number = self.run.progress.step + 1
        rows = self.run.order.step(number)
        self.batches = [[self.examples[i] for i in batch] for batch in rows]
        every = [example for batch in self.batches for example in batch]
        tokens, count = sum(len(e.input_ids) for e in every), sum(map(count_labels, every))
        flat = [i for batch in rows for i in batch]
        self.step = Prepared(number, flat, len(rows), [], [], count, tokens, tokens)
        self.losses = []
        return count

    def add(self, loss: Tensor) -> None:
        """Note the summed loss of the next of its batches, whose gradients are there."""
        self.losses.append(loss)
        self.run.sums.end_round(len(self.losses) == len(self.batches))

    def take(self) -> None:
        """Let the optimizer take the step whose gradients are there, and forget them."""
        assert self.step is not None
        losses = self.run.sums.finish(self.losses, self.step.parts)
        if self.step.number == 1:
            check_gradients(self.model, self.parameters)
        told = Late(self.run.update(torch.stack(losses)))
        self.run.optimizer.zero_grad(set_to_none=True)
        try:
            self.run.note(self.step, told, self.log)
        except LorakitError as error:
            self.fail(error)
