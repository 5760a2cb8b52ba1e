"""Sizes of memory as people write them: 24GB, 24 GiB, 24g, 24576MiB."""

import re

from lorakit.config.errors import LorakitError

_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt])(i?)b?", re.IGNORECASE)
MOST = 1 << 60  # bytes; no machine has more, and a larger number is a slip


def parse_bytes(text: str) -> int:
    """Return the number of bytes that a text such as "24GB" or "23.5 GiB" means.

    Args:
        text: A number and its unit. k, M, G and T mean powers of 1000, and Ki, Mi, Gi and Ti powers
            of 1024, with a "B" behind them or without, in capitals or not.

    Returns:
        The bytes, rounded to a whole number, from 1 to 2^60.

    Raises:
        LorakitError: The text is no such size, has no unit, or is out of this range.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise LorakitError(
            f"{text!r:.60} is no size of memory; write a number and its unit, such as 24GB (10^9 "
            "bytes each) or 24GiB (2^30)"
        )
    number, prefix, binary = found.groups()
    base = 1024 if binary else 1000
    size = float(number) * base ** _POWERS[prefix.lower()]  # of very many digits: infinity
    if not 0.5 < size <= MOST:
        raise LorakitError(f"{text!r:.60} is no size of memory that a machine has")
    return round(size)


def format_bytes(size: int) -> str:
    """Return a number of bytes as people read it, in powers of 1000.

    Args:
        size: The bytes, not negative.

    Returns:
        Such as "7.4 GB", "378 MB" or "1.2 kB", with two digits at least.
    """
    if size >= 999_500_000:
        return f"{size / 1e9:.1f} GB"
    unit, value = ("MB", size / 1e6) if size >= 999_500 else ("kB", size / 1e3)
    return f"{value:.{0 if value >= 9.95 else 1}f} {unit}"
