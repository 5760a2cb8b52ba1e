"""Which models are trained with the kernels' own threads, and that they change no bit."""

import pytest
import torch

import lorakit as lk
from lorakit.kernels import threads
from lorakit.kernels.ops import products
from lorakit.models.packed_layers import NF4Linear
from lorakit.training import cores
from tests.conftest import ROWS, tiny_llama, write_tokenizer

multiplies = pytest.mark.skipif(
    not products.available(torch.empty(0, dtype=torch.bfloat16)), reason="no products of bf16"
)


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory):
    """A model whose matrices have whole blocks of 64 values."""
    path = tmp_path_factory.mktemp("wide")
    tiny_llama(hidden_size=64, intermediate_size=128, vocab_size=300).save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture
def made(wide_dir):
    """Returns a model with an adapter."""

    def make(dtype="bfloat16", quantize="nf4", **config):
        model = lk.load_model(wide_dir, dtype=dtype, quantize=quantize)
        config = {"r": 4, "target_modules": "all-linear"} | config
        return lk.attach(model, lk.LoraConfig(**config))

    return make


@pytest.fixture
def has_products(monkeypatch):
    """Let the processor be one that multiplies bf16."""
    monkeypatch.setattr(products, "available", lambda x: x.dtype == torch.bfloat16)


def test_qlora_and_lora_on_all_layers_have_them(made, has_products):
    assert cores.all_by_kernels(made())
    assert cores.all_by_kernels(made(quantize=None))
    assert cores.all_by_kernels(made(target_modules=["q_proj"]))  # the others are packed


def test_where_torch_multiplies_there_are_none(made, has_products):
    assert not cores.all_by_kernels(made(dtype="float32"))
    assert not cores.all_by_kernels(made(quantize="int8"))
    assert not cores.all_by_kernels(made(quantize=None, target_modules=["q_proj"]))
    assert not cores.all_by_kernels(made(use_dora=True))


@multiplies
def test_a_run_has_them_and_gives_them_back(made, wide_dir, tmp_path):
    model, tok, seen = made(), lk.load_tokenizer(wide_dir), []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        config = lk.TrainConfig(output_dir=str(tmp_path / "run"), max_steps=1)
        lk.train(
            model, tok, ROWS, config,
            after_step=lambda: seen.append((threads.count(), torch.get_num_threads())),
        )  # fmt: skip
        assert seen == [(3, 1)]
        assert threads.count() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@multiplies
def test_a_step_has_the_same_bits(made):
    model = made().train()
    assert any(isinstance(module, NF4Linear) for module in model.modules())
    ids = torch.randint(0, model.config.vocab_size, (2, 96))

    def gradients():
        model.zero_grad(set_to_none=True)
        loss, _ = model.loss(ids, ids)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradients()
        for count in (2, 3, 4):
            torch.set_num_threads(count)
            with lk.own_threads(model):
                assert all(map(torch.equal, one, gradients()))
    finally:
        torch.set_num_threads(before)
