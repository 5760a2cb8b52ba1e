"""Continuous batching: whoever runs beside a request, it gets what it gets alone."""

import dataclasses

import pytest
import torch

import lorakit as lk
from lorakit.inference.engine import Engine
from lorakit.inference.sampling import Sampling


@pytest.fixture(scope="module")
def tok(tiny_dir):
    return lk.load_tokenizer(tiny_dir)


@pytest.fixture
def model(tiny_dir):
    model = lk.load_model(tiny_dir, dtype="float32")
    model.config = dataclasses.replace(model.config, eos_token_id=None)
    return model


def prompts(*lengths):
    random = torch.Generator().manual_seed(0)
    return [torch.randint(30, 250, (n,), generator=random).tolist() for n in lengths]


def drain(engine):
    """Steps until nothing is left: the events."""
    events = []
    for _ in range(1000):
        if engine.idle:
            return events
        events += engine.step()
    raise AssertionError("the engine does not end")


def likeliest(model, prompt, count):
    """The greedy tokens, each from a pass over the whole row."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def with_adapters(model):
    for name in ("a", "b"):
        lk.attach(model, lk.LoraConfig(r=2, target_modules="all-linear"), name=name)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    return model


def test_requests_that_come_and_go_get_the_tokens_they_get_alone(model, tok):
    given = list(zip(prompts(20, 3, 9, 30, 1, 14), [12, 25, 4, 9, 20, 1], strict=True))
    truth = [likeliest(model, prompt, n) for prompt, n in given]
    engine = Engine(model, tok, slots=3, capacity=48)
    requests = []
    for prompt, n in given:  # the last ones come while others run
        requests.append(engine.submit(prompt, max_new_tokens=n, logprobs=2))
        if len(requests) > 2:
            engine.step()
    drain(engine)
    for request, (prompt, n), expected in zip(requests, given, truth, strict=True):
        assert request.tokens == expected
        assert request.finish_reason == "length"
        row = torch.tensor([prompt + request.tokens])
        logprobs = model(row)[0, len(prompt) - 1 : -1].log_softmax(-1)
        found = torch.tensor(request.logprobs)
        exact = logprobs.gather(1, row[0, len(prompt) :, None])[:, 0]
        assert (found - exact).abs().max() <= 2e-5, n  # fp32 in other orders of sums


def test_rows_of_a_batch_have_adapters_of_their_own(model, tok):
    names = ["a", None, "b", "a", None]
    given = prompts(7, 12, 5, 9, 7)
    with_adapters(model)
    truth = []
    for prompt, name in zip(given, names, strict=True):
        with lk.adapter_rows(model, [name]):
            truth.append(likeliest(model, prompt, 8))
    assert truth[0] != truth[4][:8] or given[0] != given[4]
    engine = Engine(model, tok, slots=3, capacity=48)
    requests = [
        engine.submit(prompt, max_new_tokens=8, adapter=name)
        for prompt, name in zip(given, names, strict=True)
    ]
    drain(engine)
    assert [request.tokens for request in requests] == truth
    one = [engine.submit(prompt, max_new_tokens=8, adapter="b") for prompt in given[:2]]
    drain(engine)
    with lk.adapter_rows(model, ["b"]):
        assert [r.tokens for r in one] == [likeliest(model, p, 8) for p in given[:2]]


def test_a_prompt_takes_over_what_a_line_holds_of_it(model, tok):
    (prompt,) = prompts(30)
    with_adapters(model)
    engine = Engine(model, tok, slots=2, capacity=64)
    first = engine.submit(prompt, max_new_tokens=6)
    drain(engine)
    turn = prompt + first.tokens + prompts(4)[0]
    second = engine.submit(turn, max_new_tokens=6)
    other = engine.submit(turn, max_new_tokens=6, adapter="a")  # whose keys are others
    drain(engine)
    assert (first.cached_tokens, second.cached_tokens, other.cached_tokens) == (0, 35, 0)
    with lk.disable_adapters(model):
        assert second.tokens == likeliest(model, turn, 6)
    with lk.adapter_rows(model, ["a"]):
        assert other.tokens == likeliest(model, turn, 6)
    same = [engine.submit(turn[:20] + prompt[:n], max_new_tokens=3) for n in (1, 2)]
    drain(engine)
    assert [request.cached_tokens for request in same] == [20, 20]  # of a row that runs, too
    with lk.disable_adapters(model):
        assert [r.tokens for r in same] == [likeliest(model, r.prompt, 3) for r in same]


def test_draws_are_those_of_the_request_alone(model, tok):
    sampling = Sampling(temperature=1.5, top_k=40, repetition_penalty=1.3)
    given = prompts(6, 11, 4)

    def draw(which):
        engine = Engine(model, tok, slots=3, capacity=32)
        found = {i: engine.submit(given[i], sampling, max_new_tokens=12, seed=i) for i in which}
        drain(engine)
        return {i: request.tokens for i, request in found.items()}

    together = draw([0, 1, 2])
    assert len(set(map(tuple, together.values()))) == 3
    for i in range(3):
        assert draw([i])[i] == together[i]


def test_a_text_ends_at_a_stop_string_and_an_end_token(model, tok):
    prompt = tok.encode("hi")
    engine = Engine(model, tok)
    whole = engine.submit(prompt, max_new_tokens=30)
    drain(engine)
    pieces, stop = [], whole.text[5:8]
    request = engine.submit(prompt, max_new_tokens=30, stop=stop)
    while not engine.idle:
        pieces += [event.text for event in engine.step()]
    assert request.finish_reason == "stop"
    assert request.text == "".join(pieces) == whole.text[: whole.text.index(stop)]
    model.config = dataclasses.replace(model.config, eos_token_id=whole.tokens[9])
    ended = engine.submit(prompt, max_new_tokens=30)
    drain(engine)
    n = whole.tokens.index(whole.tokens[9])
    assert (ended.tokens, ended.finish_reason) == (whole.tokens[:n], "stop")


def test_a_cancelled_request_makes_room(model, tok):
    engine = Engine(model, tok, slots=1, capacity=64)
    first, second, third = (engine.submit(p, max_new_tokens=20) for p in prompts(5, 6, 7))
    engine.step()
    engine.step()
    first.cancel()
    second.cancel()
    events = engine.step()
    assert {first, second} == {event.request for event in events if event.request.done}
    assert first.finish_reason == second.finish_reason == "cancelled"
    assert len(first.tokens) == 2
    drain(engine)
    assert len(third.tokens) == 20


def test_logits_that_are_nan_end_one_request(model, tok):
    with torch.no_grad():
        model.model.embed_tokens.weight[299] = torch.nan
    engine = Engine(model, tok, slots=2, capacity=64)
    broken = engine.submit([5, 299], max_new_tokens=4)
    good = engine.submit([5, 6], max_new_tokens=4)
    drain(engine)
    assert broken.finish_reason == "error"
    assert "not finite" in str(broken.error)
    assert good.finish_reason == "length"
    after = engine.submit([5, 6, 7], max_new_tokens=4)
    drain(engine)
    assert after.finish_reason == "length"


def test_what_cannot_be_answered_is_refused(model, tok):
    with pytest.raises(lk.LorakitError, match="slots must be at least 1"):
        Engine(model, tok, slots=0)
    with pytest.raises(lk.LorakitError, match="capacity between 1 and"):
        Engine(model, tok, capacity=10**6)
    engine = Engine(model, tok, capacity=16)
    for prompt, options, message in [
        ([], {}, "no tokens"),
        ([5] * 10, {"max_new_tokens": 7}, "do not fit the 16 positions"),
        ([5], {"max_new_tokens": 0}, "must be at least 1"),
        ([5] * 16, {}, "do not fit"),
        ([300], {}, "300"),
        ([5], {"adapter": "a"}, "no adapter is attached"),
        ([5], {"stop": ""}, "stop must be"),
        ([5], {"seed": -1}, "seed is"),
    ]:
        with pytest.raises(lk.LorakitError, match=message):
            engine.submit(prompt, **options)
    lk.attach(model, lk.PromptTuningConfig(num_virtual_tokens=3), name="soft")
    with pytest.raises(lk.LorakitError, match="learned prompt"):
        engine.submit([5], adapter="soft")
    assert engine.idle
