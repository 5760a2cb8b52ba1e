"""A small run file for the tests of the command line, and forecasts by arithmetic."""

import json

import pytest
import yaml

from tests.conftest import ROWS
from tests.training.memory_plan.arithmetic import counted_forecasts


@pytest.fixture
def run_file(tiny_dir, tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    values = {
        "model": str(tiny_dir),
        "quantize": "nf4",
        "dtype": "float32",
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "validation": str(tmp_path / "train.jsonl"),
        },
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "learning_rate": 1.0e-2,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def forecasts(monkeypatch):
    """The arguments of all forecasts that a test makes, which are by arithmetic."""
    return counted_forecasts(monkeypatch)
