"""The objects of OpenAI's answers, whole or as the chunks of a stream.

An answer takes the pieces of its rows as they come. `take` returns what a chunk says of a piece;
`whole` returns the answer when all rows have ended. Both come from the same state, so the chunks of
a stream add up to the whole answer.
"""

import json
import secrets
import time
from typing import Any

from lorakit.serving.tokens import TokenTexts
from lorakit.serving.tool_calls import ToolText
from lorakit.serving.worker import Job, Piece

_LEAST_LOGPROB = -9999.0  # what OpenAI writes for a token that cannot come; JSON has no -inf


def to_json(value: object) -> bytes:
    """Return JSON in UTF-8; half a surrogate pair, which UTF-8 lacks, is written as an escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode(errors="backslashreplace")


class Answer:
    """What one client gets; a subclass knows the form of its choices."""

    kind = ""
    """The object's name, when it is whole."""
    chunk_kind = ""
    """The object's name in a stream."""
    prefix = ""
    """The beginning of its id."""

    def __init__(self, job: Job, texts: TokenTexts, prompt_tokens: int, n: int):
        """Begin an answer.

        Args:
            job: The job whose pieces come.
            texts: The texts of tokens.
            prompt_tokens: How many tokens the prompts have, each counted once.
            n: How many texts each prompt gets.
        """
        self.texts, self.prompt_tokens, self.n = texts, prompt_tokens, n
        self.wants_logprobs = job.logprobs is not None
        rows = len(job.rows)
        self.text, self.reasons = [""] * rows, [""] * rows
        self.new_tokens, self.cached = [0] * rows, [0] * rows
        self.logprobs: list[list[Piece]] = [[] for _ in range(rows)]
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self.model = job.model

    def take(self, piece: Piece) -> dict[str, Any] | None:
        """Take a piece; return what the stream says of it, None if that is nothing."""
        row = piece.row
        self.new_tokens[row], self.cached[row] = piece.new_tokens, piece.cached_tokens
        if self.wants_logprobs and piece.token is not None:
            self.logprobs[row].append(piece)
        return None

    def choices(self) -> list[dict[str, Any]]:
        """Return the choices of the whole answer."""
        raise NotImplementedError

    def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        return self._object(self.kind, self.choices()) | {"usage": self.usage()}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a chunk of the stream."""
        return self._object(self.chunk_kind, choices)

    def usage(self) -> dict[str, Any]:
        """Return the count of tokens; a prompt counts once, however many texts it gets."""
        new = sum(self.new_tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached[:: self.n])},
        }

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


class ChatAnswer(Answer):
    """The answer to a chat."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self,
        job: Job,
        texts: TokenTexts,
        prompt_tokens: int,
        n: int,
        tools: list[dict[str, Any]] | None,
    ):
        """Begin an answer, in which calls of these tools may stand; the rest is as in Answer."""
        super().__init__(job, texts, prompt_tokens, n)
        self.parts = [ToolText(tools) for _ in job.rows]
        self.calls: list[list[dict[str, Any]]] = [[] for _ in job.rows]

    def beginning(self) -> list[dict[str, Any]]:
        """Return the choices of the first chunk, which say whose turn it is."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [_choice(i, {"delta": delta}) for i in range(len(self.text))]

    def take(self, piece: Piece) -> dict[str, Any] | None:
        """Take a piece; return what the stream says of it, None if that is nothing."""
        super().take(piece)
        row, reason = piece.row, piece.finish_reason
        text = self.parts[row].push(piece.text)
        if reason is not None:
            rest, self.calls[row] = self.parts[row].finish()
            text += rest
            reason = "tool_calls" if self.calls[row] else reason
            self.reasons[row] = reason
        self.text[row] += text
        delta: dict[str, Any] = {"content": text} if text else {}
        if self.calls[row]:
            delta["tool_calls"] = [{"index": i, **c} for i, c in enumerate(self.calls[row])]
        told = self.wants_logprobs and piece.token is not None
        if not (delta or told or reason):
            return None
        return _choice(row, {"delta": delta}, reason, self._logprobs([piece]) if told else None)

    def choices(self) -> list[dict[str, Any]]:
        """Return the choices of the whole answer."""
        found = []
        for row, text in enumerate(self.text):
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if self.calls[row]:
                message |= {"content": text or None, "tool_calls": self.calls[row]}
            logprobs = self._logprobs(self.logprobs[row]) if self.wants_logprobs else None
            found.append(_choice(row, {"message": message}, self.reasons[row], logprobs))
        return found

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any]:
        entries = [
            {
                **self._entry(piece.token, piece.logprob),
                "top_logprobs": [self._entry(*each) for each in piece.likeliest],
            }
            for piece in pieces
            if piece.token is not None
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.texts.text_of(token),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(self.texts.bytes_of(token)),
        }


class TextAnswer(Answer):
    """Continuations of texts."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, job: Job, texts: TokenTexts, prompt_tokens: int, n: int, echoed: list[str]):
        """Begin an answer whose texts begin with these, one per row; the rest is as in Answer."""
        super().__init__(job, texts, prompt_tokens, n)
        self.echoed, self.text = echoed, list(echoed)
        self.offsets = [0] * len(job.rows)  # of the next token in the text

    def beginning(self) -> list[dict[str, Any]]:
        """Return the choices of the first chunk: the prompts, if they are echoed."""
        return [_choice(i, {"text": t}) for i, t in enumerate(self.echoed) if t]

    def take(self, piece: Piece) -> dict[str, Any] | None:
        """Take a piece; return what the stream says of it, None if that is nothing."""
        super().take(piece)
        row, reason = piece.row, piece.finish_reason
        self.text[row] += piece.text
        self.reasons[row] = reason or ""
        told = self.wants_logprobs and piece.token is not None
        if not (piece.text or told or reason):
            return None
        logprobs = self._logprobs([piece], self.offsets[row]) if told else None
        if piece.token is not None:
            self.offsets[row] += len(self.texts.text_of(piece.token))
        return _choice(row, {"text": piece.text}, reason, logprobs)

    def choices(self) -> list[dict[str, Any]]:
        """Return the choices of the whole answer."""
        found = []
        for row, text in enumerate(self.text):
            logprobs = self._logprobs(self.logprobs[row], 0) if self.wants_logprobs else None
            found.append(_choice(row, {"text": text}, self.reasons[row], logprobs))
        return found

    def _logprobs(self, pieces: list[Piece], offset: int) -> dict[str, Any]:
        """Return log-probabilities in the older form: four lists, of one entry per token."""
        tokens, values, likeliest, offsets = [], [], [], []
        for piece in pieces:
            if piece.token is None:
                continue
            tokens.append(self.texts.text_of(piece.token))
            values.append(max(piece.logprob, _LEAST_LOGPROB))
            likeliest.append(
                {self.texts.text_of(t): max(value, _LEAST_LOGPROB) for t, value in piece.likeliest}
            )
            offsets.append(offset)
            offset += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }


def _choice(
    index: int,
    content: dict[str, Any],
    reason: str | None = None,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
