"""A judge over HTTP: both orders, ties, retries, and a bound on the calls, with a stub endpoint."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import lorakit as lk
from lorakit.evaluation import judge as judging


@contextmanager
def endpoint(answer):
    """An endpoint that answers with `answer(body)`: a text, or a status with headers."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, dict(self.headers), body))
            said = answer(body)
            status, headers = (200, {}) if isinstance(said, str | bytes) else said
            if isinstance(said, str):
                said = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            if not isinstance(said, bytes):
                said = b"refused"
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(said))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def answers_of(body):
    """The two answers that a judge sees."""
    text = body["messages"][-1]["content"]
    a, b = text.partition("[Answer A]\n")[2].split("\n\n[Answer B]\n")
    return a, b.removesuffix("\n[End]")


def longer(body):
    a, b = answers_of(body)
    verdict = "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return f"Verdict: A is what one might think first.\n**Verdict: {verdict}**"


def judge(address, first, second, **options):
    options = {"endpoint": address, "judge": "j", **options}
    return lk.judge_answers([f"q{i}" for i in range(len(first))], first, second, **options)


def test_an_answer_wins_that_wins_in_both_orders():
    first, second = ["aa", "a", "aa", "a"], ["b", "bb", "bb", "bbb"]
    with endpoint(longer) as (address, seen):
        found = judge(address, first, second, references=["r"] * 4, api_key="secret")
    assert found.outcomes == ["first", "second", "tie", "second"]
    assert found.win_rate == pytest.approx((2 + 0.5) / 4)
    assert found.p_value == 1  # two of three are nothing
    assert found.calls == len(seen) == 8
    assert {answers_of(body) for _, _, body in seen} == {
        pair for a, b in zip(first, second, strict=True) for pair in ((a, b), (b, a))
    }
    for path, headers, body in seen:
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == "Bearer secret"
        assert (body["model"], body["temperature"]) == ("j", 0)
        assert "[Request]\nq" in body["messages"][1]["content"]
        assert "[Reference]\nr\n" in body["messages"][1]["content"]


def test_a_judge_that_prefers_a_place_finds_ties():
    with endpoint(lambda body: "The first is fine.\nverdict: a") as (address, _):
        found = judge(address, ["x"] * 3, ["y"] * 3)
    assert (found.outcomes, found.win_rate) == (["tie"] * 3, 0.5)


def test_what_has_no_verdict_is_not_judged_and_chats_are_texts():
    with endpoint(lambda body: "I cannot say.") as (address, seen):
        chat = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes?"}]
        found = lk.judge_answers([chat], ["x"], ["y"], endpoint=address, judge="j")
    assert (found.outcomes, found.calls, found.win_rate) == (["none"], 1, None)
    assert "user: Hi?\n\nassistant: Yes?" in seen[0][2]["messages"][1]["content"]
    assert "not judged 1" in str(found)


def test_a_request_that_fails_is_sent_again(monkeypatch):
    waits, left = [], [(429, {"Retry-After": "7"}), (503, {}), b"x" * 5]
    monkeypatch.setattr(judging.time, "sleep", waits.append)
    with endpoint(lambda body: left.pop(0) if len(left) > 1 else longer(body)) as (address, _):
        found = judge(address, ["aa"], ["b"], at_a_time=1)
    assert (found.outcomes, found.calls) == (["first"], 4)
    assert waits == [7, 1.0]  # what the server asked for, and then twice half a second


def test_the_calls_are_bounded(monkeypatch):
    with endpoint(longer) as (address, seen):
        found = judge(address, ["aa"] * 4, ["b"] * 4, max_calls=5, at_a_time=1)
        none = judge(address, ["aa"], ["b"], max_calls=0)
    assert found.outcomes == ["first", "first", "none", "none"]
    assert found.calls == len(seen) == 5
    assert (none.outcomes, none.calls) == (["none"], 0)


def test_an_endpoint_that_is_away_or_slow_is_one_sentence(monkeypatch):
    monkeypatch.setattr(judging.time, "sleep", lambda seconds: None)
    with endpoint(longer) as (address, _):
        pass
    with pytest.raises(lk.LorakitError, match=r"/v1/chat/completions gave no answer \(.*refused"):
        judge(address, ["a"], ["b"])
    over = threading.Event()
    with endpoint(lambda body: over.wait(20) and "x") as (address, seen):
        started = time.monotonic()
        with pytest.raises(lk.LorakitError, match="gave no answer .*timed out"):
            judge(address, ["a"], ["b"], timeout=0.2, retries=1)
        over.set()
        assert time.monotonic() - started < 15
        assert len(seen) == 2


def test_a_refusal_that_breaks_off_is_one_sentence(monkeypatch):
    """The body is said to be in chunks, and is in none."""
    monkeypatch.setattr(judging.time, "sleep", lambda seconds: None)
    broken = (500, {"Transfer-Encoding": "chunked"})
    refused = pytest.raises(lk.LorakitError, match=r"gave no answer \(HTTP 500:\)")
    with endpoint(lambda body: broken) as (address, seen), refused:
        judge(address, ["a"], ["b"], retries=1)
    assert len(seen) == 2


class _Drops:
    """An answer that comes byte by byte and never ends."""

    def __init__(self, many):
        self.many = many

    def read1(self, size):
        return b" " * (size if self.many else 1)


def test_an_answer_that_never_ends():
    with pytest.raises(TimeoutError):
        judging._body(_Drops(many=False), time.monotonic() + 0.05)
    with pytest.raises(OSError, match="its answer has more than 16,777,216 bytes"):
        judging._body(_Drops(many=True), time.monotonic() + 60)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ((401, {}), r"gave no answer \(HTTP 401: refused\)"),
        (b"{}", "none of the API: b'{}'"),
        (b"[" * 100_000, "none of the API"),
        ((302, {"Location": "/elsewhere"}), r"gave no answer \(HTTP 302: refused\)"),
    ],
)
def test_an_endpoint_that_refuses_is_asked_once(said, message):
    refused = pytest.raises(lk.LorakitError, match=message)
    with endpoint(lambda body: said) as (address, seen), refused:
        judge(address, ["a"], ["b"])
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second": ["b", "c"]}, "give as many answers as prompts"),
        ({"first": [], "second": []}, "and at least one"),
        ({"address": "localhost:8000"}, "it must begin with http:// or https://"),
        ({"retries": -1}, "retries and max_calls must be at least 0"),
        ({"address": "http://[::1"}, "is no address: Invalid IPv6 URL"),
        ({"api_key": "a\n"}, "api_key holds a character that no header may have"),
        ({"api_key": "\u20ac"}, "api_key holds a character that no header may have"),
    ],
)
def test_what_is_refused(options, message):
    options = {"address": "http://localhost", "first": ["a"], "second": ["b"], **options}
    with pytest.raises(lk.LorakitError, match=message):
        judge(**options)
