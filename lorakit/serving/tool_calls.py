"""Calls of tools in an answer: from the text of Hermes and Qwen to OpenAI's objects.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>

Only what is exactly of this form becomes a call: each tag holds a JSON object with the name of a
tool of the request and an object of arguments, and nothing but calls follows the first. Anything
else stays text. What a model writes in another form stays text too.
"""

import json
import re
import secrets
from typing import Any

_OPEN = "<tool_call>"
_CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>\s*", re.DOTALL)


class ToolText:
    """An answer as it comes, in which calls of tools may stand."""

    def __init__(self, tools: list[dict[str, Any]] | None):
        """Begin an answer.

        Args:
            tools: The tools of the request; None: the text has no calls.
        """
        self.names = {tool["function"]["name"] for tool in tools or []}
        self._held = ""  # what may be the beginning of a call, or is one

    def push(self, text: str) -> str:
        """Take the next piece; return what is certain to be text."""
        if not self.names:
            return text
        self._held += text
        at = _begins(self._held)
        certain, self._held = self._held[:at], self._held[at:]
        return certain

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """Return the rest of the text, and the calls that stand at the end of the answer."""
        held, self._held = self._held, ""
        calls, at = [], 0
        while found := _CALL.match(held, at):
            call = self._call(found[1])
            if call is None:
                return held, []
            calls.append(call)
            at = found.end()
        return ("", calls) if at == len(held) else (held, [])

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            given = json.loads(text, parse_constant=_no_json)
        except (ValueError, RecursionError):
            return None
        if not isinstance(given, dict) or set(given) != {"name", "arguments"}:
            return None
        name, arguments = given["name"], given["arguments"]
        if not isinstance(name, str) or name not in self.names or not isinstance(arguments, dict):
            return None
        return {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": json.dumps(arguments, ensure_ascii=False),
            },
        }


def _no_json(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _begins(text: str) -> int:
    """Return where a call begins in a text, or may begin at its end, spaces before it included."""
    at = text.find(_OPEN)
    if at < 0:
        tail = (n for n in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:n]))
        at = len(text) - next(tail, 0)
    return len(text[:at].rstrip())
