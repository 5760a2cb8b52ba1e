"""What a lint says about one text or row: private strings, its script, an answer that repeats.

The checks know shapes, not meanings. A private string is one whose shape and check digits are
right; a name or an address of a street has no shape, and is not found.
"""

import re
import unicodedata
from collections import Counter
from functools import lru_cache

from lorakit.data.schemas import Row
from lorakit.data.texts import answer_of, question_of

REPEATED = 20  # characters; a shorter question may stand in an answer without being repeated
LOOKED_AT = 2000  # characters of a text that tell its script

# The domains that RFC 2606 keeps for examples.
_EMAIL = re.compile(
    r"[\w.+-]{1,64}@(?!(?:[\w-]+\.)*example\.(?:com|org|net)\b)[a-z\d-]+(?:\.[a-z\d-]+)*\.[a-z]{2,}",
    re.IGNORECASE,
)
# E.164 has at most 15 digits after the plus; without it the form of North America alone is told
# from other numbers.
_PHONE = re.compile(
    r"(?<![\w+])\+\d(?:[ .()/-]{0,2}\d){7,14}(?!\w)"
    r"|(?<![\w.-])(?:\([2-9]\d\d\) ?|[2-9]\d\d[-.])[2-9]\d\d[-.]\d{4}(?![\w.-])"
)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d\d(?: ?[A-Z\d]){11,30}(?!\w)")
_CARD = re.compile(r"(?<![\w.+-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w.-])")
# The beginnings of keys that their makers publish, so that they can be found.
_KEYS = {
    "AWS": r"(?:AKIA|ASIA)[A-Z2-7]{16}",
    "GitHub": r"gh[pousr]_[A-Za-z\d]{36}|github_pat_\w{22,}",
    "Google": r"AIza[\w-]{35}",
    "Hugging Face": r"hf_[A-Za-z\d]{34}",
    "OpenAI or Anthropic": r"sk-(?:proj-|ant-)?[\w-]{32,}",
    "Slack": r"xox[abprs]-[\dA-Za-z-]{10,}",
    "Stripe": r"[rs]k_live_[\dA-Za-z]{24,}",
}
_KEY = re.compile(rf"(?<![\w-])(?:{'|'.join(_KEYS.values())})(?!\w)")
_PRIVATE_KEY = "PRIVATE KEY-----"


def private_kinds(text: str) -> list[str]:
    """Return the kinds of private strings in a text, such as "e-mail address", sorted.

    The strings themselves are not returned, since a report should not spread them.
    """
    found = []
    if "@" in text and _EMAIL.search(text):
        found.append("e-mail address")
    if _PRIVATE_KEY in text or _KEY.search(text):
        found.append("key")
    if re.search(r"\d\d", text):
        if any(map(_is_card, _CARD.findall(text))):
            found.append("card number")
        if any(map(_is_iban, _IBAN.findall(text))):
            found.append("IBAN")
        if _PHONE.search(text):
            found.append("phone number")
    return sorted(found)


def _is_card(text: str) -> bool:
    """Say whether digits have the check digit of Luhn (ISO/IEC 7812-1)."""
    digits = [int(c) for c in reversed(text) if c.isdecimal()]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


def _is_iban(text: str) -> bool:
    """Say whether the longest part of a text that may be an IBAN has its check digits (ISO 13616).

    A word in capitals may follow an IBAN, so shorter parts that end before a space count too.
    """
    groups = text.split(" ")
    for end in range(len(groups), 0, -1):
        code = "".join(groups[:end])
        if len(code) >= 15 and int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1:
            return True
    return False


def script_of(text: str) -> str:
    """Return the script of most letters of a text, as Unicode names it, "" without letters.

    Chinese characters are "CJK". Japanese is HIRAGANA mostly, Korean HANGUL. A script tells no
    language: English, French and Vietnamese all are LATIN.
    """
    start = text[:LOOKED_AT]
    if start.isascii():
        return "LATIN" if re.search("[A-Za-z]", start) else ""
    scripts: Counter[str] = Counter()
    for letter, count in Counter(start).items():
        if letter.isalpha():
            scripts[_script_of_letter(letter)] += count
    return max(scripts, key=lambda name: (scripts[name], name)) if scripts else ""


@lru_cache(1 << 16)
def _script_of_letter(letter: str) -> str:
    return unicodedata.name(letter, "UNNAMED").split()[0].partition("-")[0]


def repeats_question(row: Row) -> bool:
    """Say whether the answer of a row holds its whole question, of REPEATED characters at least."""
    question = " ".join(question_of(row).split()).casefold()
    return len(question) >= REPEATED and question in " ".join(answer_of(row).split()).casefold()
