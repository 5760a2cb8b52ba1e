"""The MLP under gradient checkpointing: left out of a block's second run, long rows in tiles."""

from dataclasses import replace

import pytest
import torch

from lorakit import kernels
from lorakit.kernels.ops.lora_linear import passes
from lorakit.models.recompute import run_recomputed
from tests.kernels.test_lora_linear import NF4, layer, leaves, qlora_mlp, saved_bytes


def found_by(x, layers, **how):
    """The output and all gradients."""
    torch.manual_seed(7)
    y = kernels.lora_mlp(x, *layers, "silu", **how)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *leaves(*layers)])]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_one_tile_has_the_same_bits(dtype, dropout):
    layers = [replace(each, dropout=dropout) for each in qlora_mlp(4, 64, 192)]
    x = torch.randn(72, 64, dtype=dtype).requires_grad_()
    plain, tiled = (found_by(x, layers, recomputed=again) for again in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, tiled, strict=True))


@pytest.mark.parametrize("rows", [64, 65, 129, 200])
def test_tiles_give_what_all_rows_at_once_give(rows, monkeypatch):
    """Another order of the sums over rows moves fp64 by 1e-12 of the largest at most."""
    monkeypatch.setattr(passes, "TILE", 64)
    gate, up = (layer(7, 9, r=2 + i, bias=True, dora=i == 1) for i in range(2))
    layers = [gate, up, layer(9, 7, dora=True)]
    x = torch.randn(rows, 7, dtype=torch.float64, requires_grad=True)
    plain, tiled = (found_by(x, layers, recomputed=again) for again in (False, True))
    for a, b in zip(plain, tiled, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-12 * a.abs().max()


def test_masks_of_tiles_differ_and_come_again_in_backward(monkeypatch):
    """Finite differences for one seed; and rows of equal values get other masks in each tile."""
    monkeypatch.setattr(passes, "TILE", 3)
    layers = [layer(5, 4, dropout=0.5), layer(5, 4, dropout=0.5), layer(4, 5, dropout=0.5)]

    def call(x, *_):
        torch.manual_seed(3)
        return kernels.lora_mlp(x, *layers, "silu", recomputed=True)

    x = torch.randn(3, 5, dtype=torch.float64).repeat(2, 1).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *leaves(*layers)))
    first, second = call(x).chunk(2)
    assert not torch.equal(first, second)


class Watched(NF4):
    """Counts how often its weight is asked for."""

    asked = 0

    @property
    def stored(self):
        type(self).asked += 1
        return self.q


@pytest.mark.parametrize("frozen_input", [True, False])
def test_a_second_run_leaves_the_mlp_out(frozen_input):
    """Forward and backward ask for the weights, as without checkpointing; nothing between does."""
    layers = [replace(e, base=Watched(torch.randn(e.lora_B.shape[0], e.lora_A.shape[1])))
              for e in qlora_mlp(4, 64, 192)]  # fmt: skip
    x = torch.randn(72, 64, requires_grad=not frozen_input)

    def mlp(x):
        return kernels.lora_mlp(x, *layers, "silu", recomputed=True)

    asked = []
    for run in (mlp, lambda x: run_recomputed(mlp, x)):
        Watched.asked = 0
        run(x).sum().backward()
        asked.append(Watched.asked)
    assert asked[0] == asked[1] > 0


def test_no_gate_and_no_up_beyond_a_tile(monkeypatch):
    """What a tile makes is the largest memory: four times the rows take x, y and dx more alone."""
    monkeypatch.setattr(passes, "TILE", 64)
    layers, largest = qlora_mlp(4, 64, 1024), []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest[-1] = max(largest[-1], t.untyped_storage().nbytes())
            return out

    for rows in (64, 256):
        largest.append(0)
        with Largest():
            x = torch.randn(rows, 64, requires_grad=True)
            kernels.lora_mlp(x, *layers, "silu", recomputed=True).sum().backward()
    # gate and up of a tile side by side are 64 x 2048 values; x of 256 rows an eighth of that
    assert largest[0] == largest[1] >= 64 * 1024 * 4


def test_what_is_kept_is_x_and_the_small_tensors():
    layers = qlora_mlp(4, 64, 192)
    x = torch.randn(72, 64, dtype=torch.bfloat16).requires_grad_()
    kept, _ = saved_bytes(lambda: kernels.lora_mlp(x, *layers, "silu", recomputed=True, keep=True))
    small = sum(t.numel() * t.element_size() for t in leaves(*layers))
    assert kept == x.numel() * 2 + small
