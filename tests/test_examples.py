"""The short programs of examples/, as a user runs them. demo.py has a file of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PROGRAM = EXAMPLES / "custom_op.py"


@pytest.mark.parametrize("interpreted", [False, True])
def test_custom_op(interpreted):
    """It raises if an error is beyond its budget."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpreted:
        pytest.importorskip("triton")
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    backends = {line.split()[0] for line in done.stdout.splitlines()}
    assert "reference" in backends
    assert "triton" in backends or not interpreted


def test_the_sums_of_grpo_demo(tmp_path):
    """Its run takes an hour; what stands around that is here: the rows, the score, the picture."""
    spec = importlib.util.spec_from_file_location("grpo_demo", EXAMPLES / "grpo_demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    rows, held_out = demo.sums(0)
    asked = [row["prompt"][-1]["content"] for row in rows + held_out]
    assert (len(rows), len(held_out), len(set(asked))) == (48, 16, 64)
    for row in rows + held_out:
        a, b = (int(n) for n in row["prompt"][-1]["content"][8:-1].split(" + "))
        assert row["answer"] == a + b
    said = [f"It is {row['answer']}." for row in held_out[:12]] + ["12 or 1000", "no", "", "8 is 1"]
    assert demo.right(said, held_out) == 12 / 16
    assert demo.right(["1000"] * 16, held_out) == 0
    metrics = tmp_path / "metrics.jsonl"
    steps = [json.dumps({"step": i + 1, "reward": i / 12}) for i in range(12)]
    metrics.write_text("\n".join(steps))
    demo.plot(metrics, tmp_path / "grpo.png", (0.1, 0.9))
    assert (tmp_path / "grpo.png").read_bytes().startswith(b"\x89PNG")
