"""Comparisons and blind votes, through the paths of a board."""

import json
import os

import pytest

import lorakit as lk
from lorakit.board import comparisons
from lorakit.training.state import only_run_in
from tests.board.conftest import TOKEN


@pytest.fixture
def sizes(folder):
    """A comparison of two runs, whose answers differ in two of three rows."""
    sizes = folder / "sizes"
    sizes.mkdir()
    values = {
        "version": 1,
        "name": "<b>sizes",
        "runs": [{"id": name, "state": "finished"} for name in ("one", "two", "../../../secret/x")],
        "tasks": [],
    }
    (sizes / "comparison.json").write_text(json.dumps(values))
    for name, last in (("one", "ab"), ("two", "xy")):
        answers = ["same", *last]
        completions = [lk.Completion(f"p{i}", "r", text) for i, text in enumerate(answers)]
        lk.write_completions(sizes / "predictions" / f"{name}.jsonl", completions)
    return sizes


def test_the_list_and_the_results(sizes, get, refused):
    expected = {"id": "sizes", "name": "<b>sizes", "state": "finished"}
    assert get("comparisons") == [expected]
    assert get("comparisons/sizes") == json.loads((sizes / "comparison.json").read_text())
    with only_run_in(sizes):
        assert get("comparisons")[0]["state"] == "running"
    assert refused("comparisons/a")[0] == 404
    (sizes / "comparison.json").write_text("[" * 9999)
    assert get("comparisons") == [{"id": "sizes", "name": "sizes", "state": "failed"}]
    assert "is damaged" in refused("comparisons/sizes")[1]


def test_a_list_reads_a_comparison_again_when_it_has_changed(sizes, get, monkeypatch):
    """The page asks for the list every two seconds, and files may have megabytes."""
    reads, real = [], comparisons.read
    monkeypatch.setattr(comparisons, "read", lambda path: reads.append(path) or real(path))
    assert get("comparisons") == get("comparisons")
    assert reads == [sizes]
    (sizes / "comparison.json").write_text(json.dumps({"name": "other", "runs": []}))
    assert get("comparisons")[0]["name"] == "other"
    assert reads == [sizes] * 2


def test_comparisons_of_one_name_are_told_apart(sizes, folder, get):
    for name, said in (("one", "comparison"), ("two", "comparison"), ("three", "two")):
        (folder / name).mkdir()
        (folder / name / "comparison.json").write_text(json.dumps({"name": said, "runs": []}))
    assert {each["id"]: each["name"] for each in get("comparisons")} == {
        "sizes": "<b>sizes",
        "one": "comparison (one)",
        "two": "comparison (two)",
        "three": "two",
    }


def test_votes(sizes, client, get):
    path = "comparisons/sizes/vote"
    pair = get(f"{path}?first=one&second=two")
    assert pair["left_over"] == 2
    for left in (2, 1):
        assert {pair["left"], pair["right"]} in ({"a", "x"}, {"b", "y"})
        assert "one" not in json.dumps(pair)  # nothing tells whose answer is which
        assert "two" not in json.dumps(pair)
        winner = "left" if pair["left"] in "ab" else "right"  # always the first run
        body = {"first": "one", "second": "two", "ticket": pair["ticket"], "winner": winner}
        pair = client.post(f"/{TOKEN}/api/{path}", json=body).json()
        assert pair.get("left_over") == (left - 1 or None)
    assert pair["done"]
    assert pair["share"]["first"] == 2
    assert pair["share"]["value"] == 0.0
    assert pair["share"]["same"] == 1
    assert get("comparisons/sizes/share?first=two&second=one")["share"]["second"] == 2
    assert len((sizes / "votes.jsonl").read_text().splitlines()) == 2


def test_what_is_no_vote(sizes, refused):
    path, vote = "comparisons/sizes/vote", {"first": "one", "second": "two", "ticket": 0}
    assert refused(f"{path}?first=one")[0] == 400
    assert refused(f"{path}?first=one&second=three")[0] == 404
    assert "cannot be compared with itself" in refused(f"{path}?first=one&second=one")[1]
    assert refused(path, **vote, winner="both")[0] == 400
    assert "winner" in refused(path, **vote)[1]
    assert "no pair with ticket 0" in refused(path, **vote, winner="left")[1]  # the same answer
    assert refused(path, **{**vote, "ticket": "1"}, winner="left")[0] == 400
    assert not (sizes.parent / "votes.jsonl").exists()


def test_answers_and_votes_outside_are_not_there(sizes, refused, tmp_path):
    secret = tmp_path / "secret" / "x.jsonl"
    secret.write_text((sizes / "predictions" / "one.jsonl").read_text())
    path = "comparisons/sizes/vote"
    assert refused(f"{path}?first=one&second=../../../secret/x")[0] == 404
    values = json.loads((sizes / "comparison.json").read_text())
    values["runs"].append({"id": f"{tmp_path}/secret/x"})
    (sizes / "comparison.json").write_text(json.dumps(values))
    assert refused(f"{path}?first=one&second={tmp_path}/secret/x")[0] == 404
    os.symlink(secret, sizes / "votes.jsonl")
    vote = {"first": "one", "second": "two", "ticket": 1, "winner": "left"}
    assert refused(path, **vote)[0] == 404
    assert "winner" not in secret.read_text()
