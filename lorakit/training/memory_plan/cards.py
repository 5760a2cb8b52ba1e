"""GPUs by name: how much memory CUDA sees of each, and its compute capability.

`memory` is `torch.cuda.get_device_properties(0).total_memory` on Linux: what is printed on the box,
less what the driver keeps for itself and what error correction takes. Drivers differ by 1 to 2 %;
each figure is the smallest of those that people have published in the "CUDA:0 (name, ...MiB)" lines
of ultralytics and in the "total capacity of ... GiB" of torch.OutOfMemoryError (read in November
2026). On Windows the driver of a GeForce reports 1 to 3 % more, and lets other programs have it.

`context` is an allowance, no measurement of ours: what a process takes of the card beside torch's
allocator, which is the CUDA context and the code of its kernels. In published reports of
torch.OutOfMemoryError the process's memory, less what PyTorch has reserved, is 0.37 to 0.46 GB on
cards of 16, 24 and 48 GB with CUDA 12. The allowance has 0.14 GB more, for kernels that are loaded
later.
"""

import re
from dataclasses import dataclass

from lorakit.config.errors import LorakitError, nearest, one_of

CONTEXT = 600_000_000


@dataclass(frozen=True)
class Card:
    """A GPU, as a forecast needs to know it."""

    name: str
    """Name of the GPU."""
    memory: int
    """Bytes that CUDA reports as the GPU's memory."""
    capability: tuple[int, int]
    """Compute capability."""
    context: int = CONTEXT
    """Bytes that a process takes beside torch's allocator: the CUDA context and its kernels."""

    @property
    def usable(self) -> int:
        """Bytes that are left for torch, if no other program uses the GPU."""
        return self.memory - self.context


# name, the memory that is printed on the box in GB, what CUDA sees of it in MiB, compute capability
_TABLE = [
    ("T4", 16, 14913, (7, 5)),
    ("RTX 2080 Ti", 11, 10825, (7, 5)),
    ("RTX 3060", 12, 11910, (8, 6)),
    ("RTX 3090", 24, 24124, (8, 6)),
    ("RTX 4060 Ti", 16, 15945, (8, 9)),
    ("RTX 4070 Ti", 12, 12007, (8, 9)),
    ("RTX 4080", 16, 15937, (8, 9)),
    ("RTX 4090", 24, 24081, (8, 9)),
    ("RTX 5060 Ti", 16, 15816, (12, 0)),
    ("RTX 5070 Ti", 16, 15833, (12, 0)),
    ("RTX 5080", 16, 15840, (12, 0)),
    ("RTX 5090", 32, 32102, (12, 0)),
    ("A10", 24, 22518, (8, 6)),
    ("A10G", 24, 22589, (8, 6)),
    ("L4", 24, 22563, (8, 9)),
    ("L40S", 48, 45457, (8, 9)),
    ("A100", 40, 40441, (8, 0)),
    ("A100", 80, 81038, (8, 0)),
    ("H100", 80, 81080, (9, 0)),
    ("H200", 141, 143156, (9, 0)),
    ("B200", 180, 182630, (10, 0)),
    ("RTX 6000 Ada", 48, 48497, (8, 9)),
    ("RTX PRO 6000", 96, 97249, (12, 0)),
]
CARDS = [Card(f"{name} {gb}GB", mib << 20, capability) for name, gb, mib, capability in _TABLE]

# Words of a GPU's full name that tell it from no other one here.
_FILLERS = re.compile(
    r"nvidia|geforce|quadro|tesla|generation|blackwell|server|workstation|max|q"
    r"|edition|sxm[0-9]?|pcie|nvl|hbm[0-9]?e?"
)
_TOO_OLD = ("v100", "p100", "p40", "gtx1080ti", "1080ti")


def find_card(name: str) -> Card:
    """Return the GPU that a name means.

    Args:
        name: Such as "RTX 4090", "4090", "a100 80gb", or the full name that the driver reports.

    Returns:
        The GPU, with its memory as CUDA sees it.

    Raises:
        LorakitError: No GPU of the table has this name, several have it, or it is older than
            lorakit's kernels. The message says the nearest name.
    """
    asked, size = _split(name)
    if asked in _TOO_OLD:
        raise LorakitError(
            f"lorakit does not support the GPU {name!r:.60}: its kernels need compute capability "
            "7.5, so a T4 or a later GPU"
        )
    of_name = [card for card in CARDS if asked in _short_names(card)]
    meant = [card for card in of_name if size in (None, _split(card.name)[1])]
    if len(meant) == 1:
        return meant[0]
    if of_name:
        sizes = one_of([card.name for card in of_name])
        raise LorakitError(f"{name!r:.60} leaves open which GPU is meant: the table has {sizes}")
    of_short = {short: card.name for card in CARDS for short in _short_names(card)}
    near = nearest(asked, of_short)
    for short, long in of_short.items():
        near = near.replace(repr(short), repr(long))
    raise LorakitError(
        f"the GPU {name!r:.60} is not in lorakit's table{near}; say its memory instead, as in 24GB"
    )


def _split(name: str) -> tuple[str, str | None]:
    """Return a name without blanks and fillers, and its memory apart: "rtx4090", "24gb" or None."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    sizes = [word for word in words if re.fullmatch(r"[0-9]+gb", word)]
    left = [word for word in words if word not in sizes and not _FILLERS.fullmatch(word)]
    return "".join(left), sizes[0] if sizes else None


def _short_names(card: Card) -> tuple[str, str]:
    """Return the names that a GPU goes by: "rtx4090" and "4090"."""
    short = _split(card.name)[0]
    return short, short.removeprefix("rtx")
