"""Equal inputs give equal bits every time, forward and backward: no race, no atomics, no value
that was never written.
"""

import pytest
import torch

from tests.gpu.operations import DTYPES, OPS, Shape, outputs_and_gradients, same_bits


@pytest.mark.parametrize("sizes", ["odd", "real"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_a_hundred_times(name, dtype, sizes, device, size):
    """A run's outputs are overwritten before the next one, so that the memory which that one gets
    holds 0xFF, which is NaN, or 0x00: an output that is not written differs.
    """
    shape = size((37, 1003, 74, 5003), (3, 23, 6, 37))
    if sizes == "real":
        shape = size((2048, 4096, 128, 32000), (3, 64, 16, 66))
    f, inputs = OPS[name](Shape(device, dtype, *shape))
    expected = outputs_and_gradients(f, inputs)
    assert all(y.isfinite().all() for y in expected if y.is_floating_point())
    for i in range(size(100, 2)):
        found = outputs_and_gradients(f, inputs)
        wrong = [j for j, (a, b) in enumerate(zip(found, expected, strict=True))
                 if not same_bits(a, b)]  # fmt: skip
        assert not wrong, f"run {i}: outputs {wrong} of {len(expected)} differ"
        for y in found:
            y.untyped_storage().fill_(0xFF if i % 2 else 0x00)


def test_the_comparison_sees_a_difference():
    a = torch.zeros(3)
    assert same_bits(a, a.clone())
    assert not same_bits(a, -a)  # the sign of zero
    assert not same_bits(a, a.double())
