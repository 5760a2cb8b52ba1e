"""The rows of a run as its model sees them: tokens, and which of them are learned.

The rows lie where the run file says, which may be outside the board's folder: the run has read them
there too. They are shown to whoever started the board, and to nobody else.
"""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.board import runs
from lorakit.config.data import DataConfig, SourceConfig
from lorakit.config.errors import LorakitError
from lorakit.config.run import RunConfig
from lorakit.data.encode import Encoder
from lorakit.data.inspect import token_pieces
from lorakit.data.rows import place_of, read_rows
from lorakit.data.schemas import Row
from lorakit.data.sources import open_data
from lorakit.files.hub import fetch_adapter
from lorakit.files.yaml_text import parse_yaml
from lorakit.models.tokenizer_files import adapted_tokenizer

_KEPT = 4  # runs whose rows and tokenizer are kept


class RowReader:
    """The rows and the tokenizers of the runs that were asked for last."""

    def __init__(self) -> None:
        """Keep nothing yet."""
        self.kept: OrderedDict[tuple[Path, str], tuple[Sequence[Row], Encoder]] = OrderedDict()
        self.lock = threading.Lock()

    def tokens(self, run: Path, offset: int, limit: int) -> list[dict[str, Any]]:
        """Return rows for training as their examples.

        Args:
            run: The folder of the run.
            offset: The number of the first row, from 0.
            limit: How many rows to return at most.

        Returns:
            {"place", "answer", "tokens": [{"text", "ids", "learned"}]} for each example, of a pair
            two, whose answers are "chosen" and "rejected"; else the answer is None. Of a row that
            cannot be encoded the tokens are [] and "error" says why.

        Raises:
            LorakitError: The run has no run file, or its rows or its tokenizer cannot be read.
        """
        with self.lock:
            rows, encoder = self._opened(run)
            end = min(len(rows), offset + limit)
            return [each for i in range(offset, end) for each in _examples(rows, i, encoder)]

    def _opened(self, run: Path) -> tuple[Sequence[Row], Encoder]:
        text = runs.run_file(run)
        if (run, text) not in self.kept:
            config = RunConfig.from_dict(parse_yaml(text), "the run file")
            self.kept[run, text] = _open(anchored(config, runs.started_in(run)))
        self.kept.move_to_end((run, text))
        while len(self.kept) > _KEPT:
            self.kept.popitem(last=False)
        return self.kept[run, text]


def _open(run: RunConfig) -> tuple[Sequence[Row], Encoder]:
    """Return the rows of a run, all of which are read once, and what encodes them."""
    rows = read_rows(open_data(run.rows, skip_empty=run.train.skip_empty)["train"])
    adapter = None if run.adapter is None else fetch_adapter(run.adapter)
    tok = adapted_tokenizer(run.model, adapter, run.chat_template)
    tok.add_special_tokens(run.add_tokens)
    train = run.train
    encoder = Encoder(
        tok,
        max_seq_length=train.max_seq_length,
        over_length=train.over_length,
        train_on=train.train_on,
    )
    return rows, encoder


def _examples(rows: Sequence[Row], index: int, encoder: Encoder) -> list[dict[str, Any]]:
    place = place_of(rows, index)
    try:
        examples = encoder.examples(rows[index])
    except LorakitError as error:
        return [{"place": place, "answer": None, "tokens": [], "error": str(error)}]
    found = []
    for example in examples:
        answers = example.answers
        names = ["chosen", "rejected"] if len(answers) > 1 else [None]
        for name, (ids, labels) in zip(names, answers, strict=True):
            pieces = token_pieces(encoder.tok, ids, labels)
            found.append(
                {"place": place, "answer": name, "tokens": [each._asdict() for each in pieces]}
            )
    return found


def anchored(run: RunConfig, cwd: Path) -> RunConfig:
    """Return the settings of a run with its paths as they were where it was started.

    Args:
        run: The settings.
        cwd: The folder that relative paths are relative to.

    Returns:
        The settings. A text that names nothing there, such as a Hub id, stays.
    """

    def place(text: str | None) -> Any:
        return None if text is None else runs.placed(text, cwd)

    def sources(said: str | list[SourceConfig] | None) -> Any:
        if isinstance(said, list):
            return [dataclasses.replace(each, path=place(each.path)) for each in said]
        return place(said)

    data = run.data
    moved: DataConfig = dataclasses.replace(
        data, train=sources(data.train), validation=sources(data.validation)
    )
    return dataclasses.replace(
        run,
        model=place(run.model),
        data=moved,
        adapter=place(run.adapter),
        chat_template=place(run.chat_template),
    )
