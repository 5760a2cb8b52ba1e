"""Fields by which other tools say what is learned or seen, and which lorakit does not obey.

A field that nobody trains on, an id or a source, is ignored. A field that OpenAI, TRL, Axolotl,
LLaMA-Factory, ms-swift or mlx-lm obeys is not: lorakit reads it (formats.py, messages.py), or it
stands here and refuses a row in which it holds something. The table in docs/data.md has both kinds,
and a test holds it and this file together.

Sources: OpenAI's guides to supervised and preference fine-tuning; TRL 1.16, docs/dataset_formats
and its trainers; axolotl 0.19, prompt_strategies/; llamafactory 0.9.5, data/parser.py and
data/converter.py; ms-swift 4.6, dataset/preprocessor/core.py; mlx-lm 0.32, tuner/datasets.py.
"""

from collections.abc import Mapping
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.data.values import field, has, holds

_TEXT_ALONE = "lorakit trains on text alone; leave such rows out"
_TOKENS = "lorakit makes tokens and labels itself; take the field out"
_REFERENCE = "lorakit computes the reference's scores itself; take the field out"
_WHOLE_TURNS = "lorakit learns a turn or does not; say train of the whole turn"
_EMBEDDING = "it belongs to embedding models; take the field out"

# The field, and what to say when a row of any format holds something there.
REFUSED = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _TEXT_ALONE),
    **dict.fromkeys(("objects", "ref_audios", "audio_codes", "teacher_images"), _TEXT_ALONE),
    **dict.fromkeys(("rejected_images", "rejected_videos", "rejected_audios"), _TEXT_ALONE),
    **dict.fromkeys(("input_ids", "completion_mask", "assistant_masks"), _TOKENS),
    **dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), _REFERENCE),
    **dict.fromkeys(("positive_messages", "negative_messages"), _EMBEDDING),
    "rejected_tools": "both answers of a pair have the same tools here; take the field out",
    "teacher_prompt": "lorakit has no teacher that sees another prompt; take the field out",
}
# The same for a message, or for a turn of ShareGPT.
REFUSED_IN_MESSAGES = {
    **dict.fromkeys(("images", "audio"), _TEXT_ALONE),
    **dict.fromkeys(("train_detail", "training_detail"), _WHOLE_TURNS),
    "refusal": "templates do not show it; move its text to content",
}
# What says whether the answer is a good one, in the formats that KTO reads. A row of preference has
# a bad answer of its own, and the label of a text is its class.
LABELS = ("label", "kto_tag")
LABELED = ("messages", "sharegpt", "prompt_completion", "alpaca")


_VERDICTS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def has_verdict(value: Mapping[str, Any]) -> bool:
    """Return whether a row says without doubt that its answer is a good or a bad one."""
    # CSV has text alone
    return any(str(value.get(name)).strip().casefold() in ("true", "false") for name in LABELS)


def verdict_of(value: Mapping[str, Any], place: str) -> bool:
    """Return whether a row says that its answer is a good one.

    Raises LorakitError if it says neither.
    """
    name = next((name for name in LABELS if has(value, name)), LABELS[0])
    label = field(value, name, place)
    verdict = _VERDICTS.get(str(label).strip().casefold())
    if verdict is None:
        raise LorakitError(f"{place}: {name} must be true or false, not {label!r:.60}")
    return verdict


def check_row(value: Mapping[str, Any], format: str, place: str) -> None:
    """Raise LorakitError if a row holds a field that other tools obey and lorakit does not."""
    _check(value, REFUSED, place)
    for name in LABELS if format in LABELED else ():
        label = value.get(name)
        bad = isinstance(label, (bool, int, float)) and not label
        if bad or str(label).strip().casefold() in ("false", "0"):  # CSV has text alone
            raise LorakitError(
                f"{place}: {name} is {label!r}, which says that the answer is a bad one: read such "
                "rows with format: unpaired_preference, for objective kto, or leave them out; if "
                "it is a class, rename the field"
            )


def check_message(value: Mapping[str, Any], where: str) -> None:
    """Raise LorakitError if a message holds a field that other tools obey and lorakit does not."""
    _check(value, REFUSED_IN_MESSAGES, where)


def _check(value: Mapping[str, Any], refused: Mapping[str, str], where: str) -> None:
    for name in sorted(value.keys() & refused.keys()):
        if holds(value, name):
            raise LorakitError(f"{where} has a field {name!r}: {refused[name]}")
