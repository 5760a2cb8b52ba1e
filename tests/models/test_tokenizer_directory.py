"""A tokenizer's files go along byte for byte; those that contradict a changed one stay away."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from tests.conftest import write_tokenizer
from tests.models.sentencepiece import TEXTS

CHAT = [{"role": "user", "content": "Hi"}]
VOCABULARY = {"tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "tekken.json"}
TEMPLATES = {"chat_template.json", "additional_chat_templates/tool_use.jinja"}
MAP = {"special_tokens_map.json"}
OWN = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def files(path):
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }


def write_all(path):
    """A tokenizer in every form that a directory may hold; two of the files are empty words."""
    write_tokenizer(path)
    tok = lk.load_tokenizer(path)
    tok.backend.model.save(str(path))  # vocab.json and merges.txt
    (path / "tokenizer.model").write_bytes(b"\n\x0ba piece model")
    (path / "added_tokens.json").write_text('{"</s>": 2}')
    (path / "tekken.json").write_text("{}")
    (path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (path / "chat_template.json").write_text(json.dumps({"chat_template": "older"}))
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"model_max_length": 77, "add_bos_token": True, "padding_side": "left"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    write_all(tmp_path / "source")
    return tmp_path / "source"


def same(tok, path):
    """lorakit and transformers load from `path` what `tok` is; return transformers' tokenizer."""
    from transformers import AutoTokenizer

    again, theirs = lk.load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert again.backend.to_str() == tok.backend.to_str()
    assert again.special_tokens == tok.special_tokens
    assert again.chat_template == tok.chat_template
    for text in [*TEXTS, "a <new> b"]:
        assert theirs.encode(text) == tok.encode(text)
        ids = tok.encode(text, add_special_tokens=False)
        assert theirs.encode(text, add_special_tokens=False) == ids
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(theirs, name) == tok.special_tokens.get(name)
    if tok.chat_template is not None:
        rendered = theirs.apply_chat_template(CHAT, tokenize=False)
        assert rendered == tok.apply_chat_template(CHAT, tokenize=False)
    return theirs


def test_a_tokenizer_as_it_was_read_goes_along_whole(source, tmp_path, monkeypatch, caplog):
    from transformers import AutoTokenizer

    monkeypatch.chdir(source.parent)
    tok = lk.load_tokenizer(source.name)
    monkeypatch.chdir("/")
    tok.encode("tokenizing changes nothing")
    tok.save(tmp_path / "saved")
    assert files(tmp_path / "saved") == files(source)
    assert same(tok, tmp_path / "saved").model_max_length == 77
    assert not caplog.records
    # readers of the older files: what transformers makes of vocab.json and merges.txt alone
    for name in ("tokenizer.json", "tokenizer.model", "tekken.json"):
        (tmp_path / "saved" / name).unlink()
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "saved" / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert theirs.encode(text) == tok.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("before", [False, True], ids=["into nothing", "over an earlier save"])
@pytest.mark.parametrize(
    "template", ["{{ messages[0].content }}!", {"default": "{{ 1 }}", "rag": "{{ 2 }}"}, None]
)
def test_a_new_template(source, tmp_path, caplog, template, before):
    tok = lk.load_tokenizer(source)
    if before:
        tok.save(tmp_path / "saved")
    tok.chat_template = template
    tok.save(tmp_path / "saved")
    assert same(tok, tmp_path / "saved").model_max_length == 77
    written, was = files(tmp_path / "saved"), files(source)
    assert not written.keys() & TEMPLATES
    assert ("chat_template.jinja" in written) == isinstance(template, str)
    for name in VOCABULARY | MAP | {"tokenizer.json"}:
        assert written[name] == was[name], name
    if not isinstance(template, dict):
        assert written["tokenizer_config.json"] == was["tokenizer_config.json"]
    [record] = caplog.records
    assert all(name in record.getMessage() for name in TEMPLATES)
    assert not any(name in record.getMessage() for name in VOCABULARY)


def test_a_template_that_was_in_the_config(source, tmp_path):
    for name in (*TEMPLATES, "chat_template.jinja"):
        (source / name).unlink()
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "old"}))
    tok = lk.load_tokenizer(source)
    tok.save(tmp_path / "same")
    assert files(tmp_path / "same") == files(source)
    tok.special_tokens["pad_token"] = "</s>"
    tok.save(tmp_path / "padded")
    assert lk.load_tokenizer(tmp_path / "padded").chat_template == "old"
    tok.chat_template = "new"
    tok.save(tmp_path / "new")
    same(tok, tmp_path / "new")
    assert "old" not in (tmp_path / "new" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("before", [False, True], ids=["into nothing", "over an earlier save"])
def test_another_special_token(source, tmp_path, caplog, before):
    tok = lk.load_tokenizer(source)
    if before:
        tok.save(tmp_path / "saved")
    tok.special_tokens["pad_token"] = "</s>"
    del tok.special_tokens["unk_token"]
    tok.save(tmp_path / "saved")
    theirs = same(tok, tmp_path / "saved")
    assert (theirs.model_max_length, theirs.padding_side) == (77, "left")
    written, was = files(tmp_path / "saved"), files(source)
    assert written.keys() == was.keys() - MAP
    assert all(written[name] == was[name] for name in written.keys() - {"tokenizer_config.json"})
    assert "special_tokens_map.json" in caplog.text


@pytest.mark.parametrize("before", [False, True], ids=["into nothing", "over an earlier save"])
def test_another_vocabulary(source, tmp_path, caplog, before):
    """A token more: no file goes along, or stays there, that has one less."""
    tok = lk.load_tokenizer(source)
    if before:
        tok.save(tmp_path / "saved")
    tok.backend.add_tokens(["<new>"])
    tok.save(tmp_path / "saved")
    assert same(tok, tmp_path / "saved").model_max_length == 77
    assert files(tmp_path / "saved").keys() == OWN | TEMPLATES | MAP
    [record] = caplog.records
    assert all(name in record.getMessage() for name in VOCABULARY)
    assert "tokenizer.json" not in record.getMessage()


def test_files_of_others_stay_where_they_are(source, tmp_path):
    """A changed tokenizer removes copies of its own files, and no other vocabulary."""
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "vocab.json").write_text("mine")
    (tmp_path / "saved" / "page.jinja").write_text("mine")
    tok = lk.load_tokenizer(source)
    tok.backend.add_tokens(["<new>"])
    tok.save(tmp_path / "saved")
    tok.save(source)  # the only file of this name is not lost
    assert (tmp_path / "saved" / "vocab.json").read_text() == "mine"
    assert (tmp_path / "saved" / "page.jinja").read_text() == "mine"
    assert (source / "tokenizer.model").exists()
    same(tok, source)


def test_saving_without_the_source(source, tmp_path, caplog):
    tok = lk.load_tokenizer(source)
    shutil.rmtree(source)
    tok.save(tmp_path / "saved")
    assert "source: tokenizer.json is missing; the tokenizer is written without" in caplog.text
    same(tok, tmp_path / "saved")


NAMES = st.sampled_from(["pad_token", "eos_token", "sep_token"])
TEMPLATE = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=8)


@settings(deadline=None, max_examples=40)
@given(
    added=st.lists(st.sampled_from(["<a>", "<b>"]), max_size=1),
    special=st.dictionaries(NAMES, st.none() | st.sampled_from(["<s>", "</s>"]), max_size=2),
    template=st.just("as it was")
    | st.none()
    | TEMPLATE
    | st.dictionaries(st.sampled_from(["default", "tool_use"]), TEMPLATE, min_size=1),
    again=st.booleans(),
)
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, added, special, template, again):
    """load(save(tokenizer)) = tokenizer for all changes of it, over any earlier save."""
    path = tmp_path_factory.mktemp("changed")
    (path / "source").mkdir()
    write_all(path / "source")
    tok = lk.load_tokenizer(path / "source")
    if again:
        tok.save(path / "saved")
    tok.backend.add_tokens(added)
    for name, text in special.items():
        if text is None:
            tok.special_tokens.pop(name, None)
        else:
            tok.special_tokens[name] = text
    if template != "as it was":
        tok.chat_template = template
    tok.save(path / "saved")
    found = lk.load_tokenizer(path / "saved")
    assert found.backend.to_str() == tok.backend.to_str()
    assert found.special_tokens == tok.special_tokens
    assert found.chat_template == tok.chat_template
