"""Sampling, stopping and batching. (Greedy text against transformers: test_parity_hf.)"""

import pytest
import torch

import lorakit as lk
from lorakit.generation import _sample


@pytest.fixture(scope="module")
def model(tiny_dir):
    return lk.load_model(tiny_dir, dtype="float32")


@pytest.fixture(scope="module")
def tok(tiny_dir):
    return lk.load_tokenizer(tiny_dir)


@pytest.mark.parametrize("variant", ["dense", "nf4", "adapted"])
def test_greedy_equals_the_loop_without_a_cache(tiny_dir, tok, variant):
    model = lk.load_model(tiny_dir, dtype="float32", quantize="nf4" if variant == "nf4" else None)
    if variant == "adapted":
        lk.attach(model, lk.LoraConfig(r=2))
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, 0, 0.1)
    ids = tok.encode("hello")
    for _ in range(20):
        token = model(torch.tensor([ids]))[0, -1].argmax().item()
        if token == 2:
            break
        ids.append(token)
    expected = tok.decode(ids[len(tok.encode("hello")) :])
    assert lk.generate(model, tok, "hello", max_new_tokens=20) == expected


def test_a_batch_gives_each_rows_own_text(model, tok):
    prompts = ["hello", "a much longer prompt here", "x", "hello"]
    alone = [lk.generate(model, tok, p, max_new_tokens=12) for p in prompts]
    assert lk.generate_batch(model, tok, prompts, max_new_tokens=12, batch_size=3) == alone


def test_seed(model, tok):
    def sample(seed):
        return lk.generate(model, tok, "hi", max_new_tokens=20, temperature=1.5, seed=seed)

    assert sample(1) == sample(1)
    assert len({sample(s) for s in range(5)}) > 1


def test_sampling_follows_the_probabilities():
    """Frequencies of 20,000 draws lie within 5 standard deviations of softmax(logits / T)."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    probs = (logits / 0.7).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    draws = _sample(logits.expand(n, 4), 0.7, 1.0, generator)
    frequency = draws.bincount(minlength=4) / n
    assert ((frequency - probs).abs() < 5 * (probs * (1 - probs) / n).sqrt()).all()


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert _sample(logits, 1e-40, 1.0, None).item() == 1


def test_a_tokenizer_of_another_model(tok, tmp_path):
    from tests.conftest import tiny_llama

    tiny_llama(vocab_size=100).save_pretrained(tmp_path)
    model = lk.load_model(tmp_path, dtype="float32")
    with pytest.raises(lk.LorakitError, match="outside the model's vocabulary of 100"):
        lk.generate(model, tok, "zzz é")


def test_top_p_keeps_the_smallest_set():
    probs = torch.tensor([0.05, 0.5, 0.15, 0.3])
    draws = _sample(probs.log().expand(5000, 4), 1.0, 0.7, torch.Generator().manual_seed(0))
    assert set(draws.tolist()) == {1, 3}  # 0.5 alone is below 0.7, 0.5 + 0.3 is not
    draws = _sample(probs.log().expand(5000, 4), 1.0, 0.5, torch.Generator().manual_seed(0))
    assert set(draws.tolist()) == {1}


def test_stops_at_every_end_token(tiny_dir, tok):
    model = lk.load_model(tiny_dir, dtype="float32")
    full = lk.generate(model, tok, "hello", max_new_tokens=10)
    third = tok.encode(full, add_special_tokens=False)[2]
    object.__setattr__(model.config, "eos_token_id", [2, third])
    assert full.startswith(lk.generate(model, tok, "hello", max_new_tokens=10))
    assert len(lk.generate(model, tok, "hello", max_new_tokens=10)) < len(full)


def test_mode_is_restored(model, tok):
    model.train()
    lk.generate(model, tok, "x", max_new_tokens=1)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("x", {"max_new_tokens": 0}, "max_new_tokens"),
        ("x", {"temperature": -1.0}, "temperature"),
        ("x", {"top_p": 0.0}, "top_p"),
        ("x", {"temperature": float("nan")}, "temperature"),
        ("x", {"temperature": 1.0, "seed": 2**70}, "seed is"),
        ("x" * 60, {"max_new_tokens": 10}, "exceed the model's 64 positions"),
        ([], {}, "at least one message"),
    ],
)
def test_bad_input(model, tok, prompt, options, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.generate(model, tok, prompt, **options)
