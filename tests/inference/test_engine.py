"""Continuous batching: whoever runs beside a request, it gets what it gets alone."""

import dataclasses
import random
import threading

import pytest
import torch

import lorakit as lk
from lorakit.inference import decode, engine, kv_cache
from lorakit.inference.engine import Engine
from lorakit.inference.sampling import Sampling
from tests.conftest import FAMILY_VARIANTS, LOGITS, tiny


@pytest.fixture(scope="module")
def tok(tiny_dir):
    return lk.load_tokenizer(tiny_dir)


@pytest.fixture
def model(tiny_dir):
    model = lk.load_model(tiny_dir, dtype="float32")
    model.config = dataclasses.replace(model.config, eos_token_id=None)
    return model


@pytest.fixture
def small_pages(monkeypatch):
    """Pages and parts short enough that the rows of tiny models have several."""
    for module in (kv_cache, decode, engine):
        monkeypatch.setattr(module, "PAGE", 4)
        monkeypatch.setattr(module, "PART", 8)


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


def test_a_prompt_takes_over_what_the_cache_holds_of_it(model, tok, small_pages):
    (prompt,) = prompts(30)
    with_adapters(model)
    engine = Engine(model, tok, slots=2, capacity=64)
    first = engine.submit(prompt, max_new_tokens=6)
    drain(engine)
    turn = prompt + first.tokens + prompts(4)[0]
    second = engine.submit(turn, max_new_tokens=6)
    other = engine.submit(turn, max_new_tokens=6, adapter="a")  # whose keys are others
    drain(engine)
    # in fp32 torch computes prompts, the compiled step new tokens: their bits are not shared
    assert (first.cached_tokens, second.cached_tokens, other.cached_tokens) == (0, 24, 0)
    with lk.disable_adapters(model):
        assert second.tokens == likeliest(model, turn, 6)
    with lk.adapter_rows(model, ["a"]):
        assert other.tokens == likeliest(model, turn, 6)
    same = [engine.submit(turn[:20] + prompt[:n], max_new_tokens=3) for n in (1, 2)]
    drain(engine)
    assert [request.cached_tokens for request in same] == [16, 16]
    engine.forget()
    again = engine.submit(turn, max_new_tokens=1)
    drain(engine)
    assert again.cached_tokens == 0


def test_rows_share_pages_while_they_run(model, tok, small_pages):
    """Samples of one prompt are one reading of it, and one copy of its full pages."""
    (prompt,) = prompts(19)
    engine = Engine(model, tok, slots=4, capacity=32)
    given = [
        engine.submit(prompt, Sampling(temperature=1.0), max_new_tokens=9, seed=n) for n in range(4)
    ]
    while engine.running < 4 or not all(request.tokens for request in given):
        engine.step()
    (pool,) = engine.cache.pools
    assert [request.cached_tokens for request in given] == [0, 19, 19, 19]
    assert pool.users.count(4) == 4  # four pages of four positions, that all rows use
    assert set(pool.users) == {0, 1, 4}
    drain(engine)
    assert pool.room == pool.count
    assert len({tuple(request.tokens) for request in given}) > 1


def test_another_adapter_of_the_same_name_shares_nothing(model, tok, small_pages):
    with_adapters(model)
    (prompt,) = prompts(20)
    engine = Engine(model, tok, capacity=48)
    before, base = (engine.submit(prompt, max_new_tokens=8, adapter=name) for name in ("a", None))
    drain(engine)
    lk.delete_adapter(model, "a")
    lk.attach(model, lk.LoraConfig(r=3, target_modules="all-linear"), name="a")
    after, same = (engine.submit(prompt, max_new_tokens=8, adapter=name) for name in ("a", None))
    drain(engine)
    assert (after.cached_tokens, same.cached_tokens) == (0, 16)
    assert after.tokens == base.tokens == same.tokens  # a new adapter changes nothing yet
    assert before.tokens != base.tokens


# ---- bits ----

BITS = {
    "bf16": ("llama", {}, "bfloat16"),
    "fp32": ("llama", {}, "float32"),
    "gemma 3": FAMILY_VARIANTS["gemma3_text"] + ("bfloat16",),
    "all layers slide": ("mistral", {"sliding_window": 6}, "bfloat16"),
    "windows in fp32": FAMILY_VARIANTS["gemma3_text"] + ("float32",),
}


def bits_model(folder, case):
    family, options, dtype = BITS[case]
    vocabulary = {"vocab_size": 300, "max_position_embeddings": 128}
    tiny(family, **{**options, **vocabulary}).save_pretrained(folder)
    model = lk.load_model(folder, dtype=dtype)
    model.config = dataclasses.replace(model.config, eos_token_id=None)
    with_adapters(model)
    return model


def bits_engine(model, tok, **options):
    engine = Engine(model, tok, capacity=60, **options)
    if engine.decoding.compiled is None:
        pytest.skip("the CPU library was not built")
    engine.decoding.compiled_prompts = model.dtype == torch.bfloat16  # on any processor
    return engine


def told(request):
    return request.tokens, request.logprobs, request.top_logprobs


@pytest.mark.parametrize("case", BITS)
def test_a_request_gets_the_same_bits_whatever_happens_around_it(tmp_path, tok, small_pages, case):
    """Alone; beside others; sharing what they have; put back where the cache is full, and again."""
    model, draws = bits_model(tmp_path, case), random.Random(0)
    base, given = prompts(24, 24), []
    for n in range(14):
        prompt = draws.choice(base)[: draws.randint(1, 24)] + prompts(7)[0][: draws.randint(0, 7)]
        adapter = draws.choice([None, None, "a", "b"])
        given.append((prompt, draws.randint(1, 14), adapter, n))

    def submit(engine, prompt, count, adapter, seed):
        sampling = Sampling(temperature=1.0 if seed % 2 else 0.0, frequency_penalty=0.5)
        return engine.submit(
            prompt, sampling, max_new_tokens=count, adapter=adapter, seed=seed, logprobs=5
        )

    alone = []
    for each in given:
        engine = bits_engine(model, tok, slots=1)
        alone.append(submit(engine, *each))
        drain(engine)
    for slots, tokens in ((3, None), (5, 80), (4, 60), (2, None)):
        engine, put_back, found = bits_engine(model, tok, slots=slots, cache_tokens=tokens), 0, []
        for each in given:
            found.append(submit(engine, *each))
            if draws.random() < 0.5:
                engine.step()
        while not engine.idle:
            before = list(engine._running)
            engine.step()
            put_back += sum(row.line is None and not row.request.done for row in before)
        assert [told(request) for request in found] == [told(request) for request in alone]
        assert any(request.cached_tokens for request in found)
        if tokens is not None and case != "all layers slide":
            assert put_back > 0
        assert all(pool.room == pool.count for pool in engine.cache.pools)


def test_a_chat_goes_on_from_its_own_answer_where_bits_allow_it(tmp_path, tok, small_pages):
    model = bits_model(tmp_path, "bf16")
    (prompt,) = prompts(13)
    engine = bits_engine(model, tok, slots=2)
    first = engine.submit(prompt, max_new_tokens=10)
    drain(engine)
    turn = prompt + first.tokens + prompts(5)[0]
    second = engine.submit(turn, max_new_tokens=5, logprobs=3)
    drain(engine)
    assert second.cached_tokens == 20  # 13 + 10 - 1 positions are in the cache, 5 pages of 4
    other = bits_engine(model, tok, slots=2)
    alone = other.submit(turn, max_new_tokens=5, logprobs=3)
    drain(other)
    assert told(second) == told(alone)


def test_what_exceeds_the_cache_is_refused_or_waits(model, tok, small_pages):
    engine = Engine(model, tok, slots=4, capacity=60, cache_tokens=30)  # 8 pages of 4
    with pytest.raises(lk.LorakitError, match="do not fit the 32 positions"):
        engine.submit([5] * 20, max_new_tokens=13)
    given = [engine.submit([5 + n] * 20, max_new_tokens=12) for n in range(3)]
    engine.step()
    assert (engine.running, engine.waiting) == (1, 2)
    drain(engine)
    assert [len(request.tokens) for request in given] == [12] * 3
    assert [request.tokens for request in given] == [
        likeliest(model, request.prompt, 12) for request in given
    ]


def test_no_row_waits_for_the_pages_of_another(model, tok, small_pages):
    """A capacity of 9 takes 3 pages of 4 a row; 4 rows of 9 positions would be 9 pages."""
    engine = Engine(model, tok, slots=4, capacity=9)
    for i in range(4):
        engine.submit([5 + i, 7], max_new_tokens=7)
    while not engine.idle:
        engine.step()
        assert engine.waiting == 0


def test_what_is_taken_over_counts_once(model, tok, small_pages):
    """However often a row that waits for room looked for its beginning."""
    engine = Engine(model, tok, slots=2, capacity=28, cache_tokens=28)  # 7 pages of 4
    first, second = (engine.submit([5] * 20, max_new_tokens=8) for _ in range(2))
    while not first.done:
        engine.step()
        assert engine.waiting == 1 or first.done
    drain(engine)
    assert (first.cached_tokens, second.cached_tokens) == (0, 16)  # of 19, parts of 8


def test_other_threads_may_submit_and_cancel(model, tok):
    engine, given = Engine(model, tok, slots=3, capacity=48), []

    def client(number):
        for n in range(10):
            request = engine.submit([5 + number, 6 + n], max_new_tokens=4)
            given.append(request)
            if n % 3 == 0:
                request.cancel()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    done = set()
    while any(thread.is_alive() for thread in threads) or not engine.idle:
        done |= {event.request for event in engine.step() if event.request.done}
    assert len(given) == 40
    assert done == set(given)
    assert all(len(r.tokens) == 4 or r.finish_reason == "cancelled" for r in given)


# ---- what a request asks for ----


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


class Letters:
    """A constraint: some tokens in turn, any number of times; the text may end after the last."""

    def __init__(self, tokens, most):
        self.tokens, self.most, self.taken = tokens, most, []

    @property
    def complete(self):
        return len(self.taken) % len(self.tokens) == 0

    @property
    def ended(self):
        return len(self.taken) == self.most

    def allowed(self):
        found = torch.zeros(200, dtype=torch.bool)  # fewer than the model has
        found[self.tokens[len(self.taken) % len(self.tokens)]] = True
        return found

    def take(self, token):
        self.taken.append(token)


def test_a_constraint_says_which_tokens_come_and_where_the_text_ends(model, tok):
    engine = Engine(model, tok, capacity=48)

    def submit(most, end, **options):  # token 2 ends a text
        constraint = Letters([70, 71, 72], most)
        return engine.submit([5, 6], constraint=constraint, logit_bias={2: end}, **options)

    ends = submit(9, -100, max_new_tokens=20, logprobs=2)
    cut = submit(9, -100, max_new_tokens=7)
    likely = submit(99, 100)
    drain(engine)
    assert (ends.tokens, ends.finish_reason) == ([70, 71, 72] * 3, "stop")
    assert (cut.tokens, cut.finish_reason) == ([70, 71, 72, 70, 71, 72, 70], "length")
    assert (likely.tokens, likely.finish_reason) == ([], "stop")  # it may end at once
    with torch.no_grad():  # the log-probabilities are the model's, of whatever was allowed
        truth = model(torch.tensor([[5, 6]]))[0, -1].log_softmax(-1)
    assert abs(ends.logprobs[0] - truth[70]) <= 2e-5  # fp32 in other orders of sums
    values, tokens = truth.topk(2)
    assert [token for token, _ in ends.top_logprobs[0]] == tokens.tolist()
    assert (torch.tensor(ends.top_logprobs[0])[:, 1] - values).abs().max() <= 2e-5


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
    with pytest.raises(lk.LorakitError, match="cache_tokens is 0"):
        Engine(model, tok, cache_tokens=0)
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
        ([5], {"logprobs": 21}, "logprobs is 21"),
        ([5], {"logprobs": -1}, "logprobs is -1"),
        ([5], {"logit_bias": {300: 1.0}}, "for token 300"),
        ([5], {"logit_bias": {3: float("nan")}}, "logit_bias has nan"),
    ]:
        with pytest.raises(lk.LorakitError, match=message):
            engine.submit(prompt, **options)
    lk.attach(model, lk.PromptTuningConfig(num_virtual_tokens=3), name="soft")
    for each in (engine, Engine(model, tok, slots=2, capacity=16)):  # one has not seen it, one has
        with pytest.raises(lk.LorakitError, match="learned prompt"):
            each.submit([5], adapter="soft")
        assert each.idle


# ---- layers that keep a state ----


def test_rows_with_a_state_are_put_off(tmp_path, tok, small_pages):
    """A row goes back if the cache is full, and is read again later.

    A prompt is taken over by who waits for the same one, and by nobody later.
    """
    family, options = FAMILY_VARIANTS["qwen3_5_text"]
    tiny(family, **{**options, "vocab_size": 300}).save_pretrained(tmp_path)
    model = lk.load_model(tmp_path, dtype="float32")
    model.config = dataclasses.replace(model.config, eos_token_id=None)
    with_adapters(model)
    names, given = ["a", None, "a", "b"], prompts(20, 3, 20, 11)
    given[2] = given[0]
    truth = []
    for prompt, name in zip(given, names, strict=True):
        with lk.adapter_rows(model, [name]):
            truth.append(likeliest(model, prompt, 12))
    engine, put_back = Engine(model, tok, slots=3, capacity=40, cache_tokens=52), 0
    requests = [
        engine.submit(prompt, max_new_tokens=12, adapter=name)
        for prompt, name in zip(given, names, strict=True)
    ]
    while not engine.idle:
        before = list(engine._running)
        engine.step()
        put_back += sum(row.line is None and not row.request.done for row in before)
    assert put_back > 0
    assert [request.tokens for request in requests] == truth
    assert not any(requests[i].cached_tokens for i in (0, 1, 3))
    assert all(pool.room == pool.count for pool in engine.cache.pools)


def test_rows_with_a_state_go_on_in_any_company(tmp_path):
    """The rows of the last call, some of them, others, in another order, and one that begins."""
    family, options = FAMILY_VARIANTS["qwen3_5_text"]
    tiny(family, **options).save_pretrained(tmp_path)
    model = lk.load_model(tmp_path, dtype="float32")
    decoding = decode.Decoding(model, 4, 40)
    rows = [[int(token) % 97 for token in prompt] for prompt in prompts(9, 2, 14)]
    lines, _ = decoding.read(rows)
    lines.append(decoding.begin())
    rows.append([])
    for group in ([0, 1, 2], [0, 1, 2], [2, 0], [1, 0, 2], [3, 1], [0, 1, 2, 3]):
        for i in group:
            rows[i].append(3 + 7 * len(rows[i]) % 90)
        tokens = torch.tensor([rows[i][-1:] for i in group])
        logits = decoding([lines[i] for i in group], tokens)
        for i, found in zip(group, logits, strict=True):
            # the chunks of the delta rule end elsewhere, so that sums come in another order
            assert (model(torch.tensor([rows[i]]))[0, -1] - found).abs().max() <= LOGITS


def test_rows_of_heads_with_sinks_share_a_beginning(tmp_path, tok, small_pages):
    """A batch of gpt-oss gives what each row gives alone; a prompt is taken over from another."""
    family, options = FAMILY_VARIANTS["gpt_oss"]
    sizes = {"vocab_size": 300, "max_position_embeddings": 128}
    tiny(family, **{**options, **sizes}).save_pretrained(tmp_path)
    model = lk.load_model(tmp_path, dtype="float32")
    model.config = dataclasses.replace(model.config, eos_token_id=None)
    given = prompts(20, 3, 20, 11)
    given[2] = given[0]
    truth = [likeliest(model, prompt, 12) for prompt in given]
    engine = Engine(model, tok, slots=2, capacity=60)
    requests = [engine.submit(prompt, max_new_tokens=12) for prompt in given]
    while not engine.idle:
        engine.step()
    assert [request.tokens for request in requests] == truth
    assert any(request.cached_tokens for request in requests)


@pytest.mark.parametrize("length", [3, 4, 7, 19])
def test_a_prompt_of_several_is_read_once(model, tok, small_pages, length):
    """Also one that is shorter than a page; each gets the bits that it gets alone."""
    (prompt,) = prompts(length)

    def run(engine, seeds):
        options = {"max_new_tokens": 6, "logprobs": 0}
        hot = Sampling(temperature=1.0)
        given = [engine.submit(prompt, hot, seed=seed, **options) for seed in seeds]
        while not engine.idle:
            engine.step()
        return given

    alone = [run(Engine(model, tok, slots=4, capacity=32), [seed])[0] for seed in range(4)]
    together = run(Engine(model, tok, slots=4, capacity=32), range(4))
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    assert [each.logprobs for each in together] == [each.logprobs for each in alone]
    assert [each.cached_tokens for each in together] == [0, *[length] * 3]
