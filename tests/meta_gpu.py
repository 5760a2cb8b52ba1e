"""The GPU path of lorakit without a GPU: nothing is computed, and every launch is noted.

    with MetaGPU() as gpu:
        model = gpu.decoder(layers=4)
        loss, count = model.loss(ids, ids)      # ids on the meta device
    gpu.launches    in order, as "rms_norm/_forward" for a Triton kernel, "mm" for an op of torch's
    gpu.waits       where the host would wait for the device, or a shape depends on its data
    gpu.copies      what is copied between host and device, and whether the host waits for it

The decoder's own Python runs, with autograd and the choice of backends as on a GPU, on tensors of
the meta device, which have shapes and no values, and which lorakit takes for those of a GPU
(kernels/pretend.py).

Views, metadata and allocations launch nothing and are not noted. A product counts as one launch,
though cuBLAS may cut it in two. Torch's FlashAttention counts as 1 launch forward and
FLASH_BACKWARD backward.
(FakeTensorMode with "cuda" cannot do this on a CPU build of torch: AccumulateGrad asks for a device
guard, which ends the process.)
"""

import contextlib
import importlib
import traceback
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import lorakit as lk
from lorakit.kernels.pretend import pretend_gpu
from lorakit.models.decoder import Decoder

FLASH = "_scaled_dot_product_flash_attention"
# Launches of its backward: dq zeroed, delta, the gradients, dq cast, dk and dv summed over the
# heads of a group (mha_bwd in torch's flash_api.cpp).
FLASH_BACKWARD = 6
NO_LAUNCH = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand",
    "slice", "select", "split", "split_with_sizes", "unsqueeze", "squeeze", "alias", "detach",
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "as_strided",
    "unbind", "chunk", "lift", "lift_fresh", "resize_", "is_same_size",
}  # fmt: skip
WAITS = {
    "_local_scalar_dense", "is_nonzero", "equal", "masked_select", "unique", "_unique2", "bincount",
    "nonzero",
}  # fmt: skip

for folder in lk.kernels.__path__:
    for file in Path(folder).glob("ops/*/triton.py"):
        importlib.import_module(f"lorakit.kernels.ops.{file.parent.name}.triton")
adamw = importlib.import_module("lorakit.kernels.ops.adamw.triton")
lists = importlib.import_module("lorakit.kernels.ops.adamw.lists")


class Launch(NamedTuple):
    """One launch, and the line of lorakit that asked for it; "" in torch's own backward."""

    name: str
    where: str


class Copy(NamedTuple):
    """A copy between host and device."""

    way: str
    blocking: bool
    shape: tuple[int, ...]
    where: str


def _where() -> str:
    for frame in reversed(traceback.extract_stack()):
        for room in ("/lorakit/", "/kernels/"):
            if room in frame.filename and "site-packages/torch" not in frame.filename:
                return f"{frame.filename.rsplit(room, 1)[1]}:{frame.lineno} {frame.name}"
    return ""


class _Notes(TorchDispatchMode):
    def __init__(self, gpu: "MetaGPU"):
        super().__init__()
        self.gpu = gpu

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch calls ten functions of its own around each operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, gpu = kwargs or {}, self.gpu
        name = func._schema.name.split("::")[1]
        given = _tensors((args, kwargs))
        if name in WAITS and any(t.is_meta for t in given):
            gpu.waits.append(Launch(name, _where()))
        # torch 2.13 fails on beta, on the meta device; 2.11 in the first of them too
        if func in (torch.ops.aten.addmm.dtype, torch.ops.aten.baddbmm.dtype):
            out = torch.empty_like(args[0])
        elif func is torch.ops.aten._scaled_mm.out:  # nor has that one any
            out = kwargs["out"]
        elif name == "copy_" and args[1].is_meta and not args[0].is_meta:
            out = args[0]  # to the host: there is nothing to copy
        else:
            out = func(*args, **kwargs)
        made = _tensors(out)
        devices = {t.device.type for t in given + made}
        if devices == {"cpu", "meta"}:
            self._note_copy(name, args, kwargs, given, made)
        if "meta" in devices and name not in NO_LAUNCH and any(t.numel() for t in made):
            times = FLASH_BACKWARD if name == f"{FLASH}_backward" else 1
            gpu.launches += [Launch(name, _where())] * times
        return out

    def _note_copy(self, name, args, kwargs, given, made) -> None:
        copies = self.gpu.copies
        if name in ("_to_copy", "copy_") and made:
            way = "to the device" if made[0].is_meta else "to the host"
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            copies.append(Copy(way, waits, tuple(made[0].shape), _where()))
        elif "index" in name and any(t.device.type == "cpu" and t.dim() for t in given):
            copies.append(Copy("to the device", True, (), _where()))


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]


class MetaGPU:
    """An H100, or another GPU, that computes nothing; see the module's docstring."""

    def __init__(self, capability: tuple[int, int] = (9, 0)):
        self.capability = capability
        self.launches: list[Launch] = []
        self.waits: list[Launch] = []
        self.copies: list[Copy] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "MetaGPU":
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            enter(pretend_gpu(self.capability, self.note))
            enter(mock.patch.object(fx_config, "meta_nonzero_assume_all_nonzero", True))
            enter(mock.patch.object(adamw, "work", self._work))
            enter(_Notes(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def clear(self) -> None:
        """Forget what was noted."""
        for notes in (self.launches, self.waits, self.copies):
            notes.clear()

    def decoder(
        self, layers: int, *, r: int = 16, lora_dropout: float = 0.0, vocab: int = 128256, **fields
    ) -> Decoder:
        """Return a QLoRA model with layers of an 8B Llama, ready to train."""
        config = lk.ModelConfig("llama", vocab, 4096, 14336, layers, 32, 8, 128, **fields)
        with torch.device("meta"):
            model = Decoder(config)
        model = lk.quantize(model.to(torch.bfloat16).requires_grad_(False))
        adapter = lk.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=lora_dropout)
        return lk.attach(model, adapter).train()

    def note(self, kernel, arguments) -> None:
        """Note a launch."""
        package = kernel.fn.__module__.split(".")[-2]
        self.launches.append(Launch(f"{package}/{kernel.fn.__name__}", _where()))

    def _work(self, groups, values, *, numbered=None, before=None) -> lists.Work:
        columns = len(groups[0]) + 1 + (numbered is not None)
        shape = len(groups), columns
        self.copies.append(Copy("to the device", False, shape, "adamw/lists.py work"))
        table = torch.empty(shape, dtype=torch.int64, device="meta")
        return lists.Work([], table, torch.empty(9, 2, dtype=torch.int64, device="meta"))
