"""The two kinds of step against each other: DeviceStep by the reference and by Triton, HostStep."""

import math

import pytest
import torch

import lorakit as lk
from lorakit.training.device_step import DeviceStep, HostStep, optimizer_step, read
from tests.triton_budget import random
from tests.triton_interpreter import DEVICE, on_triton

SHAPES = [(16, 300), (40,), (5000,), (), (33, 7)]
RATES = [[1e-2 / (i + 1), 16e-2 / (i + 1)] for i in range(8)]


def made(kind, bits=32, before=None, first=0):
    """A step of two groups, which goes on where another is."""
    params = [torch.nn.Parameter(random(i, *shape)) for i, shape in enumerate(SHAPES)]
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = lk.optim.AdamW(groups, state_bits=bits)
    if before is not None:
        for p, old in zip(params, before.params, strict=True):
            p.data.copy_(old)
        optimizer.load_state_dict(before.optimizer.state_dict())
    return kind(optimizer, params, RATES[first:], 1.0)


def go(step, steps, bad=()):
    told = []
    for i in steps:
        for j, p in enumerate(step.params):
            p.grad = random(100 * i + j, *p.shape, scale=1e-3 if i == 2 else 1.0)
            if i in bad and j == 2:
                p.grad[17] = math.nan
        told.append(read(step(torch.tensor([float(i), 2.0], device=DEVICE)).tolist()))
    return told


def state_of(step):
    saved = step.optimizer.state_dict()
    tensors = [*step.params, *(t for each in saved["state"].values() for t in each.values())]
    return tensors, [(group["step"], group["lr"]) for group in saved["param_groups"]]


def same(one, other, **tolerance):
    (tensors, groups), (others, other_groups) = state_of(one), state_of(other)
    assert groups == other_groups
    for a, b in zip(tensors, others, strict=True):
        equal = torch.allclose(a.float(), b.float(), **tolerance) if tolerance else a.equal(b)
        assert equal


@pytest.mark.parametrize("bits", [32, 8])
def test_the_reference_has_the_bits_of_the_host(bits):
    """Decay, two rates, a schedule, clipped or not, and a step that is not finite."""
    steps = [made(kind, bits) for kind in (DeviceStep, HostStep)]
    with lk.kernels.use_backend("reference"):
        device, host = (go(step, range(6), bad=(1, 4)) for step in steps)
    assert str(device) == str(host)  # of NaN too
    assert [each.first for each in host] == [-1, 2, -1, -1, 2, -1]
    same(*steps)
    assert state_of(steps[0])[1] == [(4, rate) for rate in RATES[5]]


@pytest.mark.parametrize("bits", [32, 8])
def test_the_host_has_the_bits_of_torchs_clipping(bits):
    step, plain = made(HostStep, bits), made(HostStep, bits)
    for i in range(4):
        [told] = go(step, [i])
        for j, p in enumerate(plain.params):
            p.grad = random(100 * i + j, *p.shape, scale=1e-3 if i == 2 else 1.0)
        groups = plain.optimizer.param_groups
        for group, rate in zip(groups, RATES[i], strict=True):
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        plain.optimizer.step()
        assert told.norm == norm.item()
    same(step, plain)


@pytest.mark.filterwarnings("ignore:.*encountered")  # numpy's
@pytest.mark.parametrize("bits", [32, 8])
def test_the_kernels_beside_the_host(bits):
    steps = [made(kind, bits) for kind in (DeviceStep, HostStep)]
    with on_triton():
        device = go(steps[0], range(4), bad=(1,))
    with lk.kernels.use_backend("reference"):
        host = go(steps[1], range(4), bad=(1,))
    for a, b in zip(device, host, strict=True):
        assert a[1:] == b[1:]
        # both are sums of fp32 in some order
        assert a.norm == pytest.approx(b.norm, rel=1e-6, nan_ok=True)
    for p, q in zip(steps[0].params, steps[1].params, strict=True):
        # four steps of 0.16 of a few roundings; in 8 bits a code may be the neighbour
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-5 if bits == 32 else 5e-2)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_it_goes_on_from_a_state_dict(bits, backend):
    with on_triton(), lk.kernels.use_backend(backend):
        whole = made(DeviceStep, bits)
        go(whole, range(5), bad=(1,))
        half = made(DeviceStep, bits)
        go(half, range(3), bad=(1,))
        rest = made(DeviceStep, bits, before=half, first=3)
        go(rest, range(3, 5))
        same(whole, rest)


def test_gradients_are_clipped_for_who_reads_them():
    steps = [made(kind) for kind in (DeviceStep, HostStep)]
    with lk.kernels.use_backend("reference"):
        for step in steps:
            go(step, [0])
            step.clip()
    for p, q in zip(steps[0].params, steps[1].params, strict=True):
        assert torch.equal(p.grad, q.grad)
    norm = torch.cat([p.grad.flatten() for p in steps[0].params]).norm()
    assert norm.item() == pytest.approx(1, rel=1e-5)
    with lk.kernels.use_backend("reference"):
        for step in steps:
            go(step, [1], bad=(1,))
            step.clip()  # of a step that was skipped: as they are
            assert torch.equal(step.params[0].grad, random(100, *SHAPES[0]))


def test_which_kind_of_step_an_optimizer_gets(tmp_path):
    p = torch.nn.Parameter(torch.ones(5))

    def kind(**options):
        return type(optimizer_step(lk.optim.AdamW([p], **options), [p], [[1.0]], 1.0))

    with lk.kernels.use_backend("cpu"):
        assert kind() is HostStep
    with lk.kernels.use_backend("reference"):
        assert kind() is DeviceStep
        assert kind(paged=True, page_dir=tmp_path) is HostStep
    with on_triton():
        assert kind() is DeviceStep


def test_a_parameter_without_a_gradient_waits():
    """An expert of a mixture that no token has chosen."""
    step = made(DeviceStep)
    with lk.kernels.use_backend("reference"):
        go(step, range(2))
        before = [p.detach().clone() for p in step.params]
        step.params[1].grad = None
        step(torch.ones(1, device=DEVICE))
    moved = [not torch.equal(p, old) for p, old in zip(step.params, before, strict=True)]
    assert moved == [True, False, True, True, True]
