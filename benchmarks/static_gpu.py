"""Every Triton kernel, compiled ahead of time for every GPU target: what the compiler made of it.

    python benchmarks/static_gpu.py [--peers] [--csv FILE] [--target sm_90] [--op rms_norm]

No GPU is needed. The ops run as a user would call them, on CPU tensors of real shapes, but each
launch is only noted: which kernel, with which arguments, and what is known of them (a pointer or a
stride that is a multiple of 16, as the launcher would see it). That is compiled for each target:

    registers, spills  per thread, and bytes that went to memory for want of registers
    shared             bytes of shared memory per program
    occupancy          share of a multiprocessor's threads that registers and shared memory let in
    wide               share of the bytes of global memory moved in accesses of 128 bits
    instructions       per value; a kernel that loops is counted for one pass of its loop
    special            operations of the special-function unit (exp2, reciprocal, ...) per value

What is counted is code, not time: these figures say where a kernel is surely lean or surely not.
With --peers the Triton kernels of Liger and bitsandbytes are compiled in the same run, from the
packages that are installed (static_peers.py says how), which takes twice as long.
"""

import argparse
import bisect
import csv
import importlib
import itertools
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # of which Triton would warn

import static_peers
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

import lorakit as lk
import lorakit.kernels.ops.float8

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (75, 80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
FLOAT8 = ("sm_89", "sm_90", "sm_100", "sm_120")  # those that have it
# bytes of shared memory that one program may have: CUDA C programming guide, table 30; CDNA 3 ISA
SHARED_LIMIT = {"sm_75": 65_536, "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376}
SHARED_LIMIT |= {"sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536}
# of a multiprocessor: threads, programs, bytes of shared memory (table 30 again); on CDNA 3 of a
# compute unit; the programs are bounded by its threads.
ROOM = {
    "sm_75": (1024, 16, 65_536), "sm_80": (2048, 32, 167_936), "sm_86": (1536, 16, 102_400),
    "sm_89": (1536, 24, 102_400), "sm_90": (2048, 32, 233_472), "sm_100": (2048, 32, 233_472),
    "sm_120": (1536, 24, 102_400), "gfx942": (2048, 2048, 65_536),
}  # fmt: skip
NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8",
    torch.int64: "i64", torch.int32: "i32", torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


# under TRITON_INTERPRET=1 they would come into being as interpreted functions, which do not compile
for folder in lk.kernels.__path__:
    for file in Path(folder).glob("ops/*/triton.py"):
        importlib.import_module(f"lorakit.kernels.ops.{file.parent.name}.triton")
adamw = importlib.import_module("lorakit.kernels.ops.adamw.triton")


@dataclass(frozen=True)
class Figures:
    """One kernel on one target."""

    provider: str
    op: str
    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    occupancy: float
    wide: float
    instructions: float
    special: float


@dataclass(frozen=True)
class Launch:
    function: JITFunction
    arguments: tuple
    options: dict


def launches(call: Callable, target: str) -> list[Launch]:
    """The kernels that `call` would launch on a GPU of that kind; none of them runs."""
    noted, backend = [], TARGETS[target].backend
    language = "ptx" if backend == "cuda" else "amdgcn"
    capability = divmod(TARGETS[target].arch, 10) if backend == "cuda" else (9, 4)

    def note(self, *arguments, grid, warmup, **options):
        noted.append(Launch(self, arguments, options))

    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(lk.kernels.dispatch, "_interprets", return_value=True),
        mock.patch.object(lk.kernels.dispatch, "compiles_to", return_value=language),
        mock.patch.object(lk.kernels.dispatch, "capability", return_value=capability),
        lk.kernels.use_backend("triton"),
    ):
        call()
    return noted


def compile_for(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """The launch as Triton's launcher would specialize it, compiled."""
    names = launch.function.arg_names
    signature, constants, attributes = {}, {}, {}
    given = dict(zip(names, launch.arguments, strict=False))
    options = {k: v for k, v in launch.options.items() if k not in names}
    given |= {k: v for k, v in launch.options.items() if k in names}
    for i, name in enumerate(names):
        parameter = launch.function.params[i]
        value = given.get(name, parameter.default)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], aligned = "*" + NAMES[value.dtype], value.data_ptr() % 16 == 0
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            signature[name] = "fp32" if type(value) is float else signature[name]
            aligned = type(value) is int and value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.function, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


class Kernel(NamedTuple):
    """A launch of an op, compiled."""

    provider: str
    op: str
    name: str
    values: int  # how many a program handles in one pass of its loop, if it has one
    made: CompiledKernel


def measure(kernels: list[Kernel], target: str) -> list[Figures]:
    """The figures of kernels that were compiled for a target."""
    if target.startswith("gfx"):
        found = [_of_amd(kernel.made) for kernel in kernels]
    else:
        codes = disassembled([kernel.made.asm["cubin"] for kernel in kernels], target)
        found = [_of_nvidia(k.made, code) for k, code in zip(kernels, codes, strict=True)]
    return [_figures(k, target, *each) for k, each in zip(kernels, found, strict=True)]


def _figures(
    kernel: Kernel, target: str, registers: int, spilled: int, wide: float, instructions: int,
    special: int,
) -> Figures:  # fmt: skip
    provider, op, name, values, made = kernel
    threads = made.metadata.num_warps * TARGETS[target].warp_size
    return Figures(
        provider, op, name, target, registers, spilled, made.metadata.shared,
        occupancy(target, registers, made.metadata.num_warps, made.metadata.shared),
        round(wide, 3), round(instructions * threads / values, 2),
        round(special * threads / values, 3),
    )  # fmt: skip


def occupancy(target: str, registers: int, warps: int, shared: int) -> float:
    """The share of a multiprocessor's threads that can be there at a time."""
    most, programs, memory = ROOM[target]
    lanes, amd = TARGETS[target].warp_size, target.startswith("gfx")
    # a warp gets registers by 256; one of AMD's four units has 512 for each lane, given out by 8
    if amd:
        fitting = 4 * (512 // (-(-max(registers, 1) // 8) * 8)) // warps
    else:
        fitting = 65_536 // (-(-registers * lanes // 256) * 256) // warps
    kept = 0 if amd or target == "sm_75" else 1024  # of every program's shared memory
    by_shared = memory // max(1, shared + kept)
    found = min(programs, fitting, by_shared, most // (warps * lanes))
    return round(found * warps * lanes / most, 3)


def machine_code(cubin: bytes) -> bytes:
    """The instructions of the one kernel in a 64-bit ELF file: its section .text.NAME."""
    (at,), (size, count, names) = (
        struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HHH", cubin, 58)
    )  # fmt: skip
    sections = [struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(count)]
    start = sections[names][4]
    (found,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", start + name)
    )
    return found


def disassembled(cubins: list[bytes], target: str) -> list[list[str]]:
    """The names of each kernel's instructions. One run reads all, as to begin takes it 0.4 s."""
    codes = [machine_code(cubin) for cubin in cubins]
    bounds = [0, *itertools.accumulate(map(len, codes))]
    chip = f"SM{target[3:]}" + ("a" if int(target[3:]) >= 90 else "")  # as Triton compiles
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "code")
        raw.write_bytes(b"".join(codes))
        text = _run([knobs.nvidia.nvdisasm.path, "-ndf", "-b", chip, str(raw)])
    found: list[list[str]] = [[] for _ in cubins]
    line = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+ )?([A-Z][A-Z0-9_.]*)"
    for match in re.finditer(line, text):
        found[bisect.bisect(bounds, int(match[1], 16)) - 1].append(match[2])
    return found


def _of_nvidia(made: CompiledKernel, code: list[str]) -> tuple[int, int, float, int, int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        used = _run([knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)])
    # Triton has no arrays of a thread's own: what is on the stack was spilled
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", used).groups())
    counts, moved = Counter(), Counter()
    for instruction in code:
        kind, *suffixes = instruction.split(".")
        counts[kind] += kind != "NOP"
        if kind in ("LDG", "STG"):
            bits = [int(s.strip("US")) for s in suffixes if re.fullmatch(r"[US]?(8|16|64|128)", s)]
            moved[bits[0] if bits else 32] += bits[0] if bits else 32
    return registers, spilled, _wide(moved, made.asm["ttir"]), counts.total(), counts["MUFU"]


def _of_amd(made: CompiledKernel) -> tuple[int, int, float, int, int]:
    code = made.asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
    spilled = sum(map(int, re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", code)))
    body = re.findall(r"^\s+((?:[svb]|global|buffer|ds|flat)_\w+)", code, re.MULTILINE)
    moved = Counter()
    for name in body:
        if match := re.match(r"(?:global|buffer|flat)_(?:load|store)_(\w+)", name):
            kind = match[1]
            bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}.get(kind)
            moved[bits or (8 if "byte" in kind else 16)] += bits or (8 if "byte" in kind else 16)
    special = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
    specials = sum(bool(special.match(name)) for name in body)
    return registers, spilled, _wide(moved, made.asm["ttir"]), len(body), specials


def _wide(moved: Counter, ttir: str) -> float:
    """The share of 128-bit accesses among `moved`, bits by width, without what a program moves of
    scalars: once for all its threads, which the code does not show.
    """
    scalars = re.findall(r"tt\.(?:load|store) [^\n]*: !tt\.ptr<\w?[a-z]+(\d+)>", ttir)
    of_scalars = Counter(max(int(bits), 8) for bits in scalars)
    narrow = sum(
        max(0, bits - width * of_scalars[width]) for width, bits in moved.items() if width < 128
    )
    return moved[128] / max(1, moved[128] + narrow)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


class _Base(NamedTuple):
    """A frozen layer, for the products of adapters."""

    stored: torch.Tensor
    bias: None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.stored.t()


def cases() -> Iterator[tuple[str, Callable, int]]:
    """Ops at the shapes of published models: name, call, values of a program's pass."""
    ops = lk.kernels

    def bf16(*shape: int, grad: bool = True) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).requires_grad_(grad)

    def both(call: Callable) -> Callable:
        def run():
            y = call()
            y = y if isinstance(y, tuple) else (y,)
            torch.autograd.backward(y, [torch.empty_like(t) for t in y])

        return run

    for width in (896, 1152, 2048, 4096, 8192):
        x, w = bf16(8, width), bf16(width, grad=False)
        yield f"rms_norm {width}", both(lambda x=x, w=w: ops.rms_norm(x, w, 1e-5)), width
    x, w = bf16(8, 2304), bf16(2304, grad=False)
    gemma = {"weight_offset": 1.0, "casting_mode": "gemma"}
    yield "rms_norm 2304 gemma", both(lambda: ops.rms_norm(x, w, 1e-6, **gemma)), 2304
    r = bf16(8, 4096)
    flat, w2 = bf16(8, 4096), bf16(4096, grad=False)
    yield "add_rms_norm 4096", both(lambda: ops.add_rms_norm(flat, r, w2, 1e-5)), 4096
    w_trained = bf16(4096)
    y = bf16(8, 4096)
    yield "rms_norm 4096 with dw", both(lambda: ops.rms_norm(y, w_trained, 1e-5)), 4096
    for dim in (64, 128, 256):
        q, k = bf16(1, 8, 32, dim), bf16(1, 8, 8, dim)
        table = torch.empty(1, 8, dim // 2)
        yield f"rope {dim}", both(lambda q=q, k=k, t=table: ops.rope(q, k, t, t)), 512
    weight = bf16(128, grad=False)
    heads = bf16(1, 8, 32, 128), bf16(1, 8, 8, 128), weight, weight, 1e-6
    table128 = torch.empty(1, 8, 64)
    yield "norm_rope 128", both(lambda: ops.norm_rope(*heads, table128, table128)), 512
    documents = ops.Documents([512, 300])
    for dim, kinds in ((64, 1), (128, 4), (256, 2), (512, 2)):
        q, k, v = bf16(1, 812, 8, dim), bf16(1, 812, 2, dim), bf16(1, 812, 2, dim)
        capped = {"window": 100, "softcap": 50.0}
        options = {"": {}, " capped window": capped}
        if kinds > 2:  # a dense row shares its heads among programs
            options |= {" fp32": {}, " shared": {"lengths": None, **capped}}
        for kind, more in list(options.items())[:kinds]:
            row = tuple(t.detach().float().requires_grad_() for t in (q, k, v))
            row = row if kind == " fp32" else (q, k, v)
            more = {"lengths": documents, **more}
            run = both(lambda t=row, more=more: ops.attention(*t, **more))
            yield f"attention {dim}{kind}", run, 64 * dim
    mixed, shifts = bf16(1, 812, 8192), torch.empty(8192, 4)
    run = both(lambda: ops.causal_conv(mixed, shifts, lengths=documents))
    yield "causal_conv", run, 16 * 128  # a tile
    row = [bf16(1, 812, heads, 128) for heads in (2, 2, 4)]
    gates = torch.empty(1, 812, 4).requires_grad_(), bf16(1, 812, 4)
    net = both(lambda: ops.gated_delta_net(*row, *gates, lengths=documents))
    yield "gated_delta_net 128", net, 32 * 128  # a chunk of a head
    pair = [torch.ones(16, 4096), torch.ones(4096, 16)]
    layers = [ops.LoraWeights(_Base(bf16(4096, 4096, grad=False)), *pair, 2.0) for _ in range(3)]
    yield "lora cast", lambda: ops.lora_qkv(bf16(8, 4096, grad=False), layers), 1024
    dropped, counter = bf16(8, 4096, grad=False), torch.zeros((), dtype=torch.int64)
    masks = 0.05, 2**61, counter
    yield "dropout", lambda: ops.seeded_dropout(dropped, *masks), 4096
    inner, outer = bf16(768, 2048, grad=False), bf16(2048, 768, grad=False)
    with lk.kernels.use_backend("reference"):
        in_4_bits = ops.quantize_nf4(torch.ones(768, 2048))
    small = [[t] * 128 for t in (torch.ones(16, 2048), torch.ones(768, 16))]
    # packed and dense weights, with an adapter, a bias, and without: every kind of product is there
    kinds = (in_4_bits, (), 0), (inner, small, 768), (outer, (), 2048)
    three = [
        ops.ExpertLayers([W] * 128, *ab, bias=[torch.ones(width)] * 128 if width else ())
        for W, ab, width in kinds
    ]
    tokens, picked = bf16(8, 2048), torch.zeros(8, 8, dtype=torch.int64)
    weights = torch.ones(8, 8).requires_grad_()

    def experts() -> torch.Tensor:
        return ops.expert_mlp(tokens, picked, weights, *three, "silu", keep=True)

    yield "experts", both(experts), 64 * 128
    with lk.kernels.use_backend("reference"):
        q4, k4 = (ops.quantize_nf4(torch.ones(n, 4096)) for n in (64, 32))
    for r in (16, 256):
        joined = [
            ops.LoraWeights(_Base(w), torch.ones(r, 4096), torch.ones(w.shape[0], r), 2.0)
            for w in (q4, k4, k4)
        ]
        rows = torch.empty(256, 4096 + 3 * r, dtype=torch.bfloat16)[:, :4096]
        run = partial(ops.lora_qkv, rows, joined, room=3 * r)
        yield f"lora joined {r}", run, 4096
    for r in (16, 64):
        yield f"lora gradients {r}", partial(gradients_at_once, r), 64 * (256 if r == 16 else 128)
    gate, up = bf16(8, 14336), bf16(8, 14336)
    yield "swiglu", both(lambda: ops.swiglu(gate, up)), 1024
    yield "geglu tanh", both(lambda: ops.geglu(gate, up)), 1024
    yield "geglu erf", both(lambda: ops.geglu(gate, up, approximate="none")), 1024
    halves3 = [torch.empty(8, 14336, dtype=torch.bfloat16) for _ in range(3)]
    yield "swiglu in place", lambda: ops.gated_backward_(*halves3, "silu"), 1024
    both_rows = torch.empty(8, 2 * 14336 + 32, dtype=torch.bfloat16)
    apart = both_rows[:, :14336], both_rows[:, 14336:28672]
    yield "swiglu of rows", lambda: ops.gated_backward_(halves3[0], *apart, "silu"), 1024
    for r in (16, 64):
        yield f"updates added {r}", partial(updates_added, gate.detach(), up.detach(), r), 32 * 128
    labels = torch.zeros(4, dtype=torch.int64)
    told = torch.zeros(2)  # what training asks for
    cases = ((128256, None), (151936, None), (256000, 30.0))
    for (vocabulary, cap), statistics in itertools.product(cases, (None, told)):
        logits = bf16(4, vocabulary)
        name = f"cross_entropy {vocabulary}" + (" capped" if cap else "")
        name += "" if statistics is None else " statistics"
        options = {"softcap": cap, "statistics": statistics}
        run = both(lambda z=logits, o=options: ops.cross_entropy(z, labels, **o)[0])
        yield name, run, 4096
    odd = bf16(4, 50272).detach()[:, :50257].requires_grad_()  # rows padded to a multiple of 16
    yield "cross_entropy 50257", both(lambda: ops.cross_entropy(odd, labels)[0]), 4096
    with lk.kernels.use_backend("reference"):
        packed = {
            double: ops.quantize_nf4(torch.ones(64, 4096), double_quant=double)
            for double in (True, False)
        }
    ones = [[torch.ones(4096)] for _ in range(4)]
    options = {"step": 1, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    yield "adamw", lambda: ops.adamw_step(*ones, **options), 1024
    cpu, group = torch.device("cpu"), ops.AdamWGroup(0, (0.9, 0.999), 1e-8, 0.0)
    clipped = ops.ClippedAdamW([group, group], [[1e-3, 1e-3]], 1.0, cpu)
    rows = [ops.AdamWRow(0, *(one for [one] in ones))]

    def clip() -> None:  # what comes before the update
        with mock.patch.object(adamw, "_launch_update"):
            clipped(rows, torch.ones(1))

    yield "adamw clipping", clip, 8 * 1024
    moments = [[ops.Moment8bit.zeros(4096, cpu)] for _ in range(2)]
    yield "adamw 8-bit", lambda: ops.adamw_step_8bit(*ones[:2], *moments, **options), 2048
    halves = [torch.empty(8, 4096, dtype=torch.float16).requires_grad_() for _ in range(2)]
    yield "swiglu fp16", both(lambda: ops.swiglu(*halves)), 1024
    wide = torch.empty(4, 32000).requires_grad_()
    yield "cross_entropy 32000 fp32", both(lambda: ops.cross_entropy(wide, labels)[0]), 4096
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.ones(64, 4096, dtype=dtype)
        name = f"nf4 quantize {NAMES[dtype]}"

        def quantize(w: torch.Tensor = w) -> None:
            with suppress(ValueError):  # scales that were not computed may not be finite
                ops.quantize_nf4(w, double_quant=False)

        yield name, quantize, 1024
    one, few = bf16(1, 4096, grad=False), bf16(16, 4096)
    # unrolled four times, and once more for what is left
    yield "nf4 product of 1", lambda: ops.frozen_linear(one, packed[True]), 5 * 1024
    yield "nf4 product of 16", both(lambda: ops.frozen_linear(few, packed[True])), 64 * 64
    ids = torch.zeros(4, dtype=torch.int64)
    yield "nf4 rows", lambda: ops.dequantize_rows(packed[True], ids, torch.bfloat16), 1024
    for double, q in packed.items():
        name = "nf4 dequantize" + (" double" if double else "")
        yield name, lambda q=q: ops.dequantize_nf4(q, torch.bfloat16), 4096
    yield from float8_cases(packed[True])


def gradients_at_once(r: int) -> None:
    """s dy B and dB of q, k and v from one reading of dy, as backward makes them."""
    kernels = importlib.import_module("lorakit.kernels.ops.lora_linear.triton")
    empty = partial(torch.empty, dtype=torch.bfloat16)
    grads, sBs = (
        [empty(512, n) for n in (4096, 1024, 1024)],
        [empty(4096, r), *[empty(1024, r)] * 2],
    )
    low, dlow = empty(512, 4096 + 3 * r)[:, 4096:], empty(512, 3 * r)
    if not lk.kernels.ops.swiglu.updates.adds_updates(low, [r]):
        return
    kernels.of_gradients(grads, sBs, low, [2.0] * 3, dlow, torch.float32)


def updates_added(gate: torch.Tensor, up: torch.Tensor, r: int) -> None:
    """An activation's passes that add low-rank updates: to all it reads, and to dy alone."""
    (M, inner), swiglu = gate.shape, lk.kernels.ops.swiglu
    low, A, B = (torch.empty(shape, dtype=gate.dtype) for shape in ((M, r), (r, inner), (inner, r)))
    if not swiglu.updates.adds_updates(gate, [r]):
        return
    of_dy, of_inner = swiglu.Update(low, A), [swiglu.Update(low, B)] * 2
    swiglu.gated_beside(gate, up, "silu", 0, of_inner)
    for updates in ((of_dy, *of_inner), (of_dy, None, None)):
        swiglu.gated_backward_(torch.empty_like(gate), gate, up, "silu", updates=updates)


def float8_cases(packed: lk.kernels.NF4Tensor) -> Iterator[tuple[str, Callable, int]]:
    """Roundings to float8, of rows and of a weight [64, 4096]."""
    rows = [torch.empty(8, 14336, dtype=torch.bfloat16) for _ in range(3)]
    for count in (1, 2, 3):
        scales = [None if count == 1 else torch.ones(())] * count
        run = partial(lk.kernels.ops.float8.scaled_rows, rows[:count], scales)
        yield f"float8 rows of {count}", run, 4096 * count
    logits, labels = torch.empty(4, 128256, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
    head = importlib.import_module("lorakit.kernels.ops.cross_entropy.triton")
    run = partial(head.loss_and_rounded_gradient, logits, labels, -100)
    yield "float8 logits", run, 4096
    weight = lk.kernels.Float8Weight(packed)
    yield "float8 weight", weight.rows, 4096
    turned = torch.empty(4096, 64, dtype=torch.float8_e4m3fn)
    yield "float8 weight turned", lambda: weight.columns_to(turned), 128 * 64


def measure_target(target: str, only: list[str], peers: bool) -> list[Figures]:
    chosen = (("lorakit", *case) for case in cases())
    if peers:
        chosen = itertools.chain(chosen, static_peers.cases(target))
    kernels = []
    for provider, op, call, values in chosen:
        known = target in FLOAT8 or not op.startswith("float8")
        if known and (not only or any(part in op for part in only)):
            for launch in launches(call, target):
                name = launch.function.fn.__name__.strip("_")
                made = compile_for(launch, TARGETS[target])
                kernels.append(Kernel(provider, op, name, values, made))
    return measure(kernels, target)


def measure_all(targets: list[str], only: list[str], peers: bool) -> list[Figures]:
    """All rows, by target; a process for each, as many at a time as there are processors."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        parts = pool.map(measure_target, targets, *([x] * len(targets) for x in (only, peers)))
        return [row for rows in parts for row in rows]


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--op", action="append", default=[], help="only ops whose name holds this")
    parser.add_argument("--peers", action="store_true", help="Liger and bitsandbytes too")
    parser.add_argument("--csv", type=Path, help="write the rows to this file too")
    args = parser.parse_args()
    known = ["triton"]
    if args.peers:
        known += [name for name in ("liger-kernel", "bitsandbytes") if installed(name)]
    print(", ".join(f"{name} {version(name)}" for name in known))
    rows = measure_all(args.target or list(TARGETS), args.op, args.peers)
    names = [f.name for f in fields(Figures)]
    lines = [names, *(list(asdict(row).values()) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    for line in lines:
        texts = " ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=False))
        print(texts + "".join(f" {number:>12}" for number in line[4:]))
    if args.csv is not None:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(map(asdict, rows))


if __name__ == "__main__":
    main()
