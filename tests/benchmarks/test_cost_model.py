"""The cost model of a step on a GPU: its launches are those of the code, and its figures add up."""

import dataclasses
import importlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import lorakit as lk
from lorakit.training.device_step import optimizer_step
from tests.meta_gpu import MetaGPU

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
B = 2  # bytes of bf16


@pytest.fixture(scope="module")
def model():
    """benchmarks/cost_model.py, beside whose files it imports others by name."""
    loaded = []
    for name in ("cases", "shapes", "sides", "steps", "cost_model"):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        loaded.append(name)
        spec.loader.exec_module(module)
    yield module
    for name in loaded:
        del sys.modules[name]


@pytest.fixture(scope="module")
def job_of(model):
    """job_of(tokens, kind, **fields): of 2 layers of an 8B Llama."""

    def make(tokens, kind="dense", **fields):
        rows = model.make_rows(kind, tokens, 128256)
        return model.Job(model.LLAMA_8B, 2, rows, **fields)

    return make


@pytest.fixture(scope="module")
def costs_of(model, job_of):
    """costs_of(tokens, kind, **fields): the launches, which are found once."""
    found = {}

    def find(*arguments, **fields):
        key = arguments, tuple(fields.items())
        if key not in found:
            found[key] = model.costs(job_of(*arguments, **fields))
        return found[key]

    return find


def kinds(costs):
    return Counter(cost.kind for cost in costs)


def named(costs, name):
    return [cost for cost in costs if cost.name == name]


# ---- the list -----------------------------------------------------------------------------------


def test_the_launches_are_those_of_the_code(costs_of):
    """Names, order and lines, as a MetaGPU alone notes them for a model made another way."""
    with MetaGPU() as gpu:
        model = gpu.decoder(2)
        labels = torch.zeros(1, 1024, dtype=torch.int64)
        ids = labels.to("meta")
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = lk.optim.AdamW(params)
        update = optimizer_step(optimizer, params, [[1e-3]], 1.0)
        for _ in range(2):  # the first makes tables
            gpu.clear()
            loss, count = model.loss(ids, labels)
            loss = loss / count
            loss.backward()
            update(loss.detach().view(1))
            optimizer.zero_grad(set_to_none=True)
    found = [(cost.name, cost.where) for cost in costs_of(1024)]
    assert found == [tuple(launch) for launch in gpu.launches]


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_parts_come_in_their_order(costs_of, kind):
    parts = [cost.part for cost in costs_of(1024, kind)]
    assert parts == sorted(parts, key=["forward", "backward", "optimizer"].index)
    assert set(parts) == {"forward", "backward", "optimizer"}


def test_a_kernel_without_a_kind_is_an_error(model, monkeypatch, job_of):
    monkeypatch.delitem(model.KIND_OF, "rope")
    with pytest.raises(LookupError, match="the kernel rope/_rotate has no kind; KIND_OF needs one"):
        model.costs(job_of(32))


# ---- operations and bytes -----------------------------------------------------------------------


def test_operations_of_frozen_products(costs_of, job_of):
    """Each weight once forward and once backward, but for the first layer's q, k and v, whose input
    needs no gradient; gate and up once more in a layer that does not keep them.
    """
    T, job = 1024, job_of(1024)
    q, k, v, _, gate, up, _ = (N * K for N, K in job.matrices)
    expected = 2 * T * (2 * 2 * sum(N * K for N, K in job.matrices) - q - k - v)
    for kept_layers in (2, 1, 0):
        found = [
            cost.operations
            for cost in costs_of(1024, kept_layers=kept_layers)
            if cost.kind == "frozen products"
        ]
        again = 2 * T * (2 - kept_layers) * (gate + up)
        # a design that takes the update along has some columns more
        assert expected + again <= sum(found) <= 1.02 * (expected + again)


def test_operations_of_the_head(costs_of, job_of):
    """Two products of the label rows alone."""
    for kind in ("dense", "packed"):
        labels = job_of(1024, kind).labels
        found = [c for c in costs_of(1024, kind) if c.kind == "head" and c.operations]
        assert sum(c.operations for c in found) == pytest.approx(
            4 * labels * 4096 * 128256, rel=0.3
        )  # a bucket of rows may be larger than the labels


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_operations_of_attention(costs_of, job_of, kind):
    """The half of the scores that is seen takes two products forward, five or seven backward."""
    scores = sum(len(ids) ** 2 for ids, _ in job_of(1024, kind).rows) * 4096 * 2
    found = [cost for cost in costs_of(1024, kind) if cost.kind == "attention"]
    forward = sum(c.operations for c in found if c.part == "forward")
    backward = sum(c.operations for c in found if c.part == "backward")
    assert forward == 2 * scores
    assert backward in (5 * scores, 7 * scores)


def test_bytes_of_kernels(costs_of):
    """Each tensor once, as docs/kernels.md has it; in place they are read and written."""
    T, H, inner, costs = 1024, 4096, 14336, costs_of(1024)
    n, fp32 = B * T * H, 4 * T
    moved = sorted(c.moved for c in named(costs, "rms_norm/_forward"))
    small = B * H + fp32  # the weight, and one number per row
    assert moved[0] == 2 * n + small
    assert moved[-1] == 4 * n + small
    assert {c.moved for c in named(costs, "swiglu/_forward")} == {3 * B * T * inner}
    assert {c.moved for c in named(costs, "swiglu/_added_backward")} == {6 * B * T * inner}
    trained = 16 * 2 * (4 * 4096 + 2 * 1024 + 2 * 4096 + 3 * 14336 + 3 * 4096)
    for name, each in (("_squares", 4), ("_decide", 0), ("_update", 28)):
        [adamw] = named(costs, f"adamw/{name}")
        assert adamw.moved == each * trained


def products_of_a_chunk(C, H, dk, dv):
    """The products [M, K, N] of a chunk of C tokens and a head of values, by kernel.

    A^-1 is made by two blocks of H rows, each row by row, in a product's place; see
    kernels/ops/delta_net/__init__.py and triton.py.
    """
    forward = [(C, dk, dv), (C, C, dv), (C, dk, dv), (C, C, dv), (dk, C, dv)]  # kS, Xr, qS, mn, k'n
    again = [forward[0], forward[1], forward[4]]
    local = [(H, dk, H)] * 3 + [(C, dk, C)] + [(H, H, H)] * 4
    back = [(C, C, dv), (C, dk, dv), (C, C, dv), (dk, C, dv), (dk, C, dv)]
    slopes = [(C, dk, C)] * 2 + [(C, dk, dv)] * 3 + [(C, dv, C)] * 2
    gradients = [(C, dv, dk)] * 3 + [(C, C, dk)] * 3
    return {
        "forward": [*local, *forward],
        "backward": [*local, *again, *back, *slopes, *gradients],
    }


def test_operations_of_linear_attention(model):
    """The model's width has nothing to do with them."""
    kernels = importlib.import_module("lorakit.kernels.ops.delta_net.triton")
    assert model.CHUNK == kernels.C
    names = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    dims = {"linear_key_head_dim": 64, "linear_value_head_dim": 128}
    sizes = model.LLAMA_8B._replace(hidden=256, inner=512, heads=2, vocabularies=(1000,))
    config = lk.ModelConfig(
        "llama", 1000, 256, 512, 2, 2, 1, 128, linear_layers=[True, False], **names, **dims
    )
    job = model.Job(sizes, 2, model.make_rows("dense", 256, 1000), config=config)
    found = [c for c in model.costs(job) if c.kind == "linear attention"]
    expected = products_of_a_chunk(32, 16, 64, 128)
    for part, products in expected.items():
        each = sum(2 * M * K * N for M, K, N in products)
        operations = sum(c.operations for c in found if c.part == part)
        assert operations == 256 // 32 * 4 * each
    x = 256 * (2 * 2 * 64 + 4 * 128) * B
    [convolution] = [c for c in named(found, "causal_conv/_forward") if c.part == "forward"]
    assert 2 * x < convolution.moved < 2.1 * x  # read and written, beside weights and a table


def test_bytes_of_tensors(model):
    x = torch.empty(6, 4, dtype=torch.bfloat16, device="meta")
    assert model.size(x) == 48
    assert model.size(x[:1].expand(6, 4)) == 8
    assert model.size(x[:, :1].expand(6, 4)) == 12
    assert model.size(torch.empty((), device="meta")) == 4


# ---- the prediction -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("name", ["H100", "H200", "RTX 4090"])
def test_the_floor_is_below_the_prediction(model, job_of, costs_of, kind, name):
    """What a launch costs, and what is read again, lies between the two."""
    gpu = model.GPUS[name]
    for tokens in (1024, 2048):
        floor = model.floor_ms(job_of(tokens, kind), gpu)
        assert 0 < floor < model.busy_ms(costs_of(tokens, kind), gpu) < 3 * floor


def test_more_work_takes_longer(model, job_of, costs_of):
    def busy(*arguments, **fields):
        return model.busy_ms(costs_of(*arguments, **fields), model.H100)

    assert busy(512) < busy(1024) < busy(2048)
    assert busy(512, "packed") < busy(1024, "packed") < busy(2048, "packed")
    assert busy(1024, "packed") < busy(1024)  # fewer labels, and none sees another document
    assert busy(1024) < busy(1024, checkpointing=True)
    assert busy(1024) < busy(1024, kept_layers=1) < busy(1024, kept_layers=0)


def test_the_prediction_beside_a_measurement(model):
    """The H100 of gpu.md worked 25.5 ms for 2,048 tokens, and 113.2 with all that surrounds 8,192
    (docs/dev/LOG.md). What came since may only be faster; nothing can pass the floor.
    """
    for tokens, measured, floor in ((2048, 25.5, 18.7), (8192, 113.2, 81.7)):
        job = model.Job(model.LLAMA_8B, 4, model.make_rows("dense", tokens, 128256))
        found = model.busy_ms(model.costs(job), model.H100)
        assert model.floor_ms(job, model.H100) == pytest.approx(floor, abs=0.1)
        assert floor < found < 1.02 * measured


def test_seconds_of_a_launch(model):
    """The longer one of arithmetic and memory, and a fixed part."""
    gpu = dataclasses.replace(model.H100, product=1e12, copy=1e9)
    cost = model.Cost("forward", "frozen products", "mm", "", 5e9, 2e6, "", 64, "product")
    assert cost.seconds(gpu) == pytest.approx(5e-3 + model.FIXED)
    assert cost._replace(moved=9e6).seconds(gpu) == pytest.approx(9e-3 + model.FIXED)
    thin = cost._replace(moved=9e6, thin=True)
    assert thin.seconds(gpu) == pytest.approx(12e-3 + model.FIXED)
    rates = dataclasses.replace(gpu, attention={"flash_forward": (1e12, 2e12, 4e12, 5e12)})
    attends = cost._replace(rate="flash_forward", moved=0.0)
    for tokens, rate in ((60, 1e12), (2048, 1e12), (4096, 2e12), (2**12.5, 3e12), (99999, 5e12)):
        found = attends._replace(tokens=tokens).seconds(rates)
        assert found == pytest.approx(5e9 / rate + model.FIXED)


def test_rates_of_attention_are_those_of_the_code(model):
    """Triton is the faster one of the two from where the code takes it."""
    flash = importlib.import_module("lorakit.kernels.ops.attention.flash")

    def seconds(name, tokens, products):
        return sum(n / model.H100.rate(f"{name}_{part}", tokens) for part, n in products.items())

    for tokens in model.MEASURED_AT:
        theirs = seconds("flash", tokens, {"forward": 2, "backward": 5})
        ours = seconds("triton", tokens, {"forward": 2, "backward": 7})
        assert (ours < theirs) == (tokens >= flash.LONG)


@pytest.mark.parametrize(("tokens", "by_flash"), [(2048, True), (4096, False)])
def test_which_attention_a_dense_row_takes(costs_of, tokens, by_flash):
    names = {cost.name for cost in costs_of(tokens) if cost.kind == "attention"}
    assert ("_scaled_dot_product_flash_attention" in names) == by_flash
    assert ("attention/_dkv" in names) != by_flash


@pytest.mark.parametrize("tokens", [2048, 4096])
def test_a_forward_pass_that_runs_again_has_the_rate_of_one(costs_of, tokens):
    """It does under checkpointing, in the backward pass."""
    found = [
        (cost.part, cost.rate.partition("_")[2])
        for cost in costs_of(tokens, checkpointing=True)
        if cost.kind == "attention" and cost.operations
    ]
    assert ("backward", "forward") in found
    assert ("forward", "backward") not in found


def test_as_a_program(model, monkeypatch, capsys):
    arguments = ["--gpu", "RTX 4090", "--tokens", "60", "--documents", "3", "--labels", "0.5"]
    small = ["--layers", "1", "--hidden", "64", "--inner", "96", "--heads", "2", "--kv-heads", "1"]
    small += ["--head-dim", "32", "--vocab", "300"]
    monkeypatch.setattr(sys, "argv", ["cost_model.py", *arguments, *small])
    model.main()
    lines = capsys.readouterr().out.splitlines()
    assert "RTX 4090: 60 tokens, 30 labels, 3 documents, 1 layers of 64 and 96" in lines[1]
    rows = [line.split() for line in lines[4:]]
    [total] = [row for row in rows if row[:2] == ["in", "all"]]
    assert int(total[2]) == sum(int(row[-4]) for row in rows[: rows.index(total)])
    monkeypatch.setattr(sys, "argv", ["cost_model.py", *arguments, *small, "--launches"])
    model.main()
    assert len(capsys.readouterr().out.splitlines()) == int(total[2]) + 3
