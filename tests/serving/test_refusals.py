"""Requests that are wrong: each gets OpenAI's error object, none a dropped connection."""

import json
import string
import threading
import time

import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lorakit as lk
from tests.serving.running import MESSAGES, NO_END, running

CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
TEXT = {"model": "tiny", "prompt": "ab", "max_tokens": 1}


def error_of(response):
    """The error object of a response, whose form is checked."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"].endswith((".", "?"))
    return error


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": None}, "model", "missing_required_parameter"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": ["hi"]}, "messages", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_type"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"temperature": -1}, "temperature", "decimal_below_min_value"),
        ({"temperature": 2.5}, "temperature", "decimal_above_max_value"),
        ({"max_tokens": "3"}, "max_tokens", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_completion_tokens": 2.0}, "max_completion_tokens", "invalid_type"),
        ({"n": 1000}, "n", "integer_above_max_value"),
        ({"stop": 5}, "stop", "invalid_type"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"seed": 2**63}, "seed", "integer_above_max_value"),
        ({"stream": 1}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": 2}, "logprobs", "invalid_type"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "decimal_above_max_value"),
        ({"tools": [{"type": "web"}]}, "tools[0].type", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema",
         "missing_required_parameter"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"guided_json": {}}, "guided_json", "unsupported_parameter"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "invalid_value"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "invalid_value"),
        ({"temperatur": 0}, "temperatur", "unknown_parameter"),
        ({"model": "carl"}, "model", "model_not_found"),
        ({"max_tokens": 10**6}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages",
         "context_length_exceeded"),
    ],
)  # fmt: skip
def test_a_wrong_chat_names_what_is_wrong(served, change, param, code):
    kind = openai.NotFoundError if code == "model_not_found" else openai.BadRequestError
    with pytest.raises(kind) as caught:
        served.client.chat.completions.create(**{"extra_body": change, **CHAT})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
        ({"prompt": ["a"] * 100}, "n"),  # more than run and wait here
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_wrong_completion_names_what_is_wrong(served, change, param):
    response = served.post(
        "/v1/completions",
        content=json.dumps(TEXT | change),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 400
    assert error_of(response)["param"] == param


def test_parts_other_than_text_are_refused(served):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is"}, image]}]
    with pytest.raises(openai.BadRequestError, match="Only parts of type 'text'") as caught:
        served.client.chat.completions.create(model="tiny", messages=messages)
    assert caught.value.param == "messages[0].content[1].type"


def test_fields_of_other_servers_and_neutral_values_change_nothing(served):
    more = {"user": "me", "session_id": "x", "metadata": {"a": "b"}, "functions": [], "n": None}
    more |= {"reasoning_effort": None, "parallel_tool_calls": True, "top_k": -1, "top_p": 0}
    found = served.client.chat.completions.create(**CHAT, extra_body=more)
    assert found.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[]", "an array"),
        (b"null", "but null"),
        (b'{"temperature": NaN}', "NaN"),
        (b"[" * 100_000, "no JSON"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "no JSON"),
    ],
)
def test_a_body_that_is_no_json_object(served, body, said):
    response = served.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert said in error_of(response)["message"]


def test_other_types_paths_methods_and_sizes(served):
    for response, status in [
        (served.post("/v1/completions", data={"model": "tiny"}), 415),
        (served.post("/v1/nothing", json={}), 404),
        (served.get("/v1/models/"), 404),
        (served.get("/v1/completions"), 405),
        (served.http.delete("/v1/models"), 405),
        (served.post("/v1/completions", json=TEXT | {"prompt": "x" * (5 << 20)}), 413),
    ]:
        assert response.status_code == status
        error_of(response)
        if status == 405:
            assert response.headers["allow"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "role", "content"]), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = [
    "model", "messages", "prompt", "n", "stop", "seed", "stream", "stream_options", "logprobs",
    "top_logprobs", "temperature", "top_p", "top_k", "logit_bias", "tools", "tool_choice", "echo",
    "response_format", "max_completion_tokens", "chat_template_kwargs", "best_of", "suffix",
]  # fmt: skip


@settings(max_examples=100)
@given(
    path=st.sampled_from(["chat/completions", "completions"]),
    change=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3),
)
@example("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]})
@example("chat/completions", {"chat_template_kwargs": {"tokenize": 1}})
@example("chat/completions", {"model": "\ud800"})
def test_whatever_is_asked_gets_an_answer_or_an_error_object(served, path, change):
    body = json.dumps((CHAT if path == "chat/completions" else TEXT) | change)
    response = served.post(
        f"/v1/{path}", content=body, headers={"Content-Type": "application/json"}
    )
    if response.status_code == 200:
        assert response.headers["content-type"].startswith(
            "text/event-stream" if change.get("stream") else "application/json"
        )
    else:
        assert response.status_code in (400, 404)
        error_of(response)


@settings(max_examples=50)
@given(st.text(alphabet=string.printable + "é\x00", max_size=30))
def test_whatever_stands_in_a_body_gets_an_error_object(served, text):
    response = served.post(
        "/v1/chat/completions",
        content=text.encode(),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 400
    error_of(response)


def test_a_full_queue_says_when_to_ask_again(tiny):
    with running(tiny, slots=1, queue=1) as served:
        stream = {"model": "tiny", "prompt": "ab", "max_tokens": 200, "logit_bias": NO_END}
        held = [served.client.completions.create(stream=True, **stream) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            served.client.completions.create(model="tiny", prompt="ab")
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "rate_limit_exceeded"
        for each in held:
            each.close()
        served.wait_until_idle()
        served.client.completions.create(model="tiny", prompt="ab", max_tokens=1)


def test_a_server_that_shuts_down(tiny):
    """The running texts end with an error, and new requests get a 503."""
    with running(tiny, slots=1) as served:
        body = {"model": "tiny", "prompt": "ab", "max_tokens": 250, "logit_bias": NO_END}
        stream = served.client.completions.create(stream=True, **body)
        next(iter(stream))
        whole = []
        waits = threading.Thread(
            target=lambda: whole.append(served.post("/v1/completions", json=body))
        )
        waits.start()
        while served.metric("lorakit_texts_waiting") == 0:
            time.sleep(0.01)
        served.endpoint.worker.close()
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in stream:
                pass
        waits.join()
        assert whole[0].status_code == 503
        assert "shutting down" in error_of(whole[0])["message"]
        assert served.post("/v1/completions", json=TEXT).status_code == 503
        assert served.get("/health").status_code == 503


def test_a_step_that_fails_costs_the_texts_that_ran(tiny, monkeypatch):
    with running(tiny) as served:

        def fails():
            raise RuntimeError("out of memory")

        monkeypatch.setattr(served.endpoint.worker.engine, "step", fails)
        response = served.post("/v1/completions", json=TEXT)
        assert response.status_code == 500
        assert error_of(response)["type"] == "server_error"
        assert served.post("/v1/completions", json=TEXT).status_code == 200


def test_a_key(tiny):
    with running(tiny, api_key="secret", may_load=False) as served:
        url = "/v1/models"
        for headers in ({}, {"Authorization": "secret"}, {"Authorization": "Bearer secre"}):
            response = served.get(url, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert error_of(response)["code"] == "invalid_api_key"
        headers = {"Authorization": "Bearer secret"}
        assert served.get(url, headers=headers).status_code == 200
        assert served.get("/health").status_code == 200
        body = {"lora_name": "a", "lora_path": "b"}
        response = served.post("/v1/load_lora_adapter", json=body, headers=headers)
        assert response.status_code == 403


@pytest.mark.parametrize("key", ["", " ", "two words", "schl\u00fcssel", "a\n"])
def test_a_key_that_no_client_can_send_is_refused(key):
    with pytest.raises(lk.LorakitError, match="the key must be one word"):
        lk.serve(None, None, name="tiny", api_key=key)


def test_a_page_of_another_site_does_not_reach_loopback(tiny):
    with running(tiny, hosts=["localhost", "127.0.0.1", "::1"]) as served:
        for host, status in [
            ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("[", 403),
            ("localhost:8000", 200), ("LOCALHOST", 200), ("[::1]:8000", 200),
        ]:  # fmt: skip
            response = served.get("/v1/models", headers={"Host": host})
            assert response.status_code == status, host
        asked = served.http.options("/v1/completions", headers={"Origin": "http://a.b"})
        assert asked.status_code == 405
        assert not [name for name in asked.headers if name.startswith("access-control")]
