"""The head for classes that a run gives its model before it starts."""

from lorakit.adapters.peft_files.labels import read_classifier
from lorakit.config.classifier import ClassifierConfig, classifier_of
from lorakit.config.errors import LorakitError
from lorakit.config.objectives import HEADED
from lorakit.config.run import RunConfig
from lorakit.data.examples import Examples


def head_of_run(run: RunConfig, examples: Examples | None = None) -> ClassifierConfig | None:
    """Return the new head that `load_model` should give the model of a run.

    Args:
        run: The settings of the run.
        examples: The rows to train on, whose labels are the classes if the run names none. Without
            rows there are two.

    Returns:
        The head; None if the objective needs none, or the files of the model have one.

    Raises:
        LorakitError: The adapter to go on from has no head, or the labels of the rows make none.
    """
    if run.train.objective not in HEADED or read_classifier(run.model) is not None:
        return None
    if run.adapter is not None:
        head = read_classifier(run.adapter)
        if head is None:
            raise LorakitError(
                f"adapter: {run.adapter} has no head for classes, and objective "
                f"{run.train.objective} goes on training one: leave it out"
            )
        return head
    if run.train.objective == "reward":
        return ClassifierConfig()
    if run.labels:
        return ClassifierConfig(run.labels, run.problem_type)
    return classifier_of([0, 1] if examples is None else examples.labels, run.problem_type)
