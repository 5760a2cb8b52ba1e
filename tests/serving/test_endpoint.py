"""The endpoint as OpenAI's own client sees it."""

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import openai
import pytest
import torch

from tests.serving.running import MESSAGES, NO_END

GREEDY = {"messages": MESSAGES, "temperature": 0, "logit_bias": NO_END}


def test_the_models_are_listed(served):
    cards = {card.id: card for card in served.client.models.list()}
    assert list(cards) == ["tiny", "ann", "bob.v2"]
    assert cards["ann"].parent == "tiny"
    assert served.client.models.retrieve("bob.v2").owned_by == "lorakit"
    with pytest.raises(openai.NotFoundError, match="there are tiny, ann, bob.v2"):
        served.client.models.retrieve("carl")


def test_a_chat_is_answered(served, truth):
    ids = truth.ids(MESSAGES)
    found = served.client.chat.completions.create(model="tiny", max_tokens=20, **GREEDY)
    [choice] = found.choices
    assert choice.message.content == truth.text(ids, 20)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), 20)
    again = served.client.chat.completions.create(
        model="tiny", max_completion_tokens=20, max_tokens=30, **GREEDY
    )
    assert again.choices[0].message.content == choice.message.content


def test_a_chat_that_goes_on_is_not_read_again(served, truth):
    turns = [{"role": "user", "content": "a long question " * 17}]
    ask = {"model": "tiny", "temperature": 0, "max_tokens": 8, "logit_bias": NO_END}
    first = served.client.chat.completions.create(messages=turns, **ask)
    turns += [{"role": "assistant", "content": "ab"}, {"role": "user", "content": "and?"}]
    second = served.client.chat.completions.create(messages=turns, **ask)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 256  # whole pages
    assert second.choices[0].message.content == truth.text(truth.ids(turns), 8)


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_adds_up_to_the_whole(served, n):
    options = {"model": "ann", "n": n, "seed": 5, "max_tokens": 15, "messages": MESSAGES}
    whole = served.client.chat.completions.create(**options)
    *chunks, last = served.client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **options
    )
    texts, reasons = [""] * n, [None] * n
    for chunk in chunks:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert chunk.id == chunks[0].id
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert len(set(texts)) == n  # each text has a seed of its own


def test_the_client_collects_a_stream(served, truth):
    whole = truth.text(truth.ids(MESSAGES), 20)
    with served.client.chat.completions.stream(model="tiny", stop=whole[9:12], **GREEDY) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.content == whole[: whole.index(whole[9:12])]


def test_adapters_at_once_write_what_each_writes_alone(served, truth):
    asked = [(name, f"{i} is") for i in range(2) for name in ("tiny", "ann", "bob.v2")]

    def ask(name, text):
        found = served.client.chat.completions.create(
            model=name, max_tokens=25, **GREEDY | {"messages": [{"role": "user", "content": text}]}
        )
        return found.choices[0].message.content

    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(ask, *zip(*asked, strict=True)))
    alone = [
        truth.text(truth.ids([{"role": "user", "content": text}]), 25, name) for name, text in asked
    ]
    assert together == alone
    assert len(set(together[:3])) == 3  # the adapters do something
    assert [ask(*each) for each in asked[:3]] == together[:3]


def test_32_clients_at_once_lose_nothing(served, truth):
    async def ask(client, i):
        stream = await client.completions.create(
            model=("tiny", "ann")[i % 2],
            prompt=f"{i:02}",
            temperature=0,
            max_tokens=8 + i % 5,
            logit_bias=NO_END,
            stream=True,
        )
        chunks = [chunk async for chunk in stream]
        return "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason

    async def everybody():
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0
        ) as client:
            return await asyncio.gather(*[ask(client, i) for i in range(32)])

    found = asyncio.run(everybody())
    for i, (text, reason) in enumerate(found):
        ids = truth.tok.encode(f"{i:02}")
        assert text == truth.text(ids, 8 + i % 5, ("tiny", "ann")[i % 2])
        assert reason == "length"


def test_a_client_that_leaves_frees_its_row(served):
    options = {"model": "tiny", "messages": MESSAGES, "logit_bias": NO_END}
    stream = served.client.chat.completions.create(stream=True, max_tokens=200, **options)
    next(iter(stream))
    stream.close()
    served.wait_until_idle()
    cancelled = 'lorakit_texts_total{finish_reason="cancelled",model="tiny"}'
    before = served.metric(cancelled)
    assert before >= 1
    with pytest.raises(httpx.ReadTimeout):  # and one that waits for a whole answer
        httpx.post(f"{served.url}/v1/chat/completions", json=options, timeout=0.1)
    served.wait_until_idle()
    assert served.metric(cancelled) == before + 1


def test_log_probabilities_are_those_of_the_model(served, truth):
    found = served.client.chat.completions.create(
        model="ann", max_tokens=6, logprobs=True, top_logprobs=4, **GREEDY
    )
    [choice] = found.choices
    entries = choice.logprobs.content
    assert b"".join(bytes(e.bytes) for e in entries).decode(errors="replace") == (
        choice.message.content
    )
    row = truth.ids(MESSAGES)
    for entry, token in zip(entries, truth.tokens(row, 6, "ann"), strict=True):
        logprobs = truth.logits(row, "ann")[-1].log_softmax(-1)
        values = torch.tensor([each.logprob for each in entry.top_logprobs])
        assert (values - logprobs.topk(4).values).abs().max() < 1e-4  # fp32 sums in other orders
        assert math.isclose(entry.logprob, float(logprobs[token]), abs_tol=1e-4)
        assert bytes(entry.bytes) == served.endpoint.texts.bytes_of(token)
        row.append(token)


def test_completions_tell_log_probabilities_in_their_form(served, truth):
    found = served.client.completions.create(
        model="tiny", prompt="ab", temperature=0, max_tokens=3, logprobs=2, logit_bias=NO_END
    )
    logprobs, row = found.choices[0].logprobs, truth.tok.encode("ab")
    tokens = truth.tokens(row, 3)
    assert len(logprobs.tokens) == len(logprobs.text_offset) == 3
    for i, token in enumerate(tokens):
        exact = truth.logits(row + tokens[:i])[-1].log_softmax(-1)
        assert math.isclose(logprobs.token_logprobs[i], float(exact[token]), abs_tol=1e-4)
        assert 1 <= len(logprobs.top_logprobs[i]) <= 2  # two tokens may have one text
    assert logprobs.text_offset[0] == 0


def test_prompts_are_texts_or_tokens(served, truth):
    ids = [truth.tok.encode("ab"), truth.tok.encode("hello")]
    alone = [truth.text(each, 5) for each in ids]
    for prompt, expected in [
        ("ab", alone[:1]),
        (["ab", "hello"], alone),
        (ids[0], alone[:1]),
        (ids, alone),
    ]:
        found = served.client.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=5, logit_bias=NO_END
        )
        assert [choice.text for choice in found.choices] == expected
        assert found.usage.prompt_tokens == sum(map(len, ids[: len(expected)]))
    found = served.client.completions.create(
        model="tiny", prompt="ab", temperature=0, max_tokens=5, logit_bias=NO_END, echo=True, n=2
    )
    assert [choice.text for choice in found.choices] == [f"ab{alone[0]}"] * 2


def test_an_answer_fits_a_schema(served):
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer"}, "kind": {"enum": ["cat", "dog"]}},
        "required": ["age", "kind"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}
    found = served.client.chat.completions.create(
        model="ann", messages=MESSAGES, response_format=form, n=3, seed=1, max_tokens=120
    )
    whole = [c.message.content for c in found.choices if c.finish_reason == "stop"]
    assert whole  # a random model may go on with digits until its length cuts it
    for text in whole:
        jsonschema.validate(json.loads(text), schema)
    wrong = form | {"json_schema": {"name": "pet", "schema": {"type": "animal"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.chat.completions.create(model="ann", messages=MESSAGES, response_format=wrong)
    assert caught.value.param == "response_format"


def test_a_text_ends_before_a_stop_string(served, truth):
    ids = truth.tok.encode("ab")
    whole = truth.text(ids, 20)
    found = served.client.completions.create(
        model="tiny", prompt="ab", temperature=0, max_tokens=20, stop=[whole[6:9]],
        logit_bias=NO_END,
    )  # fmt: skip
    assert found.choices[0].text == whole[: whole.index(whole[6:9])]
    assert found.choices[0].finish_reason == "stop"


def test_a_seed_repeats_a_text(served):
    def draw(**options):
        found = served.client.completions.create(
            model="tiny", prompt="ab", max_tokens=12, logit_bias=NO_END, **options
        )
        return [choice.text for choice in found.choices]

    assert draw(seed=7) == draw(seed=7) == draw(seed=7, n=2)[:1]
    assert draw(seed=-7) == draw(seed=2**63 - 7)
    assert len({*draw(n=4), *draw(), *draw()}) == 6  # without one, each draw is new


def test_health_answers_get_and_head(served):
    assert served.get("/health").status_code == 200
    assert served.http.head("/health").status_code == 200


def test_the_metrics_count(served):
    label = '{model="bob.v2"}'
    served.client.completions.create(model="bob.v2", prompt="ab", max_tokens=1)
    before = served.metric(f"lorakit_generated_tokens_total{label}")
    prompts = served.metric(f"lorakit_prompt_tokens_total{label}")
    served.client.completions.create(
        model="bob.v2", prompt="ab", n=2, max_tokens=7, logit_bias=NO_END
    )
    assert served.metric(f"lorakit_generated_tokens_total{label}") == before + 14
    assert served.metric(f"lorakit_prompt_tokens_total{label}") == prompts + 6
    assert "# TYPE lorakit_first_token_seconds histogram" in served.get("/metrics").text
