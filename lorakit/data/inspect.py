"""What training data looks like to the model: `lorakit data show`.

`show_rows` uses the Encoder that training uses, so it shows what is learned.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lorakit.config.labels import name_of
from lorakit.config.training import TrainOn
from lorakit.data.encode import IGNORE, Encoder, Example, LabelledExample
from lorakit.data.schemas import Judged, Labelled, Prompt, Row, answers_of
from lorakit.models.tokenizer import Tokenizer

LEARNED, MASKED, PLAIN = "\x1b[30;42m", "\x1b[2m", "\x1b[0m"


def show_rows(
    rows: Sequence[Row],
    tok: Tokenizer,
    count: int = 3,
    *,
    train_on: TrainOn = "completion",
    color: bool = False,
) -> str:
    """Return the tokens of the first rows as text, with their labels marked.

    Bars stand between the tokens. White space and control characters are made visible.

    Args:
        rows: Rows, as `read_rows` returns them.
        tok: The model's tokenizer.
        count: How many rows to show.
        train_on: Which tokens are labels, as `encode_rows` takes it.
        color: Mark labels by terminal colours. False puts them in double brackets.

    Returns:
        For each row a line with its place and its numbers of tokens and labels, then its tokens.

    Raises:
        LorakitError: A row cannot be learned from, or train_on is unknown.
    """
    encoder = Encoder(tok, train_on=train_on)
    shown = []
    for row in rows[:count]:
        judged = ""
        if isinstance(row, Judged):
            judged = f", a {'good' if row.desirable else 'bad'} answer"
        if isinstance(row, Labelled):
            judged = f", the class {name_of(row.label)}"
        answers: Sequence[Row] = [row] if isinstance(row, Prompt | Labelled) else answers_of(row)
        for each in answers:
            example = encoder(each)
            example = example.text if isinstance(example, LabelledExample) else example
            assert isinstance(example, Example)  # one answer, and no limit to its length
            ids, labels = example
            learned = sum(label != IGNORE for label in labels)
            head = f"{each.place}: {len(ids)} tokens, {learned} of them labels{judged}"
            shown.append(f"{head}\n{_colored(tok, ids, labels, color)}\n")
    return "\n".join(shown)


def _colored(tok: Tokenizer, ids: list[int], labels: list[int], color: bool) -> str:
    out, learned = [], False
    for text, _, label in token_pieces(tok, ids, labels):
        if color:
            # a line break would carry the colour on to the edge of the terminal
            start = LEARNED if label else MASKED
            lines = visible(text).split("\n")
            out += ["\n".join(f"{start}{line}{PLAIN}" for line in lines), "|"]
            continue
        if label != learned:
            out.append("[[" if label else "]]")
            learned = label
        elif out:
            out.append("|")
        out.append(visible(text))
    return "".join(out).removesuffix("|") + ("]]" if learned else "")


class Piece(NamedTuple):
    """The text of a token, or of a few that are one character together."""

    text: str
    ids: list[int]
    learned: bool
    """Whether they are labels."""


def token_pieces(tok: Tokenizer, ids: list[int], labels: list[int]) -> Iterable[Piece]:
    """Yield the text of each token, its id and whether it is a label.

    Tokens that are one character together are joined. A token is decoded after itself, because
    some tokenizers leave out its space at the start of a text.
    """
    held: list[int] = []
    for i, token in enumerate(ids):
        held.append(token)
        alone = tok.decode(held, skip_special_tokens=False)
        text = tok.decode(held * 2, skip_special_tokens=False)[len(alone) :]
        learned = labels[i] != IGNORE
        last = i + 1 == len(ids) or (labels[i + 1] != IGNORE) != learned
        if "\ufffd" not in text or len(held) == 4 or last:
            yield Piece(text, held, learned)
            held = []


def visible(text: str) -> str:
    """Return text with white space and control characters made visible."""
    shown = text.replace(" ", "·").replace("\n", "↵\n").replace("\t", "→")
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in shown)
