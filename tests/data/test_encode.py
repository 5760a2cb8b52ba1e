"""Rows as token ids and labels, what is cut from long ones, and what is refused."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.encode import IGNORE, Encoder
from lorakit.data.examples import encode_rows
from lorakit.data.schemas import Pair
from lorakit.models.tokenizer import Tokenizer
from tests.data.chats import CHAT, GENERATION, SYSTEM, TOOLS, TURNS, assistant, encode, shown, user
from tests.data.files import written


def test_labels_are_the_completion_and_the_end(tok):
    [example] = encode_rows([Pair("ab", "cd", "row 0")], tok, max_seq_length=99)
    a, b, c, d = (tok.encode(ch, add_special_tokens=False)[0] for ch in "abcd")
    assert example.input_ids == [1, a, b, c, d, 2]
    assert example.labels == [IGNORE] * 3 + [c, d, 2]


@settings(max_examples=80)
@given(st.text("abc ", max_size=30), st.text("xyz", min_size=1, max_size=30), st.integers(2, 70))
def test_truncation_keeps_the_completion(tok, prompt, completion, limit):
    """BOS, the end of the prompt and all of the completion that fits are at most `limit` tokens."""
    row = Pair(prompt, completion, "row 0")
    [example] = encode_rows([row], tok, max_seq_length=limit)
    labels = [label for label in example.labels if label != IGNORE]
    full = [*tok.encode(completion, add_special_tokens=False), 2]
    whole = tok.encode(prompt) + full
    assert len(example.input_ids) == min(limit, len(whole))
    assert len(example.labels) == len(example.input_ids)
    assert example.input_ids[0] == 1
    assert labels == full[: max(1, limit - 1)]
    kept = example.input_ids[1 : len(example.input_ids) - len(labels)]
    prompt_ids = tok.encode(prompt, add_special_tokens=False)
    assert kept == prompt_ids[len(prompt_ids) - len(kept) :]  # its end


def test_policies_for_long_rows(tok, caplog):
    rows = [Pair("a" * 20, "b", "f line 7"), Pair("a", "b", "f line 8")]
    assert len(encode_rows(rows, tok, max_seq_length=10)) == 2
    assert "1 of 2 rows are longer than max_seq_length=10 and were truncated" in caplog.text
    assert len(encode_rows(rows, tok, max_seq_length=10, over_length="drop")) == 1
    assert "were dropped" in caplog.text
    with pytest.raises(lk.LorakitError, match="f line 7: 23 tokens, more than max_seq_length=10"):
        encode_rows(rows, tok, max_seq_length=10, over_length="raise")
    with pytest.raises(lk.LorakitError, match="all 1 rows are longer"):
        encode_rows(rows[:1], tok, max_seq_length=10, over_length="drop")


@settings(max_examples=50)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), st.integers(2, 30))
def test_a_text_that_is_split_is_learned_once(tok, text, limit):
    """Each token but the first of the text is a label, in its place and after those before it."""
    whole = [*tok.encode(text), 2]
    source = [{"text": text}, {"text": "abc"}]
    examples = encode_rows(source, tok, max_seq_length=limit, over_length="split")
    mine = [e for i, e in enumerate(examples) if examples.numbers[i] == 0]
    assert all(e.input_ids == e.labels and 2 <= len(e.input_ids) <= limit for e in mine)
    assert mine[0].input_ids[0] == whole[0]
    assert [label for e in mine for label in e.labels[1:]] == whole[1:]
    for a, b in itertools.pairwise(mine):
        assert len(a.input_ids) == limit
        assert a.input_ids[-1] == b.input_ids[0]
    assert examples.numbers[-1] == 1


def test_only_text_is_split(tok, caplog):
    texts = [{"text": "a" * 20}, {"text": "b"}]
    assert len(encode_rows(texts, tok, max_seq_length=10, over_length="split")) == 4
    assert "1 of 2 rows are longer than max_seq_length=10 and were cut into several" in caplog.text
    rows = [Pair("a" * 20, "b", "f line 7")]
    with pytest.raises(lk.LorakitError, match="f line 7: 23 tokens, .* split cuts texts alone"):
        encode_rows(rows, tok, max_seq_length=10, over_length="split")
    assert len(encode_rows(rows, tok, max_seq_length=30, over_length="split")) == 1
    with pytest.raises(lk.LorakitError, match="max_seq_length must be at least 2"):
        encode_rows(texts, tok, max_seq_length=1, over_length="split")


def test_the_place_of_text_that_is_not_unicode(tok):
    with pytest.raises(lk.LorakitError, match="f line 3: not valid Unicode"):
        encode_rows([Pair("\ud83d", "x", "f line 3")], tok, max_seq_length=9)


def test_json_round_trip_of_any_text(tok):
    text = json.loads(json.dumps("naïve \u2028 😀"))
    [example] = encode_rows([Pair("", text, "r")], tok, max_seq_length=200)
    assert tok.decode([i for i in example.labels if i != IGNORE]) == text


def test_rows_with_nothing_to_learn(tiny):
    tok = tiny(TURNS + GENERATION)
    with pytest.raises(lk.LorakitError, match="row 0: no turn of the assistant"):
        encode(tok, CHAT[:2])
    with pytest.raises(lk.LorakitError, match="row 0: the chat template leaves out the tools"):
        encode(tok, CHAT, TOOLS)
    with pytest.raises(lk.LorakitError, match=r"train_on is 'al' .did you mean 'all'"):
        encode(tok, CHAT, train_on="al")
    with pytest.raises(lk.LorakitError, match=r"over_length is 'cut'; choose truncate, drop"):
        encode(tok, CHAT, over_length="cut")
    with pytest.raises(lk.LorakitError, match="row 3: starts with <s> twice"):
        Encoder(tok)(Pair("<s>a", "b", "row 3"))


def test_prompt_messages_are_not_learned(tiny):
    tok = tiny(TURNS + GENERATION)
    row = {"prompt": [*CHAT, user("e")], "completion": [assistant("f")]}
    [read] = lk.read_rows([row])
    assert read.first == 4
    assert shown(tok, Encoder(tok)(read)) == ["f</s>"]


def test_long_chats_lose_their_oldest_exchanges(tiny):
    tok = tiny(TURNS + GENERATION)
    chat = [SYSTEM]
    for i in range(5):
        chat += [user(f"question {i}"), assistant(f"answer {i}")]
    whole = encode(tok, chat)
    cut = encode(tok, chat, max_seq_length=len(whole.input_ids) - 1)
    assert cut.input_ids == tok.apply_chat_template([SYSTEM, *chat[3:]])
    assert shown(tok, cut) == [f"answer {i}</s>" for i in range(1, 5)]
    # of the last exchange the start of the prompt goes, then the end of the answer
    last = encode(tok, chat, max_seq_length=12)
    assert tok.decode(last.input_ids, skip_special_tokens=False) == "<s>: answer 4</s>"
    assert shown(tok, encode(tok, chat, max_seq_length=5)) == ["answ"]


@pytest.mark.parametrize("train_on", ["completion", "last_turn", "all"])
def test_a_cut_before_a_turn_that_begins_with_the_bos_token(tiny, train_on):
    """It would stand there twice, as the head and in the turn; SmolLM2 has such a token."""
    tok = tiny(TURNS + GENERATION)
    chat = [SYSTEM, user("question"), assistant("answer")]
    for limit in range(2, len(encode(tok, chat).input_ids)):
        cut = encode(tok, chat, train_on=train_on, max_seq_length=limit)
        assert len(cut.input_ids) <= limit
        assert cut.input_ids[:2] != [tok.bos_token_id] * 2
    with pytest.raises(lk.LorakitError, match="row 3: starts with <s> twice"):
        Encoder(tok, max_seq_length=4)(Pair("<s>abc", "de", "row 3"))


def test_a_question_stays_rather_than_what_follows_the_answer(tiny):
    """What is not learned after the last answer teaches nothing."""
    tok = tiny(TURNS + GENERATION)
    asked = [user("question"), assistant("answer")]
    whole = encode(tok, asked)
    tail = [user("and more of it"), assistant("not learned at all", weight=0), user("bye")]
    assert encode(tok, asked + tail, max_seq_length=len(whole.input_ids)) == whole


def test_plain_text_is_learned_whole(tiny):
    tok = tiny(None)
    [row] = lk.read_rows([{"text": "abc"}])
    ids = [*tok.encode("abc"), 2]
    assert Encoder(tok)(row) == (ids, ids)
    assert Encoder(tok, max_seq_length=3)(row) == (ids[:3], ids[:3])
    assert Encoder(tok, train_on="all")(Pair("a", "b", "")).labels == [*tok.encode("ab"), 2]


def test_an_end_token_is_wanted_where_all_is_learned(tiny):
    tok = tiny(TURNS.replace("</s>", "\n") + GENERATION)
    with pytest.raises(lk.LorakitError, match="puts no end token after message 2"):
        encode(tok, CHAT, train_on="all")
    encode(tok, CHAT[:2], train_on="all")  # nobody answers here


def test_end_tokens_of_the_rows_and_of_the_tokenizer(tiny):
    """One that a completion holds already is not put twice; one in front of it is refused."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    tok = tiny(None)
    once, twice = (Encoder(tok)(Pair("a", text, "row 0")) for text in ("b", "b</s>"))
    assert once == twice
    backend = Backend.from_str(tok.backend.to_str())
    special = [("<s>", tok.bos_token_id), ("</s>", tok.eos_token_id)]
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    closing = Tokenizer(backend, tok.special_tokens, None)
    with pytest.raises(lk.LorakitError, match="row 0: the tokenizer puts its end token after"):
        Encoder(closing)(Pair("a", "b", "row 0"))
    [row] = lk.read_rows([{"text": "ab"}])
    assert Encoder(closing)(row) == Encoder(tok)(row)


@pytest.mark.parametrize("over_length", ["truncate", "drop"])
def test_the_largest_id_is_that_of_the_examples(tok, tmp_path, over_length):
    """What is cut off does not count; held and lazy, pairs and single rows."""
    rows = [{"prompt": "b" * i, "completion": "a" * 4 + "z" * i} for i in range(1, 9)]
    choices = [{"prompt": "b", "chosen": "a" * i, "rejected": "z" * i} for i in range(1, 9)]
    for values in (rows, choices):
        for source in (values, written(tmp_path / "rows.jsonl", values)):
            options = {"max_seq_length": 12, "over_length": over_length}
            examples = encode_rows(lk.read_rows(source), tok, **options)
            ids = [i for e in examples for answer in e.answers for i in answer.input_ids]
            assert examples.largest_id == max(ids)


def test_pairs_of_chats(tok):
    """The prompt stands by itself, or is the messages that both begin with."""
    before = [{"role": "user", "content": "hi"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("hello", "no"))
    apart = {"prompt": before, "chosen": good, "rejected": bad}
    whole = {"chosen": before + good, "rejected": before + bad}
    a, b = (
        lk.encode_rows(lk.read_rows([row]), tok, max_seq_length=200)[0] for row in (apart, whole)
    )
    assert a == b
    assert a.chosen.input_ids == tok.apply_chat_template(before + good)
    assert a.rejected.labels.count(-100) == a.chosen.labels.count(-100)
    with pytest.raises(lk.LorakitError, match="row 0: chosen and rejected need a prompt"):
        lk.read_rows([{"chosen": "a", "rejected": "b"}])
    with pytest.raises(lk.LorakitError, match="row 0, rejected: the completion is empty"):
        lk.read_rows([{"prompt": "x", "chosen": "a", "rejected": ""}])


def test_long_pairs_are_counted_as_rows(tok, caplog):
    rows = lk.read_rows([{"prompt": "p" * 90, "chosen": "b", "rejected": "c"}] * 2)
    lk.encode_rows(rows, tok, max_seq_length=60)
    assert "2 of 2 rows are longer than max_seq_length=60" in caplog.text


@pytest.mark.parametrize("chats", [False, True])
def test_a_pair_that_is_cut_keeps_one_prompt(tok, chats):
    """Both have what the longer answer leaves room for; of chats the same exchanges."""
    if chats:
        turns = [{"role": "user", "content": "a" * 9}, {"role": "assistant", "content": "b" * 9}]
        user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "c" * 9}
        worse = {"role": "assistant", "content": "d" * 30}
        row = {"prompt": [*turns, *turns, user], "chosen": [answer], "rejected": [worse]}
    else:
        prompt = "".join(chr(97 + i % 26) for i in range(30))
        row = {"prompt": prompt, "chosen": "x" * 5, "rejected": "y" * 25}
    limit = 60 if chats else 40
    [example] = lk.encode_rows(lk.read_rows([row]), tok, max_seq_length=limit)
    chosen, rejected = (
        [t for t, label in zip(each.input_ids, each.labels, strict=True) if label == -100]
        for each in (example.chosen, example.rejected)
    )
    assert chosen == rejected
    assert len(example.rejected.input_ids) <= limit
    assert len(chosen) > 5
    assert example.chosen.labels[-2:] == [tok.encode("c" if chats else "x")[-1], tok.eos_token_id]
