"""A template for Ollama in Go's language, found by looking at what a chat template writes.

Ollama before 0.30 cannot run the Jinja template in a GGUF file. Its own templates are Go's
text/template. No program translates one language into the other, but most chat templates do one
simple thing: what stands between two messages depends on their two roles alone.

    "" -> user, "" -> system      what begins a chat, with a default system turn if there is one
    system -> user                the end of the one and the begin of the other
    user -> assistant, assistant -> user
    user -> ""                    the end of the last turn, and the prompt for an answer

So a few chats of unique words are rendered, cut at the words, and the texts in between read off. A
template that is not so simple shows by two texts for one pair of roles, by words in another order,
or in the last step: chats with newlines, quotes, braces and other scripts must come out equal by
the table and by Jinja. Where one does not, there is no template for Ollama, never a wrong one.

Ollama joins messages of one role that follow each other, and continues an answer that stands last.
Spaces around a message, which some Jinja templates take away, stay. Facts: Ollama's
docs/template.mdx, template/template.go and parser/parser.go.
"""

from collections.abc import Callable, Sequence

from lorakit.config.errors import LorakitError
from lorakit.models.tokenizer import Tokenizer

_ROLES = {"s": "system", "u": "user", "a": "assistant"}
_TURNS = ("u", "uau", "uauau")
_SYSTEM_FIRST = ("su", "suau")
_SYSTEM_LATER = ("uasu", "usuau")
_DATE = "qdateq"
_TEXTS = (
    "Hi",
    "Two\n\nlines, an é and 日本",
    '{{ x }} {% y %} """ \\n $last',
    "<b>1 < 2 & 3</b>",
    "'quoted' \"twice\"",
    "{not} a {{- field -}}",
    "🦙",
)

_Message = dict[str, str]
_Table = dict[tuple[str, str], str]  # (role before, role after) -> text; "" is an end of the chat
_Render = Callable[[Sequence[_Message]], str]


class _NotSimpleError(Exception):
    """A chat template is not a table of texts; the message says why."""


def go_template(tok: Tokenizer) -> tuple[str | None, str]:
    """Return the template for Ollama that writes what the tokenizer's chat template does.

    A token that the tokenizer itself puts in front of each text is left out: Ollama adds it too.

    Args:
        tok: The tokenizer, with a chat template or without.

    Returns:
        The template and "", or None and why there is none.
    """
    if tok.chat_template is None:
        return None, "there is no chat template"
    bos = tok.special_tokens.get("bos_token", "")
    if not (bos and tok.encode("")[:1] == [tok.bos_token_id]):
        bos = ""

    def render(messages: Sequence[_Message]) -> str:
        text = tok.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=True,
            strftime_now=lambda form: _DATE,
        )
        return text.removeprefix(bos)

    try:
        table = _table(render)
        written = _written(table)
    except _NotSimpleError as why:
        return None, str(why)
    except LorakitError as error:  # the template refuses a chat of a user and an assistant
        return None, str(error)
    return written, ""


def _table(render: _Render) -> _Table:
    """Return what stands between two messages, by their roles.

    Raises _NotSimpleError if it depends on something else.
    """
    table: _Table = {}
    for roles in _TURNS:
        _add(table, _gaps(render, roles))
    if any(_DATE in text for text in table.values()):
        raise _NotSimpleError("it writes the day's date")
    system = _with_system(render, table)
    _check_equal(
        render, system, ("su", "suau", "suauau") if "system" in _roles_before(system) else ()
    )
    later = _with_later_system(render, system)
    if later != system:
        try:
            _check_equal(render, later, _SYSTEM_LATER)
        except _NotSimpleError:
            return system
    return later


def _roles_before(table: _Table) -> set[str]:
    """Return the roles that have a message after them."""
    return {before for before, _ in table}


def _with_system(render: _Render, table: _Table) -> _Table:
    """Return the table with a system message in front of a chat, if the template has one."""
    try:
        shown = render(_chat("su", ("one", "two")))
    except LorakitError:  # it refuses the role
        return table
    if "one" not in shown and shown == render(_chat("u", ("two",))):
        return table | {("", "system"): "", ("system", "user"): table["", "user"]}
    table = dict(table)
    for roles in _SYSTEM_FIRST:
        _add(table, _gaps(render, roles))
    return table


def _with_later_system(render: _Render, table: _Table) -> _Table:
    """Return the table with system messages in the middle of a chat, if they fit it."""
    found = dict(table)
    try:
        for roles in _SYSTEM_LATER:
            _add(found, _gaps(render, roles))
    except (_NotSimpleError, LorakitError):
        return table
    return found


def _chat(roles: str, texts: Sequence[str]) -> list[_Message]:
    """Return a chat of these roles, a letter for each, with these texts in turn."""
    return [
        {"role": _ROLES[role], "content": texts[i % len(texts)]} for i, role in enumerate(roles)
    ]


def _gaps(render: _Render, roles: str) -> list[tuple[tuple[str, str], str]]:
    """Return what stands before, between and after the messages of a chat, with their roles."""
    words = [f"qword{chr(ord('a') + i)}q" for i in range(len(roles))]
    rest, found, before = render(_chat(roles, words)), [], ""
    for role, word in zip(roles, words, strict=True):
        text, here, rest = rest.partition(word)
        if not here or word in rest:
            raise _NotSimpleError("it moves messages, leaves some out or repeats them")
        found.append(((before, _ROLES[role]), text))
        before = _ROLES[role]
    return [*found, ((before, ""), rest)]


def _add(table: _Table, found: Sequence[tuple[tuple[str, str], str]]) -> None:
    """Add texts to the table. Raises _NotSimpleError if one is there already and another."""
    for (before, after), text in found:
        if table.setdefault((before, after), text) != text:
            ends = before or "the start", after or "the end"
            raise _NotSimpleError(f"what it writes between {ends[0]} and {ends[1]} varies by place")


def _check_equal(render: _Render, table: _Table, more: Sequence[str]) -> None:
    """Raise _NotSimpleError unless chats come out equal by the table and by the template."""
    for roles in ("u", "uau", "uauau", "uauauau", *more):
        for start in range(0, len(_TEXTS), 2):
            messages = _chat(roles, _TEXTS[start:] + _TEXTS[:start])
            by_table, before = "", ""
            for message in messages:
                by_table += table[before, message["role"]] + message["content"]
                before = message["role"]
            if by_table + table[before, ""] != render(messages):
                raise _NotSimpleError("it changes the text of messages, or looks at it")


# ---- in Go's language ----


def _written(table: _Table) -> str:
    """Return the template of a table.

    There is no newline in it but those that it writes, and no mark that trims spaces. `$last` is
    the role of the message before.
    """
    branches = []
    for role in ("user", "assistant", "system"):
        gaps = {before: text for (before, after), text in table.items() if after == role}
        if not gaps:
            continue
        condition = f'eq .Role "{role}"'
        if gaps.keys() == {""}:  # a system message, in front of a chat alone
            condition = f'and ({condition}) (eq $last "")'
        branches.append(
            f'if {condition} }}}}{_by_last(gaps)}{{{{ .Content }}}}{{{{ $last = "{role}" }}}}'
        )
    body = "{{ " + "{{ else ".join(branches) + "{{ end }}"
    end = _literal(table["user", ""])
    written = (
        f'{{{{ $last := "" }}}}{{{{ range .Messages }}}}{body}{{{{ end }}}}'
        f'{{{{ if eq $last "user" }}}}{end}{{{{ end }}}}'
    )
    if lost := lost_in_modelfile(written):
        raise _NotSimpleError(f"a Modelfile has no way to write {lost}")
    return written


def _by_last(gaps: dict[str, str]) -> str:
    """Return what writes the text that belongs to the role of the message before."""
    texts: dict[str, list[str]] = {}
    for before, text in gaps.items():
        texts.setdefault(text, []).append(before)
    *others, (last, _) = texts.items()
    written = ""
    for i, (text, roles) in enumerate(others):
        named = " ".join(f'"{role}"' for role in roles)
        written += f"{{{{ {'else if' if i else 'if'} eq $last {named} }}}}{_literal(text)}"
    return f"{written}{{{{ else }}}}{_literal(last)}{{{{ end }}}}" if others else _literal(last)


def _literal(text: str) -> str:
    """Return what writes a text; braces would begin an action."""
    return text.replace("{", '{{ "{" }}')


def lost_in_modelfile(text: str) -> str:
    """Return what of a text no Modelfile can hold, or "".

    That is the mark which ends a text, and characters that Ollama's parser leaves out: those that
    Go's strconv.IsPrint calls not printable, spaces other than the usual one among them.
    """
    if '"""' in text:
        return '"""'
    others = (each for each in text if not (each.isprintable() or each in "\n\r\t"))
    return next((f"U+{ord(each):04X}" for each in others), "")
