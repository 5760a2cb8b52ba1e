"""The short programs of examples/, as a user runs them. demo.py has a file of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "examples" / "custom_op.py"


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
