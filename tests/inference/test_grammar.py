"""Constrained text: whatever a model wants, what it writes parses and fits the schema."""

import json
import re
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.inference.engine import Engine
from lorakit.inference.grammar import json_object, json_schema
from lorakit.inference.sampling import Picker, Sampling
from tests.models.gguf_files import write_vocabulary
from tests.models.sentencepiece import spm_metadata

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def toks(tiny_dir, tmp_path_factory):
    """A tokenizer of bytes, and one of SentencePiece, whose tokens bring their spaces."""
    path = tmp_path_factory.mktemp("spm") / "spm.gguf"
    spm = lk.load_tokenizer(write_vocabulary(path, spm_metadata()))
    return [lk.load_tokenizer(tiny_dir), spm]


NAMES = st.text(st.sampled_from('ab"\\é🙂 '), min_size=1, max_size=3)
LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n},
              st.integers(-30, 30), st.integers(0, 60)),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4)),
    st.lists(st.one_of(NAMES, st.integers(-9, 9), st.booleans(), st.none()), min_size=1, max_size=3)
    .map(lambda values: {"enum": values}),
    st.just({"type": "string", "pattern": "^[a-c]{2}x?$"}),
)  # fmt: skip


def objects(inner):
    """Schemas of objects; some of the properties are required."""
    return st.builds(
        lambda properties, required, more: {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if required],
            "additionalProperties": more,
        },
        st.dictionaries(NAMES, inner, max_size=3),
        st.booleans(),
        st.just(False),
    )


def lists(inner):
    """Schemas of short arrays."""
    return st.builds(
        lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 3)
    )


PAIR = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": [1, 2]}},
    "required": ["a", "b"],
}
SCHEMAS = st.recursive(LEAVES, lambda inner: objects(inner) | lists(inner), max_leaves=5)


def written(constraint, tok, ends, seed, most=400):
    """The text of a model whose logits are random, and whether it ended by itself."""
    generator, ids = torch.Generator().manual_seed(seed), []
    picker = Picker(
        Sampling(temperature=1.0), [1], len(tok), torch.device("cpu"),
        seed=seed, constraint=constraint, ends=ends,
    )  # fmt: skip
    for _ in range(most):
        token = picker.pick(torch.randn(1, len(tok), generator=generator))
        if token in ends:
            return tok.decode(ids), True
        ids.append(token)
        if picker.ended:
            return tok.decode(ids), True
    return tok.decode(ids), False


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 2**20), which=st.integers(0, 9))
def test_random_logits_write_what_the_schema_says(toks, schema, seed, which):
    tok = toks[which % len(toks)]
    text, ended = written(json_schema(schema, tok), tok, tok.end_token_ids, seed)
    assert ended, text  # all of these schemas bound the length
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("which", [0, 1])
def test_an_object_of_any_kind(toks, which):
    tok, whole = toks[which], 0
    for seed in range(4):
        text, ended = written(json_object(tok), tok, tok.end_token_ids, seed, most=150)
        assert text.lstrip().startswith("{")
        if ended:
            assert isinstance(json.loads(text), dict)
            whole += 1
    assert whole


@pytest.mark.parametrize("make", [json_object, lambda tok: json_schema(PAIR, tok)])
def test_blanks_stand_after_commas_and_colons_alone(toks, make):
    """A model that likes them best gets one there, so that it cannot fill its answer with them."""
    tok = toks[0]
    texts = [tok.decode([token]) for token in range(len(tok))]
    wanted = torch.tensor([float(bool(each) and each.isspace()) for each in texts])
    constraint, text = make(tok), ""
    for _ in range(60):
        allowed = constraint.allowed()
        scores = wanted[: len(allowed)].masked_fill(~allowed, -1.0)
        if constraint.complete or constraint.ended:
            break
        constraint.take(token := int(scores.argmax()))
        text += tok.decode([token])
    outside = re.sub(r'"(\\.|[^"\\])*"?', '""', text)
    assert re.search(r"(?<![:,])\s|\s\s", outside) is None, text


def accepts(constraint, tok, text):
    """Whether a text may be written, and end there."""
    for token in tok.encode(text, add_special_tokens=False):
        allowed = constraint.allowed()
        if token >= len(allowed) or not allowed[token]:
            return False
        constraint.take(token)
    return constraint.complete or constraint.ended


def test_both_usual_forms_are_there(toks):
    tok, value = toks[0], {"a": 1, "b": [2, {"c": "x  y"}]}
    compact = json.dumps(value, separators=(",", ":"))
    for text in (compact, json.dumps(value), "{}"):
        assert accepts(json_object(tok), tok, text), text
    for text in ('{"a" :1}', '{ "a":1}', '{"a":  1}', json.dumps(value, indent=1), " {}"):
        assert not accepts(json_object(tok), tok, text), text


def test_the_engine_writes_json_with_any_model(tiny_dir, toks):
    model, tok = lk.load_model(tiny_dir, dtype="float32"), toks[0]
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 3}, "age": {"enum": [1, 22, 333]}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    engine = Engine(model, tok, capacity=64)
    sampling = Sampling(temperature=2.0)
    given = [
        engine.submit([5, 6], sampling, seed=n, constraint=json_schema(schema, tok))
        for n in range(6)
    ]
    cut = engine.submit([5, 6], constraint=json_schema(schema, tok), max_new_tokens=4)
    while not engine.idle:
        engine.step()
    whole = [request for request in given if request.finish_reason == "stop"]
    assert len(whole) >= 3
    for request in whole:
        jsonschema.validate(json.loads(request.text), schema)
    assert cut.finish_reason == "length"


def test_what_is_refused_says_why(toks, monkeypatch):
    tok = toks[0]
    for schema, why in [
        ({"type": "nonsense"}, "nonsense"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: \\["not"\\]'),
        ({"type": "string", "pattern": "("}, "regex parse error.*unclosed group"),
        ({"$ref": "http://localhost/schema"}, "does not fetch"),
        ({"$ref": "#"}, "constrained text"),
        ({"enum": []}, "json_schema: "),
        ({"const": {1, 2}}, "not JSON serializable"),
        ("{}", "a schema is an object"),
    ]:
        with pytest.raises(lk.LorakitError, match=why):
            json_schema(schema, tok)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(lk.LorakitError, match=r"pip install 'lorakit\[serve\]'"):
        json_object(tok)
