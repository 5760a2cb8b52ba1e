"""many.json: which checkpoints of several adapters belong together.

    {"version": 1, "adapters": {"small": 30, "large": 20}, "writing": [40]}

A checkpoint of a run of several adapters is one of each of them, in its own folder. It counts from
the moment when many.json names all of its parts. So a run that is killed while it writes them goes
on from the ones before, and forgets those of the steps in "writing". An adapter that has ended
keeps its last one. 0 stands for none: this adapter starts from its beginning.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lorakit.config.errors import LorakitError
from lorakit.files.local import read_json, write_json
from lorakit.training import state as run_state

RECORD = "many.json"


class Joint:
    """The checkpoint that the adapters of a run have in common.

    Args:
        output_dir: The directory of the run.
        steps: The step of the checkpoint of each adapter, by its name; 0 for none.
    """

    def __init__(self, output_dir: Path, steps: Mapping[str, int]):
        self.output_dir, self.steps, self.writing = output_dir, dict(steps), list[int]()

    def write(self) -> None:
        """Write many.json, whole or not at all. Raises OSError if that cannot be."""
        values = {"version": 1, "adapters": self.steps, "writing": self.writing}
        write_json(self.output_dir / RECORD, values)

    def begin(self, steps: Sequence[int]) -> None:
        """Say that checkpoints of these steps are about to be written."""
        self.writing = sorted({*self.writing, *steps})
        self.write()

    def commit(self, steps: Mapping[str, int]) -> None:
        """Say that all parts of a checkpoint are there."""
        self.steps, self.writing = dict(steps), []
        self.write()


def joint_to_resume(output_dir: Path, names: Sequence[str], resume: str | None) -> Joint:
    """Return the checkpoint that a run goes on from, whose steps are 0 at its beginning.

    What an unfinished checkpoint has left is removed. Raises LorakitError if the folders hold
    checkpoints and `resume` is None, those of other runs, or many.json knows other adapters.
    """
    path = output_dir / RECORD
    for name in names:
        run_state.remove_unfinished(output_dir / name)
    found = {name: run_state.checkpoints(output_dir / name) for name in names}
    there = [name for name, each in found.items() if each]
    if resume is None or not path.exists():
        if there:
            todo = "set resume to auto to go on from them, or" * (resume is None)
            raise LorakitError(
                f"train: {output_dir / there[0]} holds checkpoints of an earlier run; "
                f"{todo or 'go on with it by itself, or'} choose another output_dir"
            )
        return Joint(output_dir, dict.fromkeys(names, 0))
    values = read_json(path)
    steps, writing = values.get("adapters"), values.get("writing")
    if not isinstance(steps, dict) or not isinstance(writing, list):
        raise LorakitError(f"{path} is damaged; choose another output_dir")
    if steps.keys() != set(names):
        other = min(steps.keys() ^ set(names))
        whose = "is new" if other in names else "is missing now"
        raise LorakitError(
            f"train: resume: adapter {other!r} {whose}: the run in {output_dir} has "
            f"{', '.join(sorted(steps))}; name the same ones, or choose another output_dir"
        )
    removals = [_forgetting(name, steps[name], writing, found[name]) for name in names]
    for remove in removals:
        remove()
    joint = Joint(output_dir, steps)
    joint.writing = writing
    return joint


def _forgetting(
    name: str, step: int, writing: Sequence[int], found: Sequence[run_state.Checkpoint]
) -> Callable[[], None]:
    """Return what removes the checkpoints of an adapter after its part of the common one.

    Raises LorakitError if that part is missing, or later ones are of another run.
    """
    there = {each.step: each for each in found}
    if step and step not in there:
        raise LorakitError(
            f"train: resume: the checkpoint of step {step} of adapter {name!r} is not there any "
            "more; choose another output_dir"
        )
    later = [each for each in found if each.step > step]
    others = [each.path for each in later if each.step not in writing]
    if others:
        raise LorakitError(
            f"train: resume: {others[0]} is later than the checkpoint of all adapters; go on with "
            "that adapter by itself, or remove it"
        )
    return lambda: run_state.remove(later)
