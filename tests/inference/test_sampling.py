"""How a token is picked, against the probabilities and transformers' processors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.inference.sampling import Picker, Sampling, sample


def test_sampling_follows_the_probabilities():
    """Frequencies of 20,000 draws lie within 5 standard deviations of softmax(logits / T)."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    probs = (logits / 0.7).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    draws = sample(logits.expand(n, 4), Sampling(0.7), generator, None)
    frequency = draws.bincount(minlength=4) / n
    assert ((frequency - probs).abs() < 5 * (probs * (1 - probs) / n).sqrt()).all()


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (1e-20, 1e-30, 1e-40, 1e-300):
        assert sample(logits, Sampling(temperature), None, None).item() == 1


def support(probs, **options):
    """Which tokens 5000 draws hit."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor(probs).log().expand(5000, len(probs))
    return set(sample(logits, Sampling(1.0, **options), generator, None).tolist())


def test_what_top_k_top_p_and_min_p_keep():
    probs = [0.05, 0.5, 0.15, 0.3]
    assert support(probs) == {0, 1, 2, 3}
    assert support(probs, top_p=0.7) == {1, 3}  # 0.5 alone is below 0.7, 0.5 + 0.3 is not
    assert support(probs, top_p=0.5) == {1}
    assert support(probs, top_k=3) == {1, 2, 3}
    assert support(probs, top_k=9) == {0, 1, 2, 3}
    assert support(probs, min_p=0.2) == {1, 2, 3}  # 0.2 * 0.5 = 0.1
    assert support(probs, min_p=0.5) == {1, 3}
    assert support(probs, min_p=1.0) == {1}
    assert support(probs, top_k=2, top_p=0.6) == {1}  # of the mass of the two, 0.5 is 0.625


options = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.3, 3),
        "top_k": st.none() | st.integers(1, 12),
        "top_p": st.floats(0.05, 0.99),
        "min_p": st.floats(0, 0.9),
        "repetition_penalty": st.floats(0.5, 2),
    }
)


@settings(max_examples=40)
@given(options, st.integers(0, 2**20))
def test_the_same_tokens_stay_as_in_transformers(options, seed):
    from transformers import generation as hf

    torch.manual_seed(seed)
    logits, prompt = 3 * torch.randn(1, 10), torch.randint(10, (1, 4))
    seen = torch.zeros(1, 10, dtype=torch.bool).scatter(1, prompt, True)
    theirs = hf.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(prompt, logits)
    theirs = hf.TemperatureLogitsWarper(options["temperature"])(prompt, theirs)
    if options["top_k"] is not None:
        theirs = hf.TopKLogitsWarper(min(options["top_k"], 10))(prompt, theirs)
    theirs = hf.TopPLogitsWarper(options["top_p"])(prompt, theirs)
    if options["min_p"]:
        theirs = hf.MinPLogitsWarper(options["min_p"])(prompt, theirs)
    probs = theirs.softmax(-1)[0]
    generator = torch.Generator().manual_seed(seed)
    draws = sample(logits.expand(2000, 10), Sampling(**options), generator, seen.expand(2000, 10))
    frequency = draws.bincount(minlength=10) / 2000
    # impossible tokens are never drawn; the rest lies within 6 standard deviations and one draw
    assert (frequency[probs == 0] == 0).all()
    assert ((frequency - probs).abs() <= 6 * (probs * (1 - probs) / 2000).sqrt() + 1 / 2000).all()


@settings(max_examples=40)
@given(
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
    repetition=st.sampled_from([1.0, 1.3]),
    bias=st.dictionaries(st.integers(0, 9), st.floats(-5, 5), max_size=4),
    seed=st.integers(0, 2**20),
)
def test_penalties_are_those_of_their_formulas(frequency, presence, repetition, bias, seed):
    """Greedy tokens, against OpenAI's formula written out in Python."""
    random = torch.Generator().manual_seed(seed)
    prompt, new = [3, 4], []
    options = {"frequency_penalty": frequency, "presence_penalty": presence}
    sampling = Sampling(repetition_penalty=repetition, **options)
    picker = Picker(sampling, prompt, 10, torch.device("cpu"), logit_bias=bias)
    for _ in range(12):
        logits = torch.randn(1, 10, generator=random)
        expected = logits[0].double().tolist()
        for token in range(10):
            z, uses = expected[token], new.count(token)
            if token in prompt + new:
                z = z / repetition if z > 0 else z * repetition
            expected[token] = z - uses * frequency - (uses > 0) * presence + bias.get(token, 0)
        found = picker.pick(logits)
        # fp32 may decide a tie of fp64 either way
        assert expected[found] >= max(expected) - 1e-5
        new.append(found)


def test_penalties_outside_their_range():
    for name in ("frequency_penalty", "presence_penalty"):
        for value in (-2.1, 2.1, float("nan")):
            with pytest.raises(lk.LorakitError, match=name):
                Sampling(**{name: value})
