"""The head of an adapter that tells classes: how many, and what they are called.

PEFT's files of a SEQ_CLS adapter hold the weight of the head, [C, H], and no names. lorakit writes
them beside it, in the words of transformers' config.json, into a file that other readers pass over:

    labels.json     {"id2label": {"0": "negative", "1": "positive"}, "problem_type": null}
"""

from pathlib import Path

from lorakit.adapters.peft_files.layout import PREFIX, open_weights
from lorakit.config.classifier import ClassifierConfig
from lorakit.config.errors import LorakitError
from lorakit.files import hub
from lorakit.files.local import as_path, read_json, write_json
from lorakit.models import classifier_json

SEQ_CLS = "SEQ_CLS"
_HEAD = f"{PREFIX}score.weight"


def read_classifier(path: str | Path) -> ClassifierConfig | None:
    """Return the head for classes of an adapter or a model that was saved.

    Args:
        path: The directory of an adapter, as lorakit or PEFT writes it, or of a model; or a Hub id.

    Returns:
        The head, which `load_model` gives a model for the adapter. Without a labels.json the
        classes of an adapter are called LABEL_0, LABEL_1 and so on. None for a language model, and
        for an adapter of one.

    Raises:
        LorakitError: A file is damaged, the Hub does not give it, or the adapter has no weight of a
            head.
    """
    wanted = [*hub.ADAPTER_FILES, hub.LABELS, "config.json"]
    path = as_path(path) if hub.hub_id(path) is None else hub.resolve(path, wanted)
    if not path.is_dir():
        return None
    if not (path / hub.ADAPTER_FILES[0]).exists():
        config = path / "config.json"
        if not config.exists():
            return None
        return classifier_json.read_classifier(read_json(config), str(config))
    if read_json(path / hub.ADAPTER_FILES[0]).get("task_type") != SEQ_CLS:
        return None
    head = open_weights(path).get(_HEAD)
    if head is None or len(head.shape) != 2:
        raise LorakitError(f"{path}: task_type is {SEQ_CLS}, and there is no tensor {_HEAD} [C, H]")
    beside = path / hub.LABELS
    values = read_json(beside) if beside.exists() else {"num_labels": head.shape[0]}
    found = classifier_json.read_labels(values, str(beside))
    if len(found.labels) != head.shape[0]:
        raise LorakitError(
            f"{beside} has {len(found.labels)} labels, and the head of the adapter "
            f"{head.shape[0]} outputs"
        )
    return found


def save_labels(path: Path, classifier: ClassifierConfig) -> None:
    """Write what the outputs of an adapter's head are called into its directory."""
    write_json(path / hub.LABELS, classifier_json.write_labels(classifier))
