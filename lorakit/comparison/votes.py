"""Blind votes: a person says which of two runs' answers is better, without knowing whose they are.

Rows come in an order that is drawn by a seed, and so does the side on which a run's answer stands.
The ticket of a pair is the number of its row; what stands where is known to the ballot alone. Rows
that both runs answer with the same text are a tie that nobody needs to look at, and are counted by
themselves.

A vote is a line of votes.jsonl, written at once and flushed to the disk:

    {"pair": [first, second], "row": 3, "answers": digest of what was shown,
     "order": "second first", "winner": "tie", "time": ...}

A vote counts as long as both runs answer as they did then; one that was made again may not.
"""

import fcntl
import hashlib
import json
import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lorakit.comparison.record import predictions_file, read_predictions
from lorakit.config.errors import LorakitError, nearest
from lorakit.evaluation.intervals import sign_test
from lorakit.files.local import as_path, read_json, read_text

Side = Literal["left", "right", "tie"]
FILE = "votes.jsonl"
_Z = 1.959964  # of a 95% interval


class BlindPair(NamedTuple):
    """Two answers to the same prompt, without the names of those who gave them."""

    ticket: int
    """Number that a vote names."""
    prompt: str | list[dict[str, Any]]
    """Prompt: a text, or the messages of a chat."""
    left: str
    """Answer of one run."""
    right: str
    """Answer of the other run."""
    left_over: int
    """Number of pairs to vote on, this one included."""


@dataclass(frozen=True)
class Share:
    """What the votes on two runs say so far."""

    first: int
    """Number of votes for the first run."""
    second: int
    """Number of votes for the second run."""
    ties: int
    """Number of votes for neither."""
    same: int
    """Number of rows with the same answer, which nobody voted on."""
    left_over: int
    """Number of rows to vote on."""

    @property
    def votes(self) -> int:
        """Number of votes."""
        return self.first + self.second + self.ties

    @property
    def value(self) -> float | None:
        """Share of the votes that the second run wins, a tie as half; None without votes."""
        return (self.second + self.ties / 2) / self.votes if self.votes else None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the share by Wilson's score (1927); [0, 1] without votes."""
        n, share = self.votes, self.value
        if share is None:
            return 0.0, 1.0
        middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        spread = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
        return max(0.0, middle - spread), min(1.0, middle + spread)

    @property
    def p_value(self) -> float:
        """Probability of votes as uneven if neither were better: the sign test without ties."""
        return sign_test(self.first, self.second)

    def __str__(self) -> str:
        said = (
            f"first {self.first}, second {self.second}, ties {self.ties}, same answer {self.same}"
        )
        if self.value is None:
            return f"{said}: no votes yet, {self.left_over} to go"
        low, high = self.interval
        share = f"share of the second {self.value:.3f} [{low:.3f}, {high:.3f}]"
        return f"{said}: {share}, p = {self.p_value:.3g}, {self.left_over} to go"


class Ballot:
    """The votes on two runs of a comparison."""

    def __init__(self, folder: str | Path, first: str, second: str, *, seed: int = 0):
        """Open the votes on two runs.

        Args:
            folder: The output_dir of the comparison.
            first: The id of a run.
            second: The id of another run of the same task.
            seed: The seed that shuffles rows and sides.

        Raises:
            LorakitError: There is no such comparison or run, or the runs have not answered the same
                rows.
        """
        self.folder, self.pair = as_path(folder), (first, second)
        runs = read_json(self.folder / "comparison.json").get("runs")
        ids = [str(run.get("id")) for run in runs or [] if isinstance(run, dict)]
        for name in self.pair:
            if name not in ids or Path(name).name != name:  # it names a file
                raise LorakitError(
                    f"{self.folder} has no run {name!r:.80}{nearest(name, ids)}; its runs are "
                    f"{', '.join(ids)}"
                )
        if first == second:
            raise LorakitError(f"{first} cannot be compared with itself: name two runs")
        one, two = (read_predictions(predictions_file(self.folder, name)) for name in self.pair)
        if [(c.prompt, c.reference) for c in one] != [(c.prompt, c.reference) for c in two]:
            raise LorakitError(f"{first} and {second} have not answered the same rows")
        self._answers = list(zip(one, two, strict=True))
        self._salt = f"{seed}/{first}/{second}"
        differ = [i for i, (a, b) in enumerate(self._answers) if a.prediction != b.prediction]
        self._rows = sorted(differ, key=lambda row: self._drawn("row", row))
        self._digests = {row: self._digest(row) for row in differ}

    def next(self) -> BlindPair | None:
        """Return the next pair to vote on; None if all rows have a vote."""
        voted = self._votes()
        left_over = [row for row in self._rows if row not in voted]
        if not left_over:
            return None
        row = left_over[0]
        first, second = self._answers[row]
        texts = [first.prediction, second.prediction]
        left, right = texts if self._first_is_left(row) else texts[::-1]
        return BlindPair(row, first.prompt, left, right, len(left_over))

    def vote(self, ticket: int, winner: Side) -> None:
        """Save a vote. The last one on a row counts.

        Args:
            ticket: The ticket of a pair.
            winner: Which side is better, "left", "right" or "tie".

        Raises:
            LorakitError: There is no such ticket, or the winner is none of these.
        """
        if ticket not in self._rows:
            raise LorakitError(f"there is no pair with ticket {ticket!r:.40}")
        if winner not in ("left", "right", "tie"):
            raise LorakitError(f"a vote is left, right or tie, not {winner!r:.40}")
        first_is_left = self._first_is_left(ticket)
        for_first = (winner == "left") == first_is_left
        line = {
            "pair": list(self.pair),
            "row": ticket,
            "answers": self._digests[ticket],
            "order": "first second" if first_is_left else "second first",
            "winner": "tie" if winner == "tie" else "first" if for_first else "second",
            "time": round(time.time(), 3),
        }
        _append(self.folder / FILE, json.dumps(line))

    def share(self) -> Share:
        """Return what the votes say so far."""
        winners = list(self._votes().values())
        first, second, ties = (winners.count(each) for each in ("first", "second", "tie"))
        same = len(self._answers) - len(self._rows)
        return Share(first, second, ties, same, len(self._rows) - len(winners))

    def _votes(self) -> dict[int, str]:
        """Return who won on each row that has a vote. A line that is no vote is passed over."""
        path, found = self.folder / FILE, dict[int, str]()
        # what a vote says of the same two runs, named the other way round
        turned = {"first": "second", "second": "first", "tie": "tie"}
        for line in read_text(path).splitlines() if path.exists() else []:
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                vote = json.loads(line)
                pair, row, winner = vote["pair"], vote["row"], vote["winner"]
                if self._digests.get(row) != vote["answers"]:
                    continue
                if pair == list(self.pair) and winner in turned:
                    found[row] = winner
                elif pair == list(self.pair[::-1]):
                    found[row] = turned[winner]
        return found

    def _digest(self, row: int) -> str:
        """Return a digest of the prompt of a row and of both answers, in the order of the names."""
        answers = self._answers[row]
        texts = {name: each.prediction for name, each in zip(self.pair, answers, strict=True)}
        text = json.dumps([answers[0].prompt, texts], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def _first_is_left(self, row: int) -> bool:
        return self._drawn("side", row) % 2 == 0

    def _drawn(self, what: str, row: int) -> int:
        """Return a number that the seed draws for a row."""
        text = f"{self._salt}/{what}/{row}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _append(path: Path, line: str) -> None:
    """Add a line to a file, whole, and flush it to the disk. A line that was cut off is ended."""
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
