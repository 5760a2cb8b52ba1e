"""What the tests of run files share."""

import re
from pathlib import Path

from hypothesis import strategies as st

# any scalar of a YAML file
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
# the fewest keys that a run file may have
RUN = {"model": "m", "data": "train.jsonl"}
RUN_FILE = (Path(__file__).parents[2] / "docs" / "run-file.md").read_text(encoding="utf-8")


def table(heading, page=RUN_FILE):
    """Return the rows of the first table of a page after a line that begins so."""
    rest = re.split(rf"^{re.escape(heading)}.*$", page, maxsplit=1, flags=re.MULTILINE)[1]
    rows = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
