"""`train_many`: train several adapters of one frozen model, whose steps share their passes.

    step n     rows of all that are going on -> one packed row -> gradients of each
               -> each its own clipping, AdamW, rate, metrics.jsonl
    between    each its own evaluation and end; one checkpoint for all (joint.py)

Step for step an adapter takes the rows that `train` would give it, in the same batches; they are
packed here whatever `packing` says. An adapter that has ended is left out of the next pass. One
whose steps are not finite ends by itself, with its error in its run.json.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from lorakit.adapters.manage import check_adapter, check_spans, check_unmerged
from lorakit.config.errors import LorakitError, check
from lorakit.config.many import check_names, check_shared
from lorakit.config.run import RunConfig
from lorakit.config.training import TrainConfig
from lorakit.data.examples import Examples
from lorakit.data.rows import RowSource
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer
from lorakit.training.cores import FewerThreads
from lorakit.training.interrupt import Flag, interrupt
from lorakit.training.kernel_line import kernel_line
from lorakit.training.losses.classification import check_head
from lorakit.training.losses.held_out import HeldOut
from lorakit.training.many.joint import Joint, joint_to_resume
from lorakit.training.many.log import Shown
from lorakit.training.many.member import Member
from lorakit.training.mode import training_mode
from lorakit.training.ranks import joined
from lorakit.training.state import only_run_in
from lorakit.training.together import check_together, packed_pass
from lorakit.training.train import TrainResult, check_outputs, made_directory, rows_of

Data = RowSource | Examples | Mapping[str, RowSource | Examples]


def train_many(
    model: Decoder,
    tok: Tokenizer,
    data: Mapping[str, Data],
    configs: Mapping[str, TrainConfig],
    *,
    output_dir: str = TrainConfig.output_dir,
    base_model: str | None = None,
    runs: Mapping[str, RunConfig] | None = None,
) -> dict[str, TrainResult]:
    """Train several adapters of a model, one pass a step for all, and save each into its folder.

    Each ends as `train` would end with it, to the rounding of fp32: it has the same rows, step for
    step, and its own optimizer, schedule, evaluations and early stopping. Its folder,
    output_dir/NAME, is that of a run. Ctrl-C and SIGTERM end all after the current step, with a
    checkpoint of all; the same call with `resume` "auto" goes on from the last one.

    Args:
        model: A model with the adapters (see `attach`), in bfloat16 or float32.
        tok: The model's tokenizer.
        data: The rows of each adapter by its name, as `train` takes them.
        configs: The settings of each adapter by its name. Those of checkpoints and of what is kept
            for backward must be the same for all; the folder of each is in output_dir.
        output_dir: The directory for the folders of all.
        base_model: The name of the base model that the configs of the adapters record.
        runs: The settings of the run files, which run.json keeps; None: those of `configs` alone.

    Returns:
        What each run did, by its name. `error` says why one ended before the others.

    Raises:
        LorakitError: Before the first step, an adapter is missing or cannot share a pass (see
            `Session.forward_backward_many`), rows cannot be used, settings do not go together, the
            checkpoints are those of other adapters, or several processes share the run.
    """
    check(data.keys() == configs.keys(), "train_many: data and configs name other adapters")
    check_names(list(configs))
    configs = {n: replace(c, output_dir=f"{output_dir}/{n}") for n, c in configs.items()}
    check_many(configs)
    _check_model(model, configs)
    members = []
    for name, config in configs.items():
        with _about(name):
            rows = rows_of(model, tok, data[name], config)
            _check_tokenizer(tok, *rows)
            run_file = None if runs is None else runs[name]
            members.append(Member(name, model, config, *rows, run_file))
    with ExitStack() as held:
        folder = made_directory(output_dir)
        held.enter_context(only_run_in(folder))
        for member in members:
            held.enter_context(member.held)
            with _about(member.name):
                member.lock()
        joint = joint_to_resume(folder, list(configs), members[0].config.resume)
        for member in members:
            with _about(member.name):
                member.prepare(tok, base_model, joint.steps[member.name])
        _train(model, members, joint)
    return {member.name: member.result() for member in members}


def check_many(configs: Mapping[str, TrainConfig]) -> None:
    """Check the settings of several adapters as `train_many` does, before a model is loaded.

    Args:
        configs: The settings of each by its name.

    Raises:
        LorakitError: They do not go together, or one of them cannot share a pass.
    """
    check_shared(configs)
    for name, config in configs.items():
        with _about(name):
            check_together(config)
            check_outputs(config)


def _check_model(model: Decoder, configs: Mapping[str, TrainConfig]) -> None:
    """Raise LorakitError unless the model has these adapters, and this process trains alone."""
    with joined(model.device) as ranks:
        check(ranks.size == 1, "several adapters in one pass are trained by one process")
    check(model.mesh is None, "several adapters are trained over weights that one device holds")
    for name, config in configs.items():
        check_adapter(model, name, "train_many")
        check_head(model, config)
    check_unmerged(model, "train_many")
    check_spans(model, list(configs))


def _check_tokenizer(tok: Tokenizer, examples: Examples, held_out: HeldOut | None) -> None:
    """Raise LorakitError if rows were encoded with a tokenizer that is not the one of all."""
    for each in [examples] + ([] if held_out is None else [held_out.examples]):
        theirs = each.encoder.tok
        if theirs is not tok and theirs.backend.to_str() != tok.backend.to_str():
            raise LorakitError(
                "its rows were encoded with another tokenizer than that of the model, which all "
                "adapters share: encode them with that one"
            )


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Let an error in the block say which adapter it is about."""
    try:
        yield
    except LorakitError as error:
        raise LorakitError(f"adapter {name!r}: {error}") from None


def _train(model: Decoder, members: list[Member], joint: Joint) -> None:
    """Take the steps of all members, with their ends."""
    config = members[0].config  # all agree in what counts here
    total = max(member.run.order.total for member in members)
    done = max(member.run.progress.step for member in members)
    shown = Shown(total, done)
    with ExitStack() as held:
        held.callback(shown.close)
        for member in members:
            member.open(shown)
        longest = max(max(member.examples.lengths) for member in members)
        shown.say(kernel_line(model, longest, True))
        tokens = sum(member.run.order.largest for member in members)
        later = sum(member.bytes for member in members)
        held.enter_context(training_mode(model, config, tokens, later))
        _Loop(model, members, joint, shown, config).run(held.enter_context(interrupt()))


class _Loop:
    """The steps of several members, and what comes between two of them."""

    def __init__(
        self,
        model: Decoder,
        members: list[Member],
        joint: Joint,
        shown: Shown,
        config: TrainConfig,
    ):
        self.model, self.members, self.joint, self.shown = model, members, joint, shown
        self.config = replace(config, packing=True)  # of the loss of all
        self.threads = FewerThreads(shown.say)

    @property
    def going(self) -> list[Member]:
        """The members that take the next step."""
        return [member for member in self.members if member.going]

    def run(self, stop: Flag) -> None:
        """Take steps until all have ended, or `stop` is set."""
        try:
            self._write_joint(self.joint.write)
            while self.going:
                if self._between(stop):
                    return
                self._step()
        finally:
            self.threads.end()

    def _between(self, stop: Flag) -> bool:
        """Evaluate, save and end what is due, and return whether all is over."""
        stopped = stop.is_set()
        looked = [member.look(stopped) for member in self.going]
        stopped = stop.is_set()  # asked once for the checkpoint and for the end, as in run.py
        if any(new for new, _ in looked) and (stopped or any(wanted for _, wanted in looked)):
            self._write_checkpoint(upload=not stopped)
        for member in self.going:
            if member.run.ended or stopped:
                member.end()
        self.shown.end_step()
        return stopped or not self.going

    def _write_checkpoint(self, upload: bool) -> None:
        """Write a checkpoint of all, but of those that have ended and have their last one.

        If a part cannot be written, the one before stays that of all.
        """
        parts = [member for member in self.members if self._lacks(member)]
        steps = {member.name: member.run.progress.step for member in parts}
        if not self._write_joint(lambda: self.joint.begin(list(steps.values()))):
            return
        written = [m.write_checkpoint(upload and not m.run.ended) for m in parts]
        joined_steps = {**self.joint.steps, **steps}
        if all(written) and self._write_joint(lambda: self.joint.commit(joined_steps)):
            for member in parts:
                member.run.prune()

    def _lacks(self, member: Member) -> bool:
        """Return whether a checkpoint needs a new part of a member."""
        if member.error is not None:
            return False
        return member.going or self.joint.steps[member.name] != member.run.progress.step

    def _write_joint(self, write: Callable[[], None]) -> bool:
        """Write many.json, and return whether that was possible; one line says if it was not."""
        try:
            write()
        except OSError as error:
            self.shown.say(
                f"lorakit: the checkpoint of all adapters could not be written "
                f"({error.strerror or error}); earlier ones are whole"
            )
            return False
        return True

    def _step(self) -> None:
        """Let all that are going take a step, whose gradients come from one pass for each batch."""
        going = self.going
        totals = {member.name: member.begin() for member in going}
        for i in range(max(len(member.batches) for member in going)):
            parts = {m.name: m.batches[i] for m in going if i < len(m.batches)}
            losses = packed_pass(self.model, parts, self.config, totals)
            for member in going:
                if member.name in losses:
                    member.add(losses[member.name])
        for member in going:
            member.take()
        if self.model.device.type == "cpu":
            self.threads.after_step()
