"""The sizes of GGUF's blocks, by the names of their types."""

from typing import NamedTuple


class BlockLayout(NamedTuple):
    """The size of a block."""

    values: int
    """How many values it holds."""
    nbytes: int
    """The bytes that it takes."""


BLOCK_LAYOUTS = {
    "q8_0": BlockLayout(32, 34),
    "q4_0": BlockLayout(32, 18),
    "q4_1": BlockLayout(32, 20),
    "q5_0": BlockLayout(32, 22),
    "q5_1": BlockLayout(32, 24),
    "iq4_nl": BlockLayout(32, 18),
    "q4_k": BlockLayout(256, 144),
    "q5_k": BlockLayout(256, 176),
    "q6_k": BlockLayout(256, 210),
    "mxfp4": BlockLayout(32, 17),
}
