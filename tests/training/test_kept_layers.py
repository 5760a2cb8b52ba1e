"""How many blocks keep gate and up, and that it changes no bit."""

from bisect import bisect_left

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.config.training import OPTIMIZERS
from lorakit.models.decoder import Decoder
from lorakit.training.kept_layers import HEAD_BYTES, SHARE, fitting_layers, kept_layers
from lorakit.training.mode import bytes_of
from tests.meta_gpu import MetaGPU

pytest.importorskip("triton")
LAYERS = 4


@pytest.fixture(scope="module")
def model():
    with MetaGPU() as gpu:
        return gpu.decoder(LAYERS)


@given(tokens=st.integers(1, 1 << 17), free=st.integers(0, 1 << 37))
def test_more_memory_and_fewer_tokens_never_keep_less(model, tokens, free):
    kept = fitting_layers(model, tokens, free)
    assert 0 <= kept <= LAYERS
    assert kept <= fitting_layers(model, tokens, 2 * free)
    assert fitting_layers(model, 2 * tokens, free) <= kept


@given(tokens=st.integers(1, 1 << 17), free=st.integers(0, 1 << 37))
def test_what_is_kept_fits(model, tokens, free):
    """Gate and up are 2 I values of 2 bytes a token."""
    kept = fitting_layers(model, tokens, free)
    assert kept * tokens * 4 * model.config.intermediate_size <= SHARE * free


def test_an_8b_layer_of_2048_tokens(model):
    """An 80 GB GPU keeps them all; 5 GB, a part."""
    assert fitting_layers(model, 2048, 70 << 30) == LAYERS
    assert 0 < fitting_layers(model, 8192, 5 << 30) < LAYERS


def least_memory(linear, dtype):
    """The MB in which every block of four, in Qwen 3.5 4B's widths, keeps gate and up."""
    shared = {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
    shared |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "attention_gate": True}
    config = lk.ModelConfig(
        "qwen3_5_text", 1000, 2560, 9216, 4, 16, 4, 256, linear_layers=linear, **shared
    )
    with MetaGPU():
        with torch.device("meta"):
            model = Decoder(config).to(dtype)
        return bisect_left(
            range(1 << 17), LAYERS, key=lambda mb: fitting_layers(model, 8192, mb << 20)
        )


def test_linear_attention_keeps_more_of_a_token_than_attention():
    """Its convolution and gate, beside four heads of keys."""
    full, mixed = (least_memory(linear, torch.bfloat16) for linear in ([], [True] * 3 + [False]))
    assert 0 < full < mixed


def test_states_of_linear_attention_count_where_they_are_kept():
    """The reference, which fp32 takes on a GPU, keeps 4 bytes for each of dk dv nv in 64 tokens."""
    linear = [True] * 3 + [False]
    half, wide = (least_memory(linear, dtype) for dtype in (torch.bfloat16, torch.float32))
    states = 3 * 8192 / 64 * 4 * 128 * 128 * 32 / SHARE
    # the head's space is the same in both; all else is twice as large
    head = HEAD_BYTES / SHARE
    assert (wide << 20) - head == pytest.approx(2 * ((half << 20) - head) + states, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_the_first_step_makes(tiny_dir, dtype, optim, accumulate):
    """The bytes are those of the gradients, their fp32 sums, and the state that a step leaves."""
    model = lk.load_model(tiny_dir, dtype=dtype)
    config = lk.TrainConfig(optim=optim, gradient_accumulation_steps=accumulate)
    bits, paged = OPTIMIZERS[optim]
    optimizer = lk.optim.AdamW(model.parameters(), state_bits=bits)
    ids = torch.arange(8)[None]
    model.loss(ids, ids)[0].backward()
    optimizer.step()
    made = sum(p.grad.nbytes for p in model.parameters())
    state = sum(t.nbytes for each in optimizer.state.values() for t in each.values())
    sums = 4 * sum(p.numel() for p in model.parameters())
    wide = dtype == "bfloat16" and accumulate > 1
    assert bytes_of(model, config) == made + (0 if paged else state) + (sums if wide else 0)


def test_the_choice(model, tiny_dir):
    assert kept_layers(model, 64, "recompute") == 0
    assert kept_layers(model, 64, "keep") == LAYERS
    on_cpu = lk.load_model(tiny_dir, dtype="float32")
    assert kept_layers(on_cpu, 1 << 40, "auto") == on_cpu.config.num_hidden_layers


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_bit_depends_on_it(tiny_dir, backend):
    """Loss and gradients of more rows than any product of few rows takes."""
    found = []
    for kept in (0, 1, 2):
        torch.manual_seed(0)
        model = lk.attach(lk.load_model(tiny_dir, dtype="bfloat16"), lk.LoraConfig(r=4)).train()
        model.kept_layers = kept
        ids = torch.randint(97, (2, 80))
        with lk.kernels.use_backend(backend):
            loss, _ = model.loss(ids, ids)
            loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
