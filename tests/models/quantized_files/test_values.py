"""The arithmetic of quantized files, against formulas written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.models.quantized_files.values import exponents, four_bit_floats, scaled, unpacked


def stream(numbers: list[int], bits: int, words: int) -> list[int]:
    """Return words of 32 bits that hold numbers one after the other, as signed integers."""
    whole = sum(number << (bits * i) for i, number in enumerate(numbers))
    found = [whole >> (32 * i) & 0xFFFFFFFF for i in range(words)]
    return [word - (1 << 32) if word >> 31 else word for word in found]


@given(st.data(), st.integers(1, 8), st.integers(1, 70))
def test_numbers_come_out_of_words_as_they_went_in(data, bits, count):
    rows = data.draw(st.lists(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count),
                              min_size=1, max_size=3))  # fmt: skip
    words = torch.tensor([stream(row, bits, -(-count * bits // 32)) for row in rows])
    assert unpacked(words.int(), bits, count).tolist() == rows


def test_exponents_are_exact_powers_of_two():
    found = exponents(torch.arange(255, dtype=torch.uint8))
    assert found.tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert exponents(torch.tensor([255], dtype=torch.uint8)).isinf().all()


def test_four_bit_floats_are_those_of_the_formula():
    """E2M1 has a sign, two bits of exponent with bias 1, and one of fraction; 0 is subnormal."""
    expected = []
    for code in range(16):
        sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
        size = fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1)
        expected.append(-size if sign else size)
    assert four_bit_floats(torch.arange(16)).tolist() == expected


@given(*[st.integers(1, 9) for _ in range(4)], st.booleans())
def test_every_value_is_scaled_by_its_block(rows, columns, height, width, zeroed):
    g = torch.Generator().manual_seed(0)
    r, c = -(-rows // height), -(-columns // width)
    numbers = torch.randint(0, 16, (rows, columns), generator=g)
    scales = torch.rand(r, c, generator=g)
    zeros = torch.randint(0, 16, (r, c), generator=g)
    found = scaled(numbers, scales, zeros if zeroed else None, (height, width))
    for i in range(rows):
        for j in range(columns):
            at = i // height, j // width
            value = float(numbers[i, j]) - (float(zeros[at]) if zeroed else 0)
            assert found[i, j] == torch.tensor(value) * scales[at]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_must_be_finite(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        scaled(torch.ones(2, 2), torch.tensor([[bad]]))
