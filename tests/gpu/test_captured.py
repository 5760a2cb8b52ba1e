"""A training step as a CUDA graph: the bits of the step that runs op by op."""

import pytest
import torch

from lorakit.kernels.ops.attention import documents
from lorakit.training.captured import CudaGraphs
from tests.training import test_captured as captured
from tests.training.test_captured import Never, new_run, same, same_state, take


@pytest.fixture(autouse=True)
def _small_padding(monkeypatch):
    monkeypatch.setattr(documents, "PADDING", 16)


CASES = {
    **captured.CASES,
    "a mixture": captured.MIXTURE,
    "a mixture of dense experts": {**captured.MIXTURE, "packed": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_replayed_as_run(case, dtype, device):
    """Eight steps of other documents, labels and rates, one of them not finite."""
    if device.type == "cpu":
        pytest.skip("no CUDA graphs without a GPU; tests/training/test_captured.py replays there")
    options = {"dtype": dtype, "device": device, **CASES[case]}
    ours, theirs = (new_run(each, **options) for each in (CudaGraphs(device), Never()))
    found = take(ours, 1, 5)
    ours.step.free()  # as before an evaluation; what follows is recorded again
    assert same(found + take(ours, 6, 8), take(theirs, 1, 8))
    assert same_state(ours, theirs)
    assert ours.said == []
    assert ours.step.recordings
    before = torch.cuda.memory_reserved(device)
    ours.step.free()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) < before


def test_a_recording_that_fails(device):
    """It tells why, leaves the current stream as it was, and what follows runs."""
    if device.type == "cpu":
        pytest.skip("no CUDA graphs without a GPU")
    recorder, x = CudaGraphs(device), torch.ones(8, device=device)
    before = torch.cuda.current_stream(device)
    with pytest.raises(RuntimeError):
        recorder.record(lambda: x * float(x.sum()))  # which waits for the device
    assert torch.cuda.current_stream(device) == before
    assert torch.equal(recorder.run(lambda: x + 1), x + 1)


def test_a_device_that_is_not_current(device):
    """The steps of a model on cuda:1 are recorded and replayed there while cuda:0 is current."""
    if device.type == "cpu" or torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU, or none")
    other = torch.device("cuda", 1)
    ours, theirs = (new_run(each, device=other) for each in (CudaGraphs(other), Never()))
    assert same(take(ours, 1, 8), take(theirs, 1, 8))
    assert ours.said == []
    assert ours.step.recordings
