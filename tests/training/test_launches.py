"""What a training step asks of a GPU: launches, waits and copies, counted without one.

launches.csv says how many launches each part of a step of an 8B Llama takes, by what launches them.
It is made again by LORAKIT_WRITE=1 pytest tests/training/test_launches.py.
"""

import csv
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import lorakit as lk
from lorakit.training.device_step import optimizer_step
from lorakit.training.float8 import start_float8

pytest.importorskip("triton")
from tests.meta_gpu import MetaGPU

TABLE = Path(__file__).with_name("launches.csv")
TOKENS = 2048
# the most launches of a layer, outside the layers, and of clipping and AdamW
MOST_OF_A_LAYER, MOST_OUTSIDE, MOST_OF_ADAMW = 77, 30, 3


class Step(NamedTuple):
    forward: Counter[str]
    backward: Counter[str]
    optimizer: Counter[str]
    gpu: MetaGPU


def step(
    layers: int,
    documents: int = 0,
    *,
    checkpointing: bool = False,
    micro_batches: int = 1,
    float8: bool = False,
):
    """One step of rows packed with so many documents; 0: of one dense row."""
    bounds = None
    if documents:
        bounds = torch.linspace(0, TOKENS, documents + 1).to(torch.int32)
    with MetaGPU() as gpu:
        model = gpu.decoder(layers)
        model.gradient_checkpointing = checkpointing
        if float8:
            start_float8(model)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = lk.optim.AdamW(params)
        update = optimizer_step(optimizer, params, [[1e-3]], 1.0)
        ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
        labels = torch.zeros(1, TOKENS, dtype=torch.int64)  # in host memory, as training has them
        gpu.clear()
        parts: list[Counter[str]] = []

        def part() -> None:
            parts.append(Counter(each.name for each in gpu.launches))
            gpu.launches.clear()

        for _ in range(micro_batches):
            loss, count = model.loss(ids, labels, cu_seqlens=bounds)
            part()
            (loss / count).backward()
            part()
        optimizer.start()  # the first step makes the state
        gpu.launches.clear()
        update(loss.detach().view(1))
        part()
    forward, backward = parts[0:-1:2], parts[1:-1:2]
    return Step(sum(forward, Counter()), sum(backward, Counter()), parts[-1], gpu)


def of_a_layer(**options) -> Step:
    """The launches of one layer more."""
    two, three = step(2, **options), step(3, **options)
    return Step(*(more - less for more, less in zip(three[:3], two[:3], strict=True)), two.gpu)


CASES = {
    "dense": {},
    "packed, 12 documents": {"documents": 12},
    "packed, 12 documents, checkpointing": {"documents": 12, "checkpointing": True},
    "dense, float8": {"float8": True},
}


def rows():
    """The rows of the table."""
    for case, options in CASES.items():
        layer, whole = of_a_layer(**options), step(2, **options)
        for part in ("forward", "backward"):
            each, all_ = getattr(layer, part), getattr(whole, part)
            outside = all_ - Counter({name: 2 * n for name, n in each.items()})
            for place, found in (("a layer", each), ("outside the layers", outside)):
                for name, n in sorted(found.items()):
                    yield [case, part, place, name, str(n)]
        for name, n in sorted(whole.optimizer.items()):
            yield [case, "optimizer", "all layers", name, str(n)]


def test_the_table_of_launches():
    found = list(rows())
    if os.environ.get("LORAKIT_WRITE"):
        with open(TABLE, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [["case", "part", "place", "launch", "times"], *found]
            )
    with open(TABLE, newline="", encoding="utf-8") as file:
        _, *expected = csv.reader(file)
    assert found == expected


@pytest.mark.parametrize("documents", [0, 1, 12, 100])
def test_launches_do_not_depend_on_the_number_of_documents(documents):
    layer, whole = of_a_layer(documents=documents), step(2, documents)
    launches = [sum(part.values()) for part in (*layer[:2], *whole[:3])]
    assert launches[0] + launches[1] <= MOST_OF_A_LAYER
    outside = launches[2] + launches[3] - 2 * (launches[0] + launches[1])
    assert outside <= MOST_OUTSIDE
    assert launches[4] <= MOST_OF_ADAMW


@pytest.mark.parametrize("documents", [0, 12])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("float8", [False, True])
def test_the_host_waits_for_nothing(documents, checkpointing, micro_batches, float8):
    """Loss, backward and optimizer go on; a run reads loss and norm once a step (run.py)."""
    options = {"checkpointing": checkpointing, "micro_batches": micro_batches}
    gpu = step(2, documents, float8=float8, **options).gpu
    assert gpu.waits == []
    assert [copy for copy in gpu.copies if copy.blocking] == []
