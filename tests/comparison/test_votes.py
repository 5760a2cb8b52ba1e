"""Blind votes: what is shown, what is saved, and what the votes say."""

import json
import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.comparison.votes import Share

ANSWERS = [("a", "b"), ("same", "same"), *((f"one {i}", f"two {i}") for i in range(8))]


@pytest.fixture
def folder(tmp_path):
    """A comparison of two runs with eight answers that differ, one that does not, and a chat."""
    runs = [{"id": name} for name in ("one", "two", "other", "../one")]
    (tmp_path / "comparison.json").write_text(json.dumps({"version": 1, "runs": runs}))
    prompts = [[{"role": "user", "content": "hello"}], *(f"prompt {i}" for i in range(9))]
    for side, name in enumerate(["one", "two"]):
        texts = [
            lk.Completion(prompt, "reference", pair[side])
            for prompt, pair in zip(prompts, ANSWERS, strict=True)
        ]
        lk.write_completions(tmp_path / "predictions" / f"{name}.jsonl", texts)
    lk.write_completions(tmp_path / "predictions" / "other.jsonl", texts[:3])
    return tmp_path


def test_every_pair_is_shown_once_and_neither_side_tells_whose_it_is(folder):
    ballot = lk.Ballot(folder, "one", "two")
    shown, lefts = [], 0
    while (pair := ballot.next()) is not None:
        assert {pair.left, pair.right} == set(ANSWERS[pair.ticket])
        assert pair == ballot.next()  # until there is a vote
        assert pair.left_over == 9 - len(shown)
        lefts += pair.left == ANSWERS[pair.ticket][0]
        shown.append(pair.ticket)
        ballot.vote(pair.ticket, "left")
        ballot = lk.Ballot(folder, "one", "two")  # another process goes on
    assert sorted(shown) == [0, *range(2, 10)]
    assert shown != sorted(shown)
    assert 0 < lefts < 9
    share = ballot.share()
    assert (share.first, share.second, share.ties) == (lefts, 9 - lefts, 0)
    assert (share.same, share.left_over) == (1, 0)
    other = lk.Ballot(folder, "one", "two", seed=1)
    assert [other._first_is_left(i) for i in range(10)] != [
        ballot._first_is_left(i) for i in range(10)
    ]


def test_votes_are_lines_and_the_last_one_on_a_row_counts(folder):
    ballot = lk.Ballot(folder, "one", "two")
    pair = ballot.next()
    first_is_left = pair.left == ANSWERS[pair.ticket][0]
    for winner in ("left", "tie", "right"):
        ballot.vote(pair.ticket, winner)
    lines = [json.loads(line) for line in (folder / "votes.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [pair.ticket] * 3
    assert lines[0]["winner"] == ("first" if first_is_left else "second")
    assert lines[1]["winner"] == "tie"
    assert lines[0]["order"] == ("first second" if first_is_left else "second first")
    assert ballot.share().votes == 1
    turned = lk.Ballot(folder, "two", "one").share()  # named the other way round
    assert (turned.first, turned.second) == (ballot.share().second, ballot.share().first)


def test_a_line_that_was_cut_off_and_lines_of_others_are_passed_over(folder):
    """A killed process leaves half a line; the next vote begins a new one."""
    path = folder / "votes.jsonl"
    path.write_text('[1]\n{"pair": ["one", "other"], "row": 0, "winner": "first"}\n{"pair": ["one"')
    ballot = lk.Ballot(folder, "one", "two")
    ballot.vote(0, "tie")
    assert ballot.share().ties == ballot.share().votes == 1
    threads = [threading.Thread(target=ballot.vote, args=(row, "tie")) for row in range(2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert ballot.next() is None
    assert ballot.share().ties == 9


def test_a_vote_counts_for_the_answers_that_were_shown(folder):
    """A run that was made again answers otherwise; a vote on its old answer says nothing then."""
    ballot = lk.Ballot(folder, "one", "two")
    for row in (0, 2, 3):
        ballot.vote(row, "left")
    path = folder / "predictions" / "one.jsonl"
    texts = lk.read_completions(path)
    texts[2] = texts[2]._replace(prediction="another answer")
    lk.write_completions(path, texts)
    for names in (("one", "two"), ("two", "one")):
        share = lk.Ballot(folder, *names).share()
        assert (share.votes, share.left_over) == (2, 7)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (("one", "to"), "no run 'to' (did you mean 'two'?); its runs are one, two, other, ../one"),
        (("one", "one"), "one cannot be compared with itself"),
        (("one", "other"), "one and other have not answered the same rows"),
        (("one", "../one"), "no run '../one'"),
    ],
)
def test_runs_that_cannot_be_voted_on(folder, runs, message):
    with pytest.raises(lk.LorakitError) as error:
        lk.Ballot(folder, *runs)
    assert message in str(error.value)


def test_votes_that_are_none(folder):
    ballot = lk.Ballot(folder, "one", "two")
    for ticket, winner, message in [
        (1, "left", "no pair with ticket 1"),  # both answers are the same
        (99, "left", "no pair with ticket 99"),
        ("0", "left", "no pair with ticket '0'"),
        (0, "first", "a vote is left, right or tie, not 'first'"),
    ]:
        with pytest.raises(lk.LorakitError, match=message):
            ballot.vote(ticket, winner)
    assert not (folder / "votes.jsonl").exists()


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_the_interval_of_a_share(first, second, ties):
    """Wilson's interval solves (p - share)^2 = z^2 p (1 - p) / n."""
    share = Share(first, second, ties, 0, 0)
    low, high = share.interval
    if not share.votes:
        assert (share.value, low, high) == (None, 0, 1)
        return
    assert 0 <= low <= high <= 1
    assert low - 1e-12 <= share.value <= high + 1e-12  # sums of floats
    for end in (low, high):
        if 0 < end < 1:
            expected = 1.959964**2 * end * (1 - end) / share.votes
            assert math.isclose((end - share.value) ** 2, expected, rel_tol=1e-6, abs_tol=1e-12)
    assert share.p_value == Share(second, first, 0, 0, 0).p_value


def test_what_a_share_says():
    assert str(Share(2, 6, 2, 1, 3)).startswith(
        "first 2, second 6, ties 2, same answer 1: share of the second 0.700 [0.39"
    )
    assert str(Share(0, 0, 0, 0, 5)).endswith("no votes yet, 5 to go")
