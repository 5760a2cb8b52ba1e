"""The head for classes in a Hugging Face config.json.

architectures   ["LlamaForSequenceClassification"] says that there is one
id2label        the name of each output, by its number as text; two without names if left out
label2id        the same, the other way round
problem_type    what the outputs mean; null leaves that to their number
"""

from collections.abc import Mapping
from typing import Any

from lorakit.config.classifier import MOST_LABELS, ClassifierConfig
from lorakit.config.errors import LorakitError
from lorakit.config.fields import from_mapping
from lorakit.models.family import Family

_HEAD = "ForSequenceClassification"
# Families whose class for causal models is that of the text model alone; transformers gives the
# others of their classes that name to the multimodal model.
_OF_TEXT = ("Gemma3", "Qwen3_5")


def read_classifier(values: Mapping[str, Any], where: str) -> ClassifierConfig | None:
    """Return the head for classes that a config.json asks for, or None.

    Raises LorakitError as `read_labels` does.
    """
    names = values.get("architectures")
    if not isinstance(names, list) or not any(str(name).endswith(_HEAD) for name in names):
        return None
    return read_labels(values, where)


def read_labels(values: Mapping[str, Any], where: str) -> ClassifierConfig:
    """Return the head with the labels and the problem_type that a file says.

    Raises LorakitError, naming the file `where`, if they are damaged, or rows have several labels.
    """
    problem = values.get("problem_type")
    if problem == "multi_label_classification":
        raise LorakitError(
            f"{where}: problem_type {problem} is not supported: a row has one label here"
        )
    said = {"labels": _labels(values, where), "problem_type": problem}
    return from_mapping(ClassifierConfig, said, where)


def _labels(values: Mapping[str, Any], where: str) -> list[str]:
    """Return the names of the outputs in their order."""
    given = values.get("id2label")
    if given is None:
        count = values.get("num_labels", 2)
        if type(count) is not int or not 0 < count <= MOST_LABELS:
            raise LorakitError(f"{where}: num_labels must be a positive number, not {count!r}")
        return [f"LABEL_{i}" for i in range(count)]
    if not isinstance(given, Mapping):
        raise LorakitError(f"{where}: id2label must be a mapping, not {given!r:.60}")
    by_number = {str(number): str(name) for number, name in given.items()}
    numbers = [str(i) for i in range(len(by_number))]
    if set(by_number) != set(numbers):
        raise LorakitError(f"{where}: id2label must number the labels from 0 on")
    return [by_number[number] for number in numbers]


def write_classifier(classifier: ClassifierConfig, family: Family) -> dict[str, Any]:
    """Return the keys of a config.json that say what the head is."""
    stem = family.architecture.removesuffix("ForCausalLM")
    architecture = f"{stem}{'Text' * (stem in _OF_TEXT)}{_HEAD}"
    return {"architectures": [architecture], **write_labels(classifier)}


def write_labels(classifier: ClassifierConfig) -> dict[str, Any]:
    """Return the keys that say what the outputs of a head are."""
    labels = classifier.labels
    return {
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
        "problem_type": classifier.problem_type,
    }
