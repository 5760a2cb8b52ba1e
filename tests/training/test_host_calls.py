"""What Python does for a layer of a training step, counted beside PEFT and bitsandbytes."""

import importlib
from pathlib import Path

import pytest

for library in ("triton", "bitsandbytes", "peft", "transformers"):
    pytest.importorskip(library)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def host_calls():
    """benchmarks/host_calls.py, which imports others beside it by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("host_calls")


@pytest.fixture(scope="module")
def calls(host_calls):
    """Return the calls of one layer of each side."""
    return {name: host_calls.calls_of_a_layer(side) for name, side in host_calls.SIDES.items()}


def test_a_layer_takes_no_more_calls_than_theirs(calls):
    ours, theirs = calls["lorakit"], calls["peft + bitsandbytes"]
    assert ours.functions.total() <= theirs.functions.total()
    assert ours.operations.total() <= theirs.operations.total()


def test_the_calls_that_are_counted(host_calls):
    """A function of Python's, one of C's, and one of torch's with its operation."""
    import torch

    def step():
        len([])
        return inner()

    def inner():
        return torch.zeros(2).abs()

    functions, operations = host_calls.functions_of(step), host_calls.operations_of(step)
    names = {name.rpartition(" ")[2] for name in functions}
    place = "test_the_calls_that_are_counted.<locals>."
    assert {"len", f"{place}step", f"{place}inner", "Tensor.abs"} <= names
    assert operations == {"aten::zeros": 1, "aten::abs": 1}


def test_what_stands_for_a_gpu_counts_as_one_function(host_calls):
    """An operator of the meta device is Python; it is no call, and a launch is one."""
    import torch

    import lorakit as lk

    x = torch.zeros(4, 8, device="meta")
    with host_calls.SIDES["lorakit"].around(), torch.no_grad():
        functions = host_calls.functions_of(lambda: lk.kernels.swiglu(x, x))
    of_stand_in = {name: n for name, n in functions.items() if "meta_gpu" in name}
    assert sum(n for name, n in of_stand_in.items() if name.endswith("note")) == 1
    assert not any("dispatch_rule" in name or "_decomp" in name for name in functions)
