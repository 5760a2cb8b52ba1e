"""JSON as browsers read it: no NaN, no infinity, and any text that a run may have written."""

import json
import math
from typing import Any


def to_json(value: object) -> bytes:
    """Return JSON in UTF-8.

    A number that is not finite becomes null. Half a surrogate pair, which UTF-8 lacks, is written
    as an escape.
    """
    try:
        text = _dumps(value)
    except ValueError:
        text = _dumps(_finite(value))
    return text.encode(errors="backslashreplace")


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
