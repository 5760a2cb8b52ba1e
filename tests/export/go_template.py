"""A small interpreter of Go's text/template, to check the templates that are written for Ollama.

It knows what they need, and refuses anything else: texts, actions with trim marks, .Field, $name,
"strings", := and =, if, else if, else, range over a list, with eq (of several), ne, and, or, not,
len and index. Source: the documentation of Go's package text/template.
"""

import re
from typing import Any

_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|:=|=|\(|\)|\$\w*(?:\.\w+)*|\.\w*(?:\.\w+)*|\w+)')


class GoError(Exception):
    """The template is wrong, or more than this interpreter knows."""


def _lexed(source: str) -> list[tuple[str, str]]:
    """Texts and actions in turn, trimmed where an action says so."""
    pieces, trim, at = [], False, 0
    while at <= len(source):
        start = source.find("{{", at)
        text = source[at : start if start >= 0 else None]
        if trim:
            text = text.lstrip(" \t\r\n")
        if start < 0:
            pieces.append(("text", text))
            return pieces
        left = re.match(r"\{\{-\s", source[start:]) is not None
        pieces.append(("text", text.rstrip(" \t\r\n") if left else text))
        end, quoted = start + 2, False
        while not (source.startswith("}}", end) and not quoted):
            if end >= len(source):
                raise GoError("unclosed action")
            if quoted and source[end] == "\\":
                end += 1
            elif source[end] == '"':
                quoted = not quoted
            end += 1
        action = source[start + 2 + left : end]
        trim = re.search(r"\s-$", action) is not None
        pieces.append(("action", (action[:-1] if trim else action).strip()))
        at = end + 2
    return pieces


def _words(action: str) -> list[str]:
    words, at = [], 0
    while at < len(action):
        found = _TOKEN.match(action, at)
        if found is None:
            raise GoError(f"unexpected {action[at:]!r}")
        words.append(found[1])
        at = found.end()
    return words


class GoTemplate:
    """A template; `execute` renders it with data."""

    def __init__(self, source: str):
        self.pieces = _lexed(source)
        self.nodes, end, _ = self._block(0)
        if end is not None:
            raise GoError(f"unexpected {end}")

    def _block(self, at):
        """The nodes up to an else or an end, that action, and the place after it."""
        nodes = []
        while at < len(self.pieces):
            kind, text = self.pieces[at]
            at += 1
            if kind == "text":
                nodes.append(("text", text))
            elif text == "end" or text.split()[:1] == ["else"]:
                return nodes, text, at
            elif text.startswith("/*"):
                continue
            elif text.split()[0] in ("if", "range"):
                node, at = self._branch(text, at)
                nodes.append(node)
            else:
                nodes.append(("action", _words(text)))
        return nodes, None, at

    def _branch(self, text, at):
        kind, condition = text.split(None, 1)
        body, end, at = self._block(at)
        other = []
        if end is not None and end.startswith("else if "):
            node, at = self._branch(end.removeprefix("else "), at)
            return (kind, _words(condition), body, [node]), at
        if end == "else":
            other, end, at = self._block(at)
        if end != "end":
            raise GoError(f"{kind} without end")
        return (kind, _words(condition), body, other), at

    def execute(self, data: dict[str, Any]) -> str:
        out: list[str] = []
        self._run(self.nodes, data, [{"$": data}], out)
        return "".join(out)

    def _run(self, nodes, dot, scopes, out):
        for kind, *node in nodes:
            if kind == "text":
                out.append(node[0])
            elif kind == "action":
                value = _action(node[0], dot, scopes)
                if value is not None:
                    out.append(_printed(value))
            elif kind == "if":
                scope = [*scopes, {}]
                chosen = node[1] if _true(_action(node[0], dot, scope, True)) else node[2]
                self._run(chosen, dot, scope, out)
            else:
                items = _value(node[0], dot, scopes)
                for item in items:
                    self._run(node[1], item, [*scopes, {}], out)
                if not items:
                    self._run(node[2], dot, [*scopes, {}], out)


def _action(words, dot, scopes, wanted=False):
    """The value to print; None of a declaration or an assignment."""
    if len(words) > 1 and words[0].startswith("$") and words[1] in (":=", "="):
        value = _value(words[2:], dot, scopes)
        if words[1] == ":=":
            scopes[-1][words[0]] = value
        else:
            scope = next((s for s in reversed(scopes) if words[0] in s), None)
            if scope is None:
                raise GoError(f"undefined variable {words[0]}")
            scope[words[0]] = value
        return value if wanted else None
    return _value(words, dot, scopes)


def _value(words, dot, scopes):
    value, rest = _call(words, dot, scopes)
    if rest:
        raise GoError(f"unexpected {rest}")
    return value


def _call(words, dot, scopes):
    """The value of a pipeline without pipes up to a closing bracket, and what is left."""
    name, arguments, rest = words[0], [], words
    called = re.fullmatch(r"(?!true$|false$)[a-z]\w*", name) is not None
    if called:
        rest = words[1:]
    while rest and rest[0] != ")":
        value, rest = _operand(rest, dot, scopes)
        arguments.append(value)
    if called:
        return _function(name, arguments), rest
    if len(arguments) != 1:
        raise GoError(f"{name} is no function")
    return arguments[0], rest


def _operand(words, dot, scopes):
    word, rest = words[0], words[1:]
    if word == "(":
        value, rest = _call(rest, dot, scopes)
        if rest[:1] != [")"]:
            raise GoError("unclosed bracket")
        rest = rest[1:]
        while rest and re.fullmatch(r"\.\w+(\.\w+)*", rest[0]):
            value, rest = _field(value, rest[0]), rest[1:]
        return value, rest
    if word.startswith('"'):
        escapes = {"n": "\n", "t": "\t"}
        return re.sub(r"\\(.)", lambda m: escapes.get(m[1], m[1]), word[1:-1]), rest
    if word.startswith("$"):
        name, _, path = word.partition(".")
        scope = next((s for s in reversed(scopes) if name in s), None)
        if scope is None:
            raise GoError(f"undefined variable {name}")
        return _field(scope[name], path), rest
    if word.startswith("."):
        return _field(dot, word), rest
    if word.isdecimal():
        return int(word), rest
    if word in ("true", "false"):
        return word == "true", rest
    raise GoError(f"unknown {word}")


def _field(value, path):
    for name in path.split("."):
        if name:
            if name not in value:
                raise GoError(f"no field {name}")
            value = value[name]
    return value


def _function(name, arguments):
    if name == "eq":
        return any(arguments[0] == other for other in arguments[1:])
    if name == "ne":
        return arguments[0] != arguments[1]
    if name == "and":
        return next((each for each in arguments if not _true(each)), arguments[-1])
    if name == "or":
        return next((each for each in arguments if _true(each)), arguments[-1])
    if name == "not":
        return not _true(arguments[0])
    if name == "len":
        return len(arguments[0])
    if name == "index":
        value = arguments[0]
        for key in arguments[1:]:
            value = value[key]
        return value
    raise GoError(f"function {name!r} not defined")


def _true(value) -> bool:
    return bool(value)


def _printed(value) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)
