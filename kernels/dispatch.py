"""Which implementation of an op runs, and where the compiled CPU kernels are.

The folder of an op holds its backends:

    reference   plain torch: any device, any dtype, differentiable
    cpu         cpu.cpp, one shared library with a plain C ABI, for tensors in host memory
    triton      triton.py, for tensors on a GPU; with TRITON_INTERPRET=1 in the environment, any

(Triton's own interpreter is wrong for bf16; tests/triton_interpreter.py corrects it.)

The op's public function asks `backend` or `pick` for the fastest one that fits the tensor's device.
`use_backend` forces one; to force one that is missing raises an error.

The library is optional. It holds each op once per instruction set (`lk_avx2_nf4_quantize`). The
best that the processor has is chosen at load time, or the one that `LORAKIT_ISA` names: scalar,
avx2, avx512, avx512bf16; scalar, neon. `LORAKIT_LIBRARY` names another build of it, such as the one
of `make test-asan`. A call by ctypes with declared argument types costs under a microsecond, and
the ops take tens: one wheel per platform is worth that.
"""

import ctypes
import functools
import importlib
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, overload

import torch

from . import pretend, processors
from .sources import check_sources

BACKENDS = ("reference", "cpu", "triton")
LIBRARY = {"darwin": "liblorakit_cpu.dylib"}.get(sys.platform, "liblorakit_cpu.so")

POINTER, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
CPU_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # -> the end of a C function's name
# the dtypes that weights and activations come in, by their names in config.json and in run files
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATS = tuple(DTYPES.values())

log = logging.getLogger("lorakit")
_forced: str | None = None  # for the whole process: backward runs in threads of torch's own


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` block on one backend, in all threads.

    An op that has no kernel for the backend runs its reference.

    Args:
        name: "reference", "cpu" or "triton".

    Yields:
        Nothing; the block runs with the backend forced.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is not installed; raised by an op, its tensor is on a device that
            the backend does not run on.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "cpu" and library() is None:
        raise RuntimeError(
            f"backend 'cpu' is not available: {LIBRARY} was not built at install time"
        )
    if name == "triton" and not has_triton():
        raise RuntimeError("backend 'triton' is not available: the package triton is not installed")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """Return the backend that `use_backend` forces now, or None."""
    return _forced


def pick(device: torch.device, *implemented: str) -> str:
    """Return the name of the backend for an op on tensors of `device`.

    The op has a reference, and the backends named in `implemented`.
    """
    kind = device.type
    if kind == "meta":
        kind = pretend.kind_of(device)
    if _forced is None:
        if kind == "cuda":
            return "triton" if "triton" in implemented and has_triton() else "reference"
        on_cpu = kind == "cpu" and "cpu" in implemented and library() is not None
        return "cpu" if on_cpu else "reference"
    if _forced not in implemented:  # the reference, or a backend that has no kernel for this op
        return "reference"
    fits = kind == "cuda" or _interprets() if _forced == "triton" else kind == _forced
    if not fits:
        raise RuntimeError(f"backend {_forced!r} is forced, but the tensor is on {device}")
    return _forced


def backend(
    package: str, device: torch.device, *, cpu: bool = True, triton: bool = True
) -> ModuleType:
    """Return the module of the op's folder `package` that runs on tensors of `device`.

    `cpu` and `triton` say whether the kernels of that backend take the operands. The reference
    takes what the picked one does not.
    """
    picked = pick(device, "cpu", "triton") if cpu or triton else "reference"
    if (picked == "cpu" and not cpu) or (picked == "triton" and not triton):
        picked = "reference"
    return _module(package, picked)


def traces() -> bool:
    """Return whether something records what is computed: torch.compile, export, fake tensors.

    An op then calls the operator of `traced` that has its name.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and _mode_records()


def _mode_records() -> bool:
    """Return whether one of torch's own tracing modes is on; others only look at what runs."""
    kinds, mode = torch._C._TorchDispatchModeKey, torch._C._get_dispatch_mode
    return mode(kinds.FAKE) is not None or mode(kinds.PROXY) is not None


def traced() -> ModuleType:
    """Return the ops as operators that can be traced; it is imported on first use."""
    from . import traced

    return traced


@functools.cache
def _module(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"{package}.{name}")


def triton_runs(x: torch.Tensor) -> bool:
    """Return whether an op that has a Triton kernel for fp32, bf16 and fp16 should run it on x."""
    return x.dtype in FLOATS and pick(x.device, "triton") == "triton"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a Triton kernel on the device of its first tensor, whichever is current.

    It is `kernel[grid](*arguments, **options)`, with fewer calls of Python in between.

    Args:
        kernel: the function, of `triton.jit`.
        grid: the number of programs along each axis.
        *arguments: the kernel's arguments; the first is a tensor.
        **options: its other arguments, and what Triton compiles it with, such as num_warps.

    Raises:
        TypeError: an argument is a DTensor.
    """
    if not _KNOWN.issuperset(map(type, arguments)):
        _check_arguments(arguments)
    device = arguments[0].device
    now = pretend.current() if device.type == "meta" else None
    if now is not None:
        if now.launched is not None:
            now.launched(kernel, arguments)
        return
    if device.type == "cuda" and _gpus() > 1 and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel.run(*arguments, grid=grid, warmup=False, **options)
    else:
        kernel.run(*arguments, grid=grid, warmup=False, **options)


# What kernels are launched with; only an argument of another type is looked at.
_KNOWN = frozenset({torch.Tensor, torch.nn.Parameter, int, float, bool, str, type(None)})


def _check_arguments(arguments: Sequence[Any]) -> None:
    """Raise TypeError if one of the arguments is a tensor without memory of its own."""
    for each in arguments:
        if isinstance(each, torch.Tensor):
            address(each)


@functools.cache
def _gpus() -> int:
    return torch.cuda.device_count()


def sent(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on `device`; from host memory it goes there without a wait of the host.

    From pageable memory the host would wait for all that the device has to do before.
    """
    if t.device.type == "cpu" and device.type == "cuda":
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


@functools.cache
def address_table(addresses: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the addresses of tensors on `device`, int64 [n], there.

    The caller keeps the tensors. The table of the same addresses is made once, so that a step finds
    the ones of the step before. It is kept for good, as a CUDA graph may read it: 4 KB for a layer
    of 128 packed experts.
    """
    return sent(torch.tensor(addresses, dtype=torch.int64, device="cpu"), device)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which products of matrices in x's dtype are computed.

    That is x's dtype, or fp32 on a processor that has no instructions for 16 bits. There torch's
    products in 16 bits are ten (x W^T) to fifty times (dy W) slower than those in fp32.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    on_cpu = pretend.kind_of(x.device) == "cpu" and _forced in (None, "cpu")
    return torch.float32 if half and on_cpu and not _multiplies_bf16() else x.dtype


def asks_onednn(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Return whether a product of x and w is better asked of oneDNN.

    It is in fp32 on AMD's processors with AVX-512. There torch asks MKL, which uses half of their
    vectors and takes 2.3 times as long. Under autocast torch's product is not in fp32.
    """
    fp32 = x.dtype == w.dtype == torch.float32 and pretend.kind_of(x.device) == "cpu" and len(x) > 0
    if not fp32 or _forced not in (None, "cpu") or pretend.autocasts(x.device):
        return False
    return mkl_is_slow()


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [M, K] w^T + bias [N] for w [N, K] of any strides: [M, N]. Not differentiable."""
    if not asks_onednn(x, w):
        return torch.nn.functional.linear(x, w, bias)
    n = len(x)
    filling = rounded_up(n, x.device) - n
    if filling:
        x = torch.nn.functional.pad(x, (0, 0, 0, filling))
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")[:n]


@functools.cache
def mkl_is_slow() -> bool:
    """Return whether MKL leaves a part of the processor's vectors unused, and oneDNN is there."""
    handle = library()
    usable = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return usable and handle is not None and bool(handle.lk_mkl_is_slow())


@functools.cache
def multiplies_tiles() -> bool:
    """Return whether the processor multiplies whole tiles of bf16 (AMX), which oneDNN uses."""
    handle = library()
    return handle is not None and bool(handle.lk_multiplies_tiles())


def multiplies_pairs() -> bool:
    """Return whether pairs of bf16 are the fastest way to multiply them that the kernels have."""
    handle = library()
    return handle is not None and isa() == "avx512bf16" and not handle.lk_pairs_are_slow()


@functools.cache
def _multiplies_bf16() -> bool:
    """Return whether the processor multiplies bf16; for others than x86 torch knows best."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported()


def rounded_up(rows: int, device: torch.device) -> int:
    """Return how many rows a product of `rows` should have; the others are filling.

    On a CPU oneDNN makes code for every size that it meets and keeps it: half a millisecond and
    some 0.7 MB for each product of a training step. There the number is one of eight sizes an
    octave, at most an eighth more; elsewhere it is `rows`.
    """
    if pretend.kind_of(device) != "cpu":
        return rows
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def compiles_to() -> str:
    """Return what a Triton kernel becomes: "ptx" (NVIDIA), "amdgcn" (AMD) or "interpreted"."""
    now = pretend.current()
    return "ptx" if now is not None and now.kind == "cuda" else _compiles_to()


@functools.cache
def _compiles_to() -> str:
    if _interprets():
        return "interpreted"
    return "ptx" if torch.version.hip is None else "amdgcn"


def lanes() -> int:
    """Return the threads of a warp: 64 on AMD's GPUs for data centres, else 32."""
    return 64 if compiles_to() == "amdgcn" else 32


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of NVIDIA's GPU `device`; an H100's in the interpreter."""
    now = pretend.current() if device.type == "meta" else None
    return _capability(device) if now is None else now.capability


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return pretend.H100 if device.type == "cpu" else torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors the GPU `device` has; an H100's in the interpreter."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _interprets() -> bool:
    """Return whether Triton interprets its kernels, by its own reading of the variable."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def has_triton() -> bool:
    """Return whether the package triton is installed; nothing is imported to find out."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the shared library of CPU kernels, or None where it was not built.

    The log says once that it is missing. With the library torch's threads are fitted to what the
    process may use.
    """
    named = os.environ.get("LORAKIT_LIBRARY")
    if named and not Path(named).exists():
        raise RuntimeError(f"LORAKIT_LIBRARY names {named}, where there is no file")
    folders = sys.modules[__package__].__path__  # two in an editable install
    for path in [Path(named)] if named else [Path(folder) / LIBRARY for folder in folders]:
        if path.exists():
            handle = ctypes.CDLL(str(path))
            check_sources(handle, path, Path(__file__).parent)
            handle.lk_runnable.restype = ctypes.c_char_p
            handle.lk_set_threads.argtypes, handle.lk_set_threads.restype = (INT64,), None
            processors.fit()
            return handle
    log.warning(
        "lorakit: %s is not installed; CPU tensors use the slower torch reference.", LIBRARY
    )
    return None


@functools.cache
def isa() -> str:
    """Return the instruction set whose kernels run: the processor's best, or LORAKIT_ISA."""
    found = runnable()
    wanted = os.environ.get("LORAKIT_ISA", found[-1])
    if wanted not in found:
        raise RuntimeError(
            f"LORAKIT_ISA={wanted} cannot run here: this machine has {', '.join(found)}"
        )
    return wanted


def runnable() -> list[str]:
    """Return the instruction sets that both library and processor have, the best last."""
    handle = library()
    if handle is None:
        raise RuntimeError(f"{LIBRARY} is not installed")
    return handle.lk_runnable().decode().split()


def function(op: str, *argtypes: type) -> Callable[..., None]:
    """Return the C function of `op` for the chosen instruction set, with argument types.

    While this thread pretends a CPU (pretend.py), what is returned does nothing.
    """
    now = pretend.current() if pretend.by_thread else None
    if now is not None and now.kind == "cpu":
        return _nothing
    return sizes_function(op, *argtypes)


def _nothing(*arguments: Any) -> None:
    """Take the place of a C function."""


@functools.cache
def sizes_function(op: str, *argtypes: type) -> Callable[..., None]:
    """Return what `function` does, for a C function that reads and writes no tensor."""
    entry = getattr(library(), f"lk_{isa()}_{op}")
    entry.argtypes, entry.restype = argtypes, None
    return entry


def run(op: str, dtype: torch.dtype, arguments: ctypes.Structure) -> None:
    """Call the C function of `op` for tensors of `dtype`, one of CPU_DTYPES."""
    function(f"{op}_{CPU_DTYPES[dtype]}", POINTER)(ctypes.addressof(arguments))


@overload
def address(t: torch.Tensor) -> int: ...


@overload
def address(t: torch.Tensor | None) -> int | None: ...


def address(t: torch.Tensor | None) -> int | None:
    """Return the address of the first value; None, a null pointer in C, for None.

    Raises TypeError for a tensor that holds values and lies nowhere, such as a DTensor: a kernel
    would read from address 0.
    """
    if t is None:
        return None
    return t.data_ptr() or _nowhere(t)


def _nowhere(t: torch.Tensor) -> int:
    """Return 0 for a tensor without values, or of the meta device, where no kernel runs."""
    if t.numel() == 0 or t.device.type == "meta":
        return 0
    raise TypeError(
        f"a kernel got a {type(t).__name__}, whose values lie nowhere in this process's memory: "
        "gather a DTensor first (full_tensor), or give this rank's part of it (to_local)"
    )
