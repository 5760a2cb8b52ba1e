"""Which models are trained with the kernels' own threads, and that they change no bit."""

import pytest
import torch

import lorakit as lk
from lorakit.kernels import processors, threads
from lorakit.kernels.ops import products
from lorakit.kernels.ops.attention.flash import deterministic
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


@pytest.fixture
def shared(monkeypatch):
    """Returns `FewerThreads` of a process with 8 threads, its clock, and the lines that it says.

    The clock goes by `steps(count, seconds, share)`: each takes so long, and waits for so much of
    it.
    """
    before, lines, clock = torch.get_num_threads(), [], {"now": 100.0, "waited": 7.0}
    monkeypatch.setattr(cores, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(processors, "waited", lambda: clock["waited"])
    monkeypatch.setattr(processors, "set_by_hand", lambda: False)
    torch.set_num_threads(8)
    fewer = cores.FewerThreads(lines.append)

    def steps(count, seconds, share):
        for _ in range(count):
            clock["now"] += seconds
            clock["waited"] += share * seconds
            fewer.after_step()
        return torch.get_num_threads()

    yield fewer, steps, lines
    torch.set_num_threads(before)


def test_a_run_that_has_its_processors_keeps_all_threads(shared):
    _, steps, lines = shared
    assert steps(1000, 1, 0.2) == 8
    assert lines == []


def test_a_run_that_waits_for_processors_has_half_of_the_threads_and_half_again(shared):
    _, steps, lines = shared
    assert [steps(1, 1, 0.6) for _ in range(10)] == [8] * 9 + [4]
    assert steps(9, 1, 0.6) == 4
    assert steps(1, 1, 0.6) == 2
    assert steps(100, 1, 0.6) == 1
    (line,) = lines
    assert "waits for one 60% of its time" in line
    assert "4 of 8 threads" in line


def test_a_calm_step_begins_the_wait_anew(shared):
    _, steps, _ = shared
    for _ in range(10):
        steps(9, 1, 0.6)
        assert steps(1, 1, 0.1) == 8


def test_one_long_step_is_enough(shared):
    assert shared[1](1, 40, 0.5) == 4


def test_all_threads_are_tried_again_and_taken_away_again(shared):
    _, steps, lines = shared
    assert steps(1, 10, 0.5) == 4
    assert steps(299, 1, 0.1) == 4
    assert steps(1, 1, 0.1) == 8
    assert steps(9, 1, 0.5) == 8
    assert steps(1, 1, 0.5) == 4
    assert len(lines) == 1


def test_the_end_gives_all_threads_back(shared):
    fewer, steps, _ = shared
    assert steps(2, 10, 0.5) == 2
    fewer.end()
    assert torch.get_num_threads() == 8


def test_a_number_that_was_set_stays(shared, monkeypatch):
    _, _, lines = shared
    monkeypatch.setattr(processors, "set_by_hand", lambda: True)
    assert cores.FewerThreads(lines.append).waited is None


@pytest.mark.parametrize("taken", [0, 10])
def test_a_number_that_is_set_in_the_run_stays(shared, taken):
    """It is set before threads were taken away, or after that."""
    fewer, steps, _ = shared
    steps(1, taken + 1, 0.5)
    torch.set_num_threads(3)
    assert steps(400, 1, 0.5) == 3
    fewer.end()
    assert torch.get_num_threads() == 3


def test_threads_stay_where_torch_is_to_be_deterministic(shared):
    _, _, lines = shared
    with deterministic():
        assert cores.FewerThreads(lines.append).waited is None


def test_where_the_system_does_not_tell_nothing_happens(shared, monkeypatch):
    _, _, lines = shared
    monkeypatch.setattr(processors, "waited", lambda: None)
    fewer = cores.FewerThreads(lines.append)
    fewer.after_step()
    fewer.end()
    assert torch.get_num_threads() == 8


def test_a_run_watches_its_steps(made, wide_dir, tmp_path, monkeypatch, capsys):
    """Steps wait for half of a minute each; it is fp32 with DoRA, which torch multiplies."""
    clock = {"now": 0.0, "waited": 0.0}

    def tick():
        clock["now"] += 0.001
        return clock["now"]

    def wait():
        clock["now"] += 30
        clock["waited"] += 15
        seen.append(torch.get_num_threads())

    model, tok, seen = made(dtype="float32", use_dora=True), lk.load_tokenizer(wide_dir), []
    monkeypatch.setattr(cores, "perf_counter", tick)
    monkeypatch.setattr(processors, "waited", lambda: clock["waited"])
    monkeypatch.setattr(processors, "set_by_hand", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        config = lk.TrainConfig(output_dir=str(tmp_path / "run"), max_steps=4)
        lk.train(model, tok, ROWS, config, after_step=wait)
        assert seen == [4, 2, 1, 1]  # a step is looked at when the next one is done
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert capsys.readouterr().out.count("others keep the processors busy") == 1
