"""The report on rows: what compares them with each other and with those of a test."""

import json
from dataclasses import fields

import lorakit as lk
from lorakit.data.lint import lint_rows
from tests.data.chats import assistant, user

STORY = " ".join(f"word{i}" for i in range(40))


def test_near_duplicates_are_not_duplicates(tok):
    values = [{"text": text} for text in (STORY, STORY + " ", STORY + " more", "another one")]
    report = lint_rows(lk.read_rows(values), tok)
    assert report.duplicates == [("row 1", "row 0")]
    assert report.near == ["row 2 is nearly row 0 (97% shared)"]  # 38 shingles of 39
    assert lint_rows(lk.read_rows(values), tok, near=0.98).near == []
    assert lint_rows(lk.read_rows(values), tok, near=None).near == []


def test_leaks_into_the_rows_of_a_test(tok):
    train = [
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": STORY, "completion": "x"},
        {"prompt": "", "completion": "unasked"},
    ]
    test = [
        {"prompt": "2 +  2?", "completion": "five"},
        {"prompt": "3 + 3?", "completion": "4"},
        {"prompt": STORY + " more", "completion": "x"},
        {"prompt": "", "completion": "other"},
    ]
    rows, others = lk.read_rows(train), lk.read_rows(test)
    report = lint_rows(rows, tok, against=others)
    # 38 shingles of the story and one with the answer, of 38 + 2 + 1
    assert report.leaks == ["row 0 asks what row 0 does", "row 2 is nearly row 1 (93% shared)"]
    assert lint_rows(rows, tok, against=others, near=None).leaks == report.leaks[:1]
    assert lint_rows(rows, tok).leaks == []


def test_a_question_of_a_chat_is_all_that_precedes_the_answer(tok):
    def chat(first):
        return {"messages": [user(first), assistant("Yes."), user("Go on"), assistant("Fine.")]}

    rows, others = lk.read_rows([chat("One?")]), lk.read_rows([chat("Two?"), chat("One?")])
    report = lint_rows(rows, tok, against=others, near=None)
    assert report.leaks == ["row 1 asks what row 0 does"]


def test_uneven_classes_come_with_a_remedy(tok):
    def report(*counts):
        values = [
            {"prompt": f"{c} {i}", "completion": c}
            for c, n in zip("abc", counts, strict=False)
            for i in range(n)
        ]
        return str(lint_rows(lk.read_rows(values), tok))

    assert "the largest has 4.0 times the rows of the smallest" in report(8, 2)
    assert "always says it is right in 80%: `lorakit data balance`" in report(8, 2)
    assert "times the rows" not in report(5, 2)
    assert "short answers" not in report(1, 1, 1)


def test_good_and_bad_answers_are_counted(tok):
    def report(*labels):
        rows = [
            {"prompt": f"{i} ?", "completion": f"{i} !", "label": good}
            for i, good in enumerate(labels)
        ]
        return str(lint_rows(lk.read_rows(rows), tok))

    assert "labels of KTO: true 1, false 1\n" in report(True, False)
    said = "true 1, false 3; desirable_weight: 3.00 gives both the same weight\n"
    assert said in report(True, False, False, False)
    assert "; undesirable_weight: 2.00 gives both" in report(True, False, True)
    assert "true 2, false 0; it learns from good and bad answers" in report(True, True)


def test_the_report_is_json_too(tok):
    values = [
        {"prompt": "Who is ada@lovelace.org, asks the text?", "completion": "Ada"},
        {"prompt": "Кто это?", "completion": "Ада"},
    ]
    report = lint_rows(lk.read_rows(values), tok)
    assert report.private == ["row 0: e-mail address"]
    assert "ada@" not in str(report)
    assert report.scripts == {"LATIN": 1, "CYRILLIC": 1}
    assert "scripts, by rows: LATIN 50.0%, CYRILLIC 50.0%\n" in str(report)
    values = json.loads(json.dumps(report.as_dict()))
    assert set(values) == {field.name for field in fields(report)}
    assert values["private"] == report.private
    assert values["rows"] == 2
