"""The head of a model that tells a class, or a number, in the place of the next token."""

import math
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from lorakit.config.errors import LorakitError, nearest
from lorakit.config.fields import check_types
from lorakit.config.labels import Label, name_of

ProblemType = Literal["single_label_classification", "regression"]
NO_NAME = "LABEL_0"
MOST_LABELS = 1 << 20  # a damaged file may ask for more outputs than memory holds


@dataclass(frozen=True)
class ClassifierConfig:
    """Settings of a head that tells a class or a number of a whole row.

    The names are those of transformers' config.json, where a `ForSequenceClassification` has them.
    """

    labels: list[str] = field(default_factory=lambda: [NO_NAME])
    """Names of the classes, one for each output of the head (id2label)."""
    problem_type: ProblemType | None = None
    """Meaning of the outputs: "single_label_classification", or "regression" for one number; null
    takes one output for a number and several for classes."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.labels:
            raise LorakitError("labels is empty; a head has at least one output")
        if len(self.labels) > MOST_LABELS:
            raise LorakitError(f"there are {len(self.labels)} labels, and {MOST_LABELS} at most")
        if len(set(self.labels)) < len(self.labels):
            twice, _ = Counter(self.labels).most_common(1)[0]
            raise LorakitError(f"the label {twice!r} is there twice: keep one")
        if self.problem_type == "regression" and len(self.labels) > 1:
            raise LorakitError(
                f"problem_type regression has one output, and there are {len(self.labels)} labels"
            )

    @property
    def regression(self) -> bool:
        """Whether the head tells a number."""
        return self.rewards or self.problem_type == "regression"

    @property
    def rewards(self) -> bool:
        """Whether the head tells one number of which no more is said, as that of a reward model."""
        return len(self.labels) == 1 and self.problem_type is None

    def target(self, label: Label) -> float:
        """Return what the head is to tell of a row: the number of a class, or a number.

        A label is the name of a class. Where no name is a number, a whole number is that of a
        class.

        Raises:
            LorakitError: There is no such class, or the label is no number.
        """
        if self.regression:
            return _number(label)
        name = name_of(label)
        if name in self.labels:
            return self.labels.index(name)
        numbered = type(label) is int and 0 <= label < len(self.labels)
        if numbered and not any(each.isdecimal() for each in self.labels):
            return int(label)
        shown = ", ".join(self.labels[:20]) + (", ..." if len(self.labels) > 20 else "")
        raise LorakitError(
            f"the label {name!r:.60} is none of the model's{nearest(name, self.labels)}: {shown}"
        )


def classifier_of(
    labels: Iterable[Label], problem_type: ProblemType | None = None
) -> ClassifierConfig:
    """Return the head for rows with these labels.

    Labels with a fraction, such as 3.5 or 1.0, are numbers to be told. All others are names of
    classes: whole numbers in their order, then texts in that of the alphabet.

    Args:
        labels: The labels of the rows.
        problem_type: "regression" takes whole numbers for numbers too, and
            "single_label_classification" those with a fraction for names.

    Returns:
        The head.

    Raises:
        LorakitError: A text is among numbers to be told, there are no labels, or one class only.
    """
    found = dict.fromkeys(labels)
    if not found:
        raise LorakitError("no row has a label that could be learned, as format classification has")
    fractions = any(isinstance(label, float) for label in found)
    if problem_type == "regression" or (problem_type is None and fractions):
        for label in found:
            _number(label)
        return ClassifierConfig(problem_type="regression")
    whole = sorted(label for label in found if type(label) in (int, float))
    names = [name_of(label) for label in whole]
    names += sorted(name_of(label) for label in found if type(label) not in (int, float))
    names = list(dict.fromkeys(names))
    if len(names) < 2:
        raise LorakitError(
            f"every row has the label {names[0]!r:.60}: a classifier learns from two classes at "
            "least"
        )
    return ClassifierConfig(labels=names)


def _number(label: Label) -> float:
    """Return a label as a number; a table of text has it as text."""
    number = math.nan
    with suppress(ValueError, OverflowError):
        number = float(label)
    if not math.isfinite(number):
        raise LorakitError(f"the label {label!r:.60} is no number, as regression wants")
    return number
