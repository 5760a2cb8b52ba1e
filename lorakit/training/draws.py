"""The random numbers of a micro-batch: dropout's masks and NEFTune's noise.

They are a function of the seed and of the micro-batch's number in the run. So it does not matter
which process computes a micro-batch, or what was computed before it: a run on several ranks, and
one that goes on from a checkpoint, draw what one process would.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch


def seed_of(seed: int, number: int) -> int:
    """Return the seed of micro-batch 0, 1, ... of a run, from 0 to 2^64 - 1.

    A hash, since `seed + number` would let runs with seeds 0 and 1 draw the same numbers.
    """
    return int.from_bytes(blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "little")


def seed_of_completion(seed: int, step: int, row: int, number: int) -> int:
    """Return the seed of a completion that a run samples, from 0 to 2^63 - 1.

    `number` is its own among the completions of the row.
    """
    text = f"{seed}/{step}/{row}/{number}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def drawing_from(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Let torch's generators start from `seed`; afterwards they go on as if nothing was drawn.

    Args:
        seed: From 0 to 2^64 - 1.
        device: A GPU whose generator starts too, beside that of host memory. None: no other one.

    Yields:
        Nothing; what is drawn in the block follows from the seed.
    """
    before, on_gpu = torch.get_rng_state(), None
    if device is not None and device.type == "cuda":
        on_gpu = torch.cuda.get_rng_state(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all devices' too
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if device is not None and on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)
