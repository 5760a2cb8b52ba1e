"""The device and the sizes of these tests."""

from contextlib import ExitStack

import pytest
import torch

from lorakit import kernels


def pytest_addoption(parser):
    parser.addoption(
        "--interpreted",
        action="store_true",
        help="tests/gpu on the CPU, in Triton's interpreter, at tiny sizes",
    )


@pytest.fixture(scope="session")
def interpreted(request) -> bool:
    return request.config.getoption("--interpreted", default=False)


@pytest.fixture(scope="session")
def device(interpreted) -> torch.device:
    if interpreted:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU: `make gpu` runs tests/gpu on one")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def size(interpreted):
    """size(real, tiny): the one that is meant here."""
    return lambda real, tiny: tiny if interpreted else real


@pytest.fixture(autouse=True)
def on_triton(interpreted, device):
    """Triton is what runs on a GPU, unforced. On the CPU it has to be forced."""
    with ExitStack() as stack:
        if interpreted:
            pytest.importorskip("triton")
            from tests.triton_interpreter import interpreted as interpreter

            stack.enter_context(interpreter())
            stack.enter_context(kernels.use_backend("triton"))
        yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def room(device):
    """room(gigabytes) skips the test where the GPU has no such memory left."""

    def ask(gigabytes: float) -> None:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(device)[0] / 1e9
            if free < gigabytes:
                pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, {free:.0f} GB are free")

    return ask
