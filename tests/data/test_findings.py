"""What texts show by their shape: private strings by published examples, and scripts."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.findings import private_kinds, repeats_question, script_of
from tests.data.chats import assistant, user


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to ada.l+x@mail.uni-bonn.de.", ["e-mail address"]),
        ("write to me@example.com or @handle or a@b", []),
        ("(+49 228 73-0815)", ["phone number"]),
        ("call (415) 555-2671 or 415-555-2671", ["phone number"]),
        ("version 1.415-555-26711, 2026-11-30 10:20, 12345678901", []),
        # IBANs of the registry of SWIFT, which has one example for each country
        ("DE89370400440532013000", ["IBAN"]),
        ("to GB29 NWBK 6016 1331 9268 19 TODAY", ["IBAN"]),
        ("NO9386011117947", ["IBAN"]),
        ("DE89370400440532013001", []),
        # the numbers that makers of cards give for tests, and one with a wrong check digit
        ("4111 1111 1111 1111", ["card number"]),
        ("5555-5555-5555-4444, 378282246310005", ["card number"]),
        ("4111 1111 1111 1112", []),
        ("pi is 3.14159265358979323846", []),
        ("AKIAIOSFODNN7EXAMPLE", ["key"]),
        ("hf_" + "aB3" * 11 + "x", ["key"]),
        ("ghp_" + "a1B2" * 9, ["key"]),
        ("sk-proj-" + "a1_-" * 9, ["key"]),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", ["key"]),
        ("sk-learn and hf_hub_download and risk-free-rate-of-return-on-an-investment", []),
        ("a@b.org +4922873 0815", ["e-mail address", "phone number"]),
        ("", []),
    ],
)
def test_private_strings(text, kinds):
    assert private_kinds(text) == kinds
    assert private_kinds(f"é {text} é") == kinds


@given(st.integers(10**11, 10**15))
def test_the_check_digit_of_a_card_number(number):
    """One of the ten last digits is right, and it is that of Luhn's rule, digit by digit."""
    body, right = f"4{number}", []
    for last in string.digits:
        total = 0
        for i, digit in enumerate(reversed(body + last)):
            value = int(digit) * (1 + i % 2)
            total += value - 9 if value > 9 else value
        if total % 10 == 0:
            right.append(last)
    found = [last for last in string.digits if "card number" in private_kinds(body + last)]
    assert found == right
    assert len(found) == 1


@given(st.text(string.ascii_uppercase + string.digits, min_size=11, max_size=30))
def test_the_check_digits_of_an_iban(account):
    """ISO 7064: with the two digits 98 - (number % 97) the whole is 1 modulo 97."""
    number = int("".join(str(int(c, 36)) for c in account + "DE00"))
    digits = 98 - number % 97
    assert "IBAN" in private_kinds(f"DE{digits:02}{account}")
    wrong = digits % 97 + 1
    assert "IBAN" not in private_kinds(f"DE{wrong:02}{account}")


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hi!", "LATIN"),
        ("Größe", "LATIN"),
        ("12 !", ""),
        ("😀", ""),
        ("Привет, world", "CYRILLIC"),
        ("今天天气", "CJK"),
        ("これはペンです", "HIRAGANA"),
        ("안녕 hi", "HANGUL" if len("안녕") > len("hi") else "LATIN"),  # a tie goes by the name
        ("مرحبا", "ARABIC"),
    ],
)
def test_scripts(text, script):
    assert script_of(text) == script


@given(st.text())
def test_any_text_can_be_looked_at(text):
    assert isinstance(script_of(text), str)
    assert isinstance(private_kinds(text), list)


def test_answers_that_repeat_the_question():
    question = "What is the capital of  France?"
    values = [
        {"prompt": question, "completion": "what is the capital of France? Paris"},
        {"prompt": question, "completion": "Paris is the capital"},
        {"prompt": "Why?", "completion": "Why? Because."},  # too short to tell
        {"prompt": [user(question)], "completion": [assistant(f"You ask: {question} Paris")]},
        {"messages": [assistant("Hi")]},
        {"text": question},
        {"prompt": question, "chosen": question, "rejected": "Paris"},
        {"instruction": question, "output": question},
    ]
    rows = [lk.read_rows([value])[0] for value in values]
    found = [repeats_question(row) for row in rows]
    assert found == [True, False, False, True, False, False, True, True]
