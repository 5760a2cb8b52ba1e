"""A language model that judges which of two answers is better, over any OpenAI-compatible endpoint.

A judge prefers what it reads first, so it sees each pair in both orders (Zheng et al. 2023,
arXiv:2306.05685, "MT-bench"). An answer wins if both verdicts name it; verdicts that differ, or say
tie, are a tie. A verdict is the last line of the form "Verdict: A", "Verdict: B" or "Verdict: tie"
of what the judge writes; what has none is no verdict, and the pair is not judged.
"""

import json
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from threading import Lock
from typing import Any, Literal

from lorakit.config.errors import LorakitError, check
from lorakit.evaluation.intervals import sign_test

Outcome = Literal["first", "second", "tie", "none"]
"""Which answer is better; "none" where there is no verdict."""

INSTRUCTIONS = """\
You compare two answers to the same request. Judge whether they are correct, do what was asked, and
are complete and clear. Do not prefer an answer for its length, its tone or its place. If there is
a reference, an answer that contradicts it is wrong.
First give your reasons in a few sentences. Then end with exactly one line:
Verdict: A
or
Verdict: B
or
Verdict: tie"""

_QUESTION = """\
[Request]
{prompt}
{reference}
[Answer A]
{a}

[Answer B]
{b}
[End]"""

_VERDICT = re.compile(r"^\W*verdict\W+(a|b|tie)\b", re.IGNORECASE | re.MULTILINE)
_LONGEST_WAIT = 30.0  # seconds before another try
_PART = 1 << 16  # bytes that are read at a time
_LARGEST = 1 << 24  # bytes of an answer; no judge writes so much


class _Straight(urllib.request.HTTPRedirectHandler):
    """Follows no redirection, which would take the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Straight)


@dataclass(frozen=True)
class Judgement:
    """What a judge says of pairs of answers."""

    outcomes: list[Outcome]
    """Better answer of each pair."""
    calls: int
    """Number of requests that were sent, those that failed included."""

    def count(self, outcome: Outcome) -> int:
        """Return the number of pairs with an outcome."""
        return self.outcomes.count(outcome)

    @property
    def win_rate(self) -> float | None:
        """Share of judged pairs that the second answer wins, a tie as half; None without any."""
        counts = Counter(self.outcomes)
        judged = len(self.outcomes) - counts["none"]
        return (counts["second"] + counts["tie"] / 2) / judged if judged else None

    @property
    def p_value(self) -> float:
        """Probability of wins as uneven if neither were better: the sign test without ties."""
        return sign_test(self.count("first"), self.count("second"))

    def __str__(self) -> str:
        rate = "of nothing" if self.win_rate is None else f"{self.win_rate:.3f}"
        return (
            f"second wins {self.count('second')}, first wins {self.count('first')}, ties "
            f"{self.count('tie')}, not judged {self.count('none')}: win rate {rate}, "
            f"p = {self.p_value:.3g}, {self.calls} calls"
        )


def judge_answers(
    prompts: Sequence[str | list[dict[str, Any]]],
    first: Sequence[str],
    second: Sequence[str],
    *,
    endpoint: str,
    judge: str,
    references: Sequence[str] | None = None,
    api_key: str | None = None,
    max_calls: int | None = None,
    retries: int = 3,
    timeout: float = 60.0,
    at_a_time: int = 4,
    max_tokens: int = 1024,
) -> Judgement:
    """Let a language model judge which of two answers is better, for each of several prompts.

    Args:
        prompts: What was asked: texts, or messages.
        first: The answers of one model.
        second: The answers of the other model, in the same order.
        endpoint: Address of the API up to its version, such as "https://api.openai.com/v1".
        judge: Name of the model that judges.
        references: Answers that are known to be right, which the judge sees.
        api_key: The key that the endpoint asks for.
        max_calls: Most requests to send in all; pairs that are left are not judged.
        retries: How often a request is sent again that failed or was refused as one too many.
        timeout: Seconds that a request may take.
        at_a_time: Requests that are sent at a time.
        max_tokens: Most tokens that the judge writes.

    Returns:
        The outcome of each pair, with the number of requests.

    Raises:
        LorakitError: The lists differ in length, a number is out of range, or the endpoint cannot
            be reached or refuses a request.
    """
    known = [""] * len(prompts) if references is None else references
    if len({len(prompts), len(first), len(second), len(known)}) > 1 or not prompts:
        raise LorakitError("judge_answers: give as many answers as prompts, and at least one")
    check(
        retries >= 0 and at_a_time >= 1 and timeout > 0 and (max_calls is None or max_calls >= 0),
        "judge_answers: retries and max_calls must be at least 0, at_a_time at least 1, and "
        "timeout above 0",
    )
    client = _Client(endpoint, judge, api_key, max_calls, retries, timeout, max_tokens)
    with ThreadPoolExecutor(at_a_time) as pool:
        texts = map(_as_text, prompts)
        futures = [
            pool.submit(client.outcome, *pair)
            for pair in zip(texts, known, first, second, strict=True)
        ]
        try:
            outcomes = [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Judgement(outcomes, client.calls)


def _as_text(prompt: str | list[dict[str, Any]]) -> str:
    """Return a prompt as the judge reads it."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)


class _Client:
    """Asks a judge, and counts the requests."""

    def __init__(
        self,
        endpoint: str,
        judge: str,
        api_key: str | None,
        max_calls: int | None,
        retries: int,
        timeout: float,
        max_tokens: int,
    ):
        if not endpoint.startswith(("http://", "https://")):
            raise LorakitError(
                f"judge_answers: endpoint is {endpoint!r}; it must begin with http:// or https://"
            )
        check(
            api_key is None or (api_key.isascii() and api_key.isprintable()),
            "judge_answers: api_key holds a character that no header may have, or a line break",
        )
        self.address = endpoint.rstrip("/") + "/chat/completions"
        self.judge, self.api_key, self.max_calls = judge, api_key, max_calls
        self.retries, self.timeout, self.max_tokens = retries, timeout, max_tokens
        self.calls, self.lock = 0, Lock()

    def outcome(self, prompt: str, reference: str, first: str, second: str) -> Outcome:
        """Return which of two answers is better in both orders."""
        one = self.verdict(prompt, reference, first, second)
        other = self.verdict(prompt, reference, second, first) if one else None
        if one is None or other is None:
            return "none"
        if (one, other) == ("a", "b"):
            return "first"
        return "second" if (one, other) == ("b", "a") else "tie"

    def verdict(self, prompt: str, reference: str, a: str, b: str) -> str | None:
        """Return a, b or tie; None without a verdict, or when no request may be sent any more."""
        known = f"\n[Reference]\n{reference}\n" if reference else ""
        question = _QUESTION.format(prompt=prompt, reference=known, a=a, b=b)
        said = self._ask(
            [
                {"role": "system", "content": INSTRUCTIONS},
                {"role": "user", "content": question},
            ]
        )
        found = _VERDICT.findall(said or "")
        return found[-1].lower() if found else None

    def _ask(self, messages: list[dict[str, str]]) -> str | None:
        """Return what the judge answers, or None when no request may be sent any more."""
        body = {
            "model": self.judge,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            request = urllib.request.Request(self.address, json.dumps(body).encode(), headers)
        except ValueError as error:
            raise LorakitError(f"judge_answers: {self.address} is no address: {error}") from None
        for attempt in range(self.retries + 1):
            with self.lock:
                if self.calls == self.max_calls:
                    return None
                self.calls += 1
            wait = min(_LONGEST_WAIT, 0.5 * 2**attempt)
            try:
                with _OPENER.open(request, timeout=self.timeout) as answer:
                    return _content(_body(answer, time.monotonic() + self.timeout))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {_beginning(error)}"
                wait = _wait(error.headers.get("Retry-After"), wait)
                if error.code not in (408, 409, 429) and error.code < 500:
                    break
            except (OSError, HTTPException) as error:  # no route, a timeout, an end in the middle
                reason = str(error) or type(error).__name__
            if attempt < self.retries:
                time.sleep(wait)
        raise LorakitError(f"judge_answers: {self.address} gave no answer ({reason.strip()})")


def _beginning(error: urllib.error.HTTPError) -> str:
    """Return the beginning of what a refusal says, "" if that does not arrive."""
    with error, suppress(OSError, HTTPException):
        return error.read(300).decode(errors="replace")
    return ""


def _body(answer: HTTPResponse, end: float) -> bytes:
    """Return the body of an answer; raise OSError if it takes too long or never ends."""
    body = bytearray()
    while part := answer.read1(_PART):
        body += part
        if time.monotonic() > end:
            raise TimeoutError("timed out")
        if len(body) > _LARGEST:
            raise OSError(f"its answer has more than {_LARGEST:,} bytes")
    return bytes(body)


def _wait(asked: str | None, otherwise: float) -> float:
    """Return the seconds that a server asks to wait, within bounds; it may name a date."""
    return min(_LONGEST_WAIT, float(asked)) if asked and asked.isdecimal() else otherwise


def _content(body: bytes) -> str:
    """Return the text in an answer of the API."""
    try:
        return str(json.loads(body)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError, RecursionError):
        raise LorakitError(
            f"judge_answers: the endpoint's answer is none of the API: {body[:100]!r}"
        ) from None
