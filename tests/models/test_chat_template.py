"""Chat templates: which one is taken, equal to transformers, and kept in the sandbox."""

import json

import pytest

import lorakit as lk


def test_template_priority(directory):
    chat = [{"role": "user", "content": "x"}]

    def rendered(**options):
        return lk.load_tokenizer(directory).apply_chat_template(chat, tokenize=False, **options)

    assert rendered(chat_template="argument") == "argument"
    assert rendered().startswith("<s>user")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ tools }}")
    assert rendered().startswith("<s>user")
    assert rendered(tools=[{"a": 1}]) == "tools: [{'a': 1}]"
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}))
    assert rendered() == "legacy"
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "named"},
        {"name": "tool_use", "template": "with tools"},
    ]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert rendered() == "named"
    assert rendered(tools=[{}]) == "with tools"


TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }} {% endif %}{% endfor %}",
    "{{ messages[0] | tojson }} {{ messages | tojson(indent=2) }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{{ bos_token }}{{ date_string }}{% if enable_thinking is defined %}!{% endif %}",
    "{{ strftime_now('%Y') }}{{ '<>&é' | tojson }}",
    "{{ messages[0].missing is defined }}{{ 'tool_calls' in messages[1] }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_template_environment_equals_transformers(directory, template):
    from transformers import AutoTokenizer

    messages = [
        {"role": "user", "content": "a <b> & é"},
        {"role": "assistant", "content": "c", "tool_calls": None},
    ]
    options = {"chat_template": template, "date_string": "1 May 2024"}
    theirs = AutoTokenizer.from_pretrained(directory)
    ours = lk.load_tokenizer(directory)
    assert ours.apply_chat_template(messages, False, **options) == theirs.apply_chat_template(
        messages, tokenize=False, **options
    )


@pytest.mark.parametrize(
    ("template", "messages", "error"),
    [
        ("{{ raise_exception('roles must alternate') }}", [{"role": "user"}], "must alternate"),
        ("{{ ''.__class__.__mro__ }}", [{"role": "user"}], "unsafe"),
        ("{% set _ = messages.append(1) %}", [{"role": "user"}], "immutable|not allowed|unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", [{"role": "user"}], "unsafe"),
        ("{% include '/etc/hostname' %}", [{"role": "user"}], "refuses"),
        ("{% import 'os' as os %}", [{"role": "user"}], "refuses"),
        ("{{ range(10 ** 9) | list }}", [{"role": "user"}], "[Rr]ange too big"),
        ("{% if %}", [{"role": "user"}], "refuses"),
        ("x", [], "at least one"),
        ("x", [{"content": "no role"}], "message 0 must be"),
        ("x", "text", "must be a list"),
    ],
)
def test_bad_templates_and_messages(directory, template, messages, error):
    tok = lk.load_tokenizer(directory)
    with pytest.raises(lk.LorakitError, match=error):
        tok.apply_chat_template(messages, chat_template=template)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ 'a' + 5 }}"])
def test_a_template_that_fails_says_so(directory, template):
    with pytest.raises(lk.LorakitError, match="refuses these messages"):
        lk.load_tokenizer(directory).apply_chat_template(
            [{"role": "user", "content": "x"}], chat_template=template
        )
