"""What a training step asks of a GPU: launches, waits and copies, counted without one.

launches.csv says how many launches each part of a step of an 8B Llama takes, by what launches them.
It is made again by LORAKIT_WRITE=1 pytest tests/training/test_launches.py.
"""

import csv
import os
from array import array
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import lorakit as lk
from lorakit.data.encode import Example
from lorakit.models.decoder import Decoder
from lorakit.training import run as training_run
from lorakit.training.device_step import optimizer_step
from lorakit.training.float8 import start_float8
from lorakit.training.gradients import SUMS
from lorakit.training.late import Late
from lorakit.training.ranks import Ranks
from lorakit.training.trainable import TrainedAdapter

pytest.importorskip("triton")
from tests.meta_gpu import MetaGPU

TABLE = Path(__file__).with_name("launches.csv")
TOKENS = 2048
# the most launches of a layer, outside the layers, and of clipping and AdamW
MOST_OF_A_LAYER, MOST_OUTSIDE, MOST_OF_ADAMW = 61, 34, 3
# linear attention of Qwen 3.5 4B; one layer of a model has keys, or it is refused
HEADS = {
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}  # fmt: skip


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
    linear: bool = False,
):
    """One step of rows packed with so many documents; 0: of one dense row."""
    bounds = None
    if documents:
        bounds = torch.linspace(0, TOKENS, documents + 1).to(torch.int32)
    with MetaGPU() as gpu:
        fields = {"linear_layers": [True] * (layers - 1) + [False], **HEADS} if linear else {}
        model = gpu.decoder(layers, **fields)
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
            statistics = torch.zeros(SUMS - 1, device="meta")
            loss, count = model.loss(ids, labels, cu_seqlens=bounds, statistics=statistics)
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
    "linear attention, 12 documents": {"documents": 12, "linear": True},
}


def rows():
    """The rows of the table; what is outside of layers of two kinds, a model of one kind says."""
    for case, options in CASES.items():
        layer, whole = of_a_layer(**options), step(2, **options)
        places = ["a layer"] if options.get("linear") else ["a layer", "outside the layers"]
        for part in ("forward", "backward"):
            each, all_ = getattr(layer, part), getattr(whole, part)
            outside = all_ - Counter({name: 2 * n for name, n in each.items()})
            for place, found in zip(places, (each, outside), strict=False):
                for name, n in sorted(found.items()):
                    yield [case, part, place, name, str(n)]
        for name, n in sorted(whole.optimizer.items()) if len(places) > 1 else ():
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


def test_linear_attention_asks_the_host_for_nothing():
    """Nor does the number of documents change its launches, but for parts of a backward pass: so
    many heads at a time as their states have room.
    """
    few, many = (step(2, documents, linear=True) for documents in (3, 100))
    assert few.forward == many.forward
    assert set(few.backward) == set(many.backward)
    assert many.gpu.waits == []
    assert [copy for copy in many.gpu.copies if copy.blocking] == []


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


class Rows(list):
    """Rows of two lengths, as a run takes its examples."""

    lengths = array("q", [100, 300] * 8)

    def __init__(self):
        super().__init__(Example([1] * n, [-100] * 9 + [1] * (n - 9)) for n in self.lengths)

    def place(self, i):
        return f"row {i}"


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_run_waits_for_a_step_when_it_has_issued_the_next(
    tmp_path, monkeypatch, packing, accumulate
):
    """And for nothing else: all that a run does between two evaluations or checkpoints."""
    monkeypatch.setattr(training_run, "must_match", lambda *_: {})  # it reads the frozen weights
    read, tokens = [], SimpleNamespace(has_new_tokens=False, source=None)
    told = [1.0, 1.0, -1.0, 9.0, *[0.0] * (SUMS - 1)]
    monkeypatch.setattr(Late, "read", lambda self: read.append(issued[-1]) or told)
    issued, real = [], training_run.backward

    def backward(model, step, *rest):
        issued.append(step.number)
        return real(model, step, *rest)

    monkeypatch.setattr(training_run, "backward", backward)
    config = lk.TrainConfig(
        str(tmp_path), max_steps=9, packing=packing, gradient_accumulation_steps=accumulate,
        max_seq_length=400, per_device_train_batch_size=2, loraplus_lr_ratio=16.0,
    )  # fmt: skip
    with MetaGPU() as gpu:
        part = TrainedAdapter(gpu.decoder(2))
        run = training_run.Run(part, tokens, Rows(), None, config, None, Ranks(), {})
        with run.open_log() as log:
            run._step(log)
            gpu.clear()
            for _ in range(2):
                run.optimizer.zero_grad()
                run._step(log)
    assert read == [2, 3]
    assert gpu.waits == []
    assert [copy for copy in gpu.copies if copy.blocking] == []
    back = [copy.shape for copy in gpu.copies if copy.way == "to the host"]
    assert back == [(2 + accumulate + SUMS,)] * 2
    launched = Counter(launch.name for launch in gpu.launches if "adamw" in launch.name)
    assert launched == {"adamw/_squares": 2, "adamw/_decide": 2, "adamw/_update": 2}


# ---- mixtures of experts ------------------------------------------------------------------------


def step_of_experts(
    experts: int, *, targets="all-linear", checkpointing: bool = False, **fields
) -> Step:
    """One step of a packed row through two layers of Qwen3-30B-A3B, with so many experts."""
    sizes = {"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    config = lk.ModelConfig(
        "qwen3_moe", 1000, 2048, 6144, 2, 32, 4, 128, qk_norm="head", norm_topk_prob=True,
        moe_layers=(True, True), **sizes, **fields,
    )  # fmt: skip
    with MetaGPU() as gpu:
        with torch.device("meta"):
            model = Decoder(config)
        model = lk.quantize(model.to(torch.bfloat16).requires_grad_(False))
        model = lk.attach(model, lk.LoraConfig(r=8, target_modules=targets)).train()
        model.gradient_checkpointing = checkpointing
        ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
        labels = torch.zeros(1, TOKENS, dtype=torch.int64)
        gpu.clear()
        loss, count = model.loss(ids, labels, cu_seqlens=torch.tensor([0, 700, TOKENS]))
        forward = Counter(each.name for each in gpu.launches)
        gpu.launches.clear()
        (loss / count).backward()
        return Step(forward, Counter(each.name for each in gpu.launches), Counter(), gpu)


def few_and_many(**options) -> list[Step]:
    """Steps of 8 and of 64 experts; the first of each makes tables, which are kept."""
    return [step_of_experts(n, **options) for n in (8, 64, 8, 64)][2:]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "attention"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_launches_do_not_depend_on_the_number_of_experts(targets, checkpointing):
    """And the host asks the device for nothing: not how many tokens an expert has either."""
    few, many = few_and_many(targets=targets, checkpointing=checkpointing)
    assert few[:2] == many[:2]
    assert many.gpu.waits == []
    assert [copy for copy in many.gpu.copies if copy.blocking] == []
    assert few.forward["experts/_summed"] == 2


def test_experts_with_biases_run_together():
    """They are those of gpt-oss."""
    fields = {"mlp_bias": True, "hidden_act": "swiglu_oai"}
    few, many = few_and_many(**fields)
    assert few[:2] == many[:2]
    assert many.gpu.waits == []
    assert few.forward["experts/_summed"] == 2
