"""Dropout by Philox: the published vectors, the share, and the same bits on every backend."""

import pytest
import torch

pytest.importorskip("triton")
from lorakit import kernels
from lorakit.kernels.ops.dropout import reference, seeded_dropout
from tests.triton_budget import guarded, random
from tests.triton_interpreter import DEVICE, on_triton

# Random123's known answers for philox4x32 of 10 rounds: counter, key, result
ONES = 0xFFFFFFFF
ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0 << 32 | 0xA4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_published_words(counter, key, answer):
    found = reference.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in found) == answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 700), (2, 5, 512)])
def test_triton_has_the_bits_of_the_reference(dtype, shape):
    x = random(0, *shape).to(dtype)
    counter = torch.tensor(2**33 + 5, device=DEVICE)
    with kernels.use_backend("reference"):
        expected = seeded_dropout(x, 0.3, 2**61 + 7, counter)
    with on_triton(), guarded(x) as (x,):
        assert torch.equal(seeded_dropout(x, 0.3, 2**61 + 7, counter), expected)


def test_shares_and_other_masks():
    x = torch.ones(400, 250)
    counter = torch.zeros((), dtype=torch.int64)
    with kernels.use_backend("reference"):
        y = seeded_dropout(x, 0.25, 1, counter)
        others = [seeded_dropout(x, 0.25, 2, counter), seeded_dropout(x, 0.25, 1, counter + 1)]
        turned = seeded_dropout(torch.ones(250, 400).t(), 0.25, 1, counter)
        nothing = seeded_dropout(x, 0.0, 1, counter)
    assert set(y.unique().tolist()) == {0.0, x.new_tensor(1 / 0.75).item()}
    # 100,000 draws: six standard deviations are 0.0082
    assert abs(float((y == 0).float().mean()) - 0.25) < 0.0082
    for other in others:  # independent masks agree in 0.75^2 + 0.25^2 of the places
        assert abs(float(((other == 0) == (y == 0)).float().mean()) - 0.625) < 0.0092
    assert torch.equal(turned, y)
    assert torch.equal(nothing, x)
