"""How frozen weights are stored: what the settings allow, and the ways to say them."""

import pytest

import lorakit as lk
from lorakit.config.quantization import STORAGE, quant_config
from lorakit.kernels.ops.nf4.tensor import BLOCK_SIZES


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_every_block_size_of_the_kernels(size):
    assert lk.QuantConfig(block_size=size).block_size == size


@pytest.mark.parametrize("size", [0, 16, 48, 8192, 64.0, "64", True])
def test_block_sizes_that_no_kernel_has(size):
    with pytest.raises(lk.LorakitError, match="it must be a power of two from 32 to 4096"):
        lk.QuantConfig(block_size=size)


@pytest.mark.parametrize("name", ["quant_type", "embed_tokens", "lm_head"])
def test_storage_of_each_part(name):
    for storage in STORAGE:
        assert getattr(lk.QuantConfig(**{name: storage}), name) == storage
    with pytest.raises(lk.LorakitError, match=f"{name} is 'nf3'; choose nf4, fp4"):
        lk.QuantConfig(**{name: "nf3"})


def test_a_part_that_is_stored_and_skipped():
    with pytest.raises(lk.LorakitError, match="stored as int8, and stands in skip_modules too"):
        lk.QuantConfig(lm_head="int8", skip_modules=["lm_head"])


def test_ways_to_say_a_quantization():
    assert quant_config(None) is None
    assert quant_config("fp4") == quant_config({"quant_type": "fp4"}) == lk.QuantConfig("fp4")
    given = lk.QuantConfig()
    assert quant_config(given) is given
    with pytest.raises(lk.LorakitError, match="quantize must be a mapping of names to values"):
        quant_config(4)
