"""What a QLoRA step must cost on a GPU, from the launches that it makes. No GPU is needed.

    python benchmarks/cost_model.py [--gpu H100] [--tokens 8192] [--rows packed] [--launches]
        [--shape qwen3.5-4b]

The step of `steps.py` runs on the meta device, and every launch is noted with its operands
(tests/meta_gpu.py). So the list is the code's own, whatever the code does. A launch takes

    max(operations / rate, bytes / bandwidth) + FIXED

A product of matrices has 2 M N K operations. Attention over documents of t tokens, H heads of D
each, has sum(t^2) H D for each of its products, as half of the scores are seen: two forward, five
backward, or seven in kernels of two passes. Linear attention has the products of its chunks
(kernels/ops/delta_net/triton.py), as if those of a document did not wait for each other; with
--shape the layers are those of shapes.py. Each operand is read or written once. Nothing is
fitted: rates are data sheets', other people's measurements, or a copy's, a product's and
attention's that were measured by themselves. Attention's depend on the tokens of a row, and are
interpolated along their logarithm.

The floor counts each product with a frozen weight once forward and once backward, attention's
seven, and the passes over memory that no fusion saves; launches are free. A step cannot take less.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from cases import RANK, Setting, Sizes
from shapes import config_of
from steps import IGNORE, KINDS, Rows, Step, make_rows, our_step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lorakit as lk
import lorakit.kernels.pretend

BF16 = 2  # bytes
NF4 = 0.516  # bytes of a packed value: its code, an 8-bit scale for 64, and their scales
FIXED = 2e-6  # s, of the shortest kernel from its start to the next one's
THIN = 4 * RANK  # a side of a product that is an adapter's rank, also of four that are stacked
THIN_SHARE = 0.75  # of the bandwidth, that a product with such a side reaches; assumed


@dataclass(frozen=True)
class GPU:
    """Operations per second of large products; bytes per second, read and written, of a copy."""

    name: str
    product: float  # bf16
    fp8: float
    forward: float  # the fastest attention, causal, D = 128
    backward: float
    attention: dict[str, tuple[float, ...]]  # by name, with as many tokens as MEASURED_AT says
    copy: float
    source: str

    @property
    def thin(self) -> float:
        return THIN_SHARE * self.copy

    def rate(self, name: str, tokens: int) -> float:
        """Return the operations per second of a launch in a row of so many tokens."""
        if name == "tf32":  # half of bf16's, in the data sheets of all of them
            return self.product / 2
        if name not in self.attention:
            return vars(self)[name]
        step = math.log2(max(tokens, 1) / MEASURED_AT[0])
        step = min(max(step, 0.0), len(MEASURED_AT) - 1.0)
        i = min(int(step), len(MEASURED_AT) - 2)
        before, after = self.attention[name][i : i + 2]
        return before + (step - i) * (after - before)


MEASURED_AT = (2048, 4096, 8192, 16384)  # tokens, each twice the one before
# On an H200, heads of 128: docs/dev/LOG.md, 2026-11-29. Its backward counts five products, and
# Triton's two kernels of backward have seven.
MEASURED = {
    "flash_forward": (208e12, 276e12, 322e12, 335e12),
    "flash_backward": (134e12, 164e12, 180e12, 189e12),
    "triton_forward": (232e12, 371e12, 430e12, 454e12),
    "triton_backward": (69e12 * 7 / 5, 200e12 * 7 / 5, 255e12 * 7 / 5, 297e12 * 7 / 5),
}
ASSUMED = {
    "flash_forward": (130e12,) * 4, "flash_backward": (105e12,) * 4,
    "triton_forward": (120e12,) * 4, "triton_backward": (120e12,) * 4,
}  # fmt: skip


H100 = GPU(
    "H100", 782e12, 1350e12, 600e12, 480e12, MEASURED, 3.007e12,
    "product and copy: gpu.md, commit 0cd7aa1 (torch.compile's head, 4.3 TFLOP in 5.5 ms); "
    "attention: measured on an H200, which has its chip; the floor's: cuDNN's forward in "
    "arXiv:2407.08608, its backward assumed; fp8: assumed, of 1979 in the data sheet",
)  # fmt: skip
GPUS = {
    gpu.name: gpu
    for gpu in (
        H100,
        GPU(
            "H200", 790e12, 1350e12, 600e12, 480e12, MEASURED, 4.0e12,
            "as the H100, whose chip it has; copy: assumed, of 4.8 TB/s in the data sheet",
        ),
        GPU(
            "RTX 4090", 150e12, 290e12, 130e12, 105e12, ASSUMED, 0.92e12,
            "all assumed, of the data sheet's 165 TFLOP/s in bf16, 330 in fp8 and 1.008 TB/s",
        ),
    )
}  # fmt: skip
MULTIPROCESSORS = 132  # of an H100; an RTX 4090 has 128


class Cost(NamedTuple):
    """One launch."""

    part: str  # forward, backward or optimizer
    kind: str
    name: str
    where: str  # the line of lorakit that asked for it; "" in torch's own backward
    operations: float
    moved: float  # bytes
    shape: str
    tokens: int  # of the row
    rate: str = ""  # what bounds its operations, a name that GPU.rate knows
    thin: bool = False

    def seconds(self, gpu: GPU) -> float:
        """Return the time that it takes on `gpu`, with the fixed part of a launch."""
        arithmetic = self.operations and self.operations / gpu.rate(self.rate, self.tokens)
        return max(arithmetic, self.moved / (gpu.thin if self.thin else gpu.copy)) + FIXED


@dataclass(frozen=True)
class Job:
    """What the step is of."""

    sizes: Sizes
    layers: int
    rows: Rows
    checkpointing: bool = False
    kept_layers: int | None = None  # that keep gate and up for backward; None: all
    float8: bool = False  # whether frozen weights are multiplied in float8
    config: lk.ModelConfig | None = None  # of the model; None: a Llama of the sizes

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.rows)

    @property
    def labels(self) -> int:
        """The number of tokens that are predicted; the first of a row is not."""
        return sum(label != IGNORE for _, labels in self.rows for label in labels[1:])

    @property
    def scores(self) -> int:
        return sum(len(ids) ** 2 for ids, _ in self.rows)

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """The frozen weights [N, K] of a layer; the first three read x."""
        s, H = self.sizes, self.sizes.hidden
        q, k, inner = s.heads * s.head_dim, s.kv_heads * s.head_dim, s.inner
        return [(q, H), (k, H), (k, H), (H, q), (inner, H), (inner, H), (H, inner)]

    @property
    def trained(self) -> int:
        return RANK * self.layers * sum(N + K for N, K in self.matrices)


# ---- what a launch computes and moves -----------------------------------------------------------

# The folder of a Triton kernel's op, or the kernel -> the kind of its launches. A new kernel that
# multiplies needs its operations in `of_kernel`.
KIND_OF = {
    "rms_norm": "norms, rope, activations", "rope": "norms, rope, activations",
    "swiglu": "norms, rope, activations", "dropout": "norms, rope, activations",
    "attention": "attention", "nf4": "dequantize",
    "frozen_linear": "frozen products", "lora_linear": "casts", "cross_entropy": "head",
    "adamw": "optimizer", "float8": "casts", "experts": "frozen products",
    "lora_linear/_join": "dequantize", "lora_linear/_strips": "products with A and B",
    "lora_linear/_sums": "products with A and B",
    "delta_net": "linear attention", "causal_conv": "linear attention",
}  # fmt: skip
# Bytes of an optimizer's kernel per value that is trained, which it finds by a table of addresses.
OF_ADAMW = {"adamw/_squares": 4, "adamw/_decide": 0, "adamw/_update": 28}
# Products of an attention kernel with the scores.
FORWARD = "attention/_forward"
PRODUCTS = {FORWARD: 2, "attention/_dkv": 4, "attention/_dq": 3}
CHUNK = 32  # tokens, of the delta rule's kernels
# Products of a kernel of the delta rule, for each token and head of values: how many have dk dv
# pairs, C dk and C dv. Those of blocks of a chunk, and the inverses, count by their share.
OF_DELTA_NET = {
    "_chunks": (0, 0, 0), "_local": (0, 1.75, 0), "_scan": (2, 0, 1), "_back": (3, 0, 2),
    "_slopes": (3, 2, 2), "_gradients": (3, 3, 0),
}  # fmt: skip
# Kernels that read and write in place, or may: how often they move a tensor of their first's size.
IN_PLACE = {"swiglu/_backward": 6, "swiglu/_added_backward": 6, "cross_entropy/_backward": 2}
MULTIPLIED = {"mm": 0, "bmm": 0, "_scaled_mm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}
MADE = {  # read nothing that counts
    "zeros", "ones", "full", "arange", "scalar_tensor", "zeros_like", "ones_like", "full_like",
    "new_zeros", "new_ones", "new_full", "zero_", "fill_",
}  # fmt: skip
PICKED = {"embedding", "index", "index_select", "gather"}  # read only what they write


def size(t: Tensor) -> int:
    """Return the bytes of a tensor; a dimension along which it repeats itself counts once."""
    lengths = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 1]
    return t.itemsize * math.prod(lengths)


def shape_of(tensors: Sequence[Tensor]) -> str:
    return " ".join("x".join(map(str, t.shape)) for t in tensors if t.dim())


def on_device(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_meta]


class Notes(TorchDispatchMode):
    """The cost of every launch that a MetaGPU notes."""

    def __init__(self, gpu: Any, job: Job):
        super().__init__()
        self.gpu, self.job, self.part, self.trained = gpu, job, "", 0
        self.found: dict[int, Cost] = {}  # by the place of the launch in gpu.launches

    def watch(self, stack: ExitStack) -> None:
        """Note from now on, until `stack` ends; within the MetaGPU's own `with`."""

        def launched(kernel: Any, arguments: tuple[Any, ...]) -> None:
            self.gpu.note(kernel, arguments)
            self.of_kernel(len(self.gpu.launches) - 1, on_device(arguments))

        pretended = lorakit.kernels.pretend.pretend_gpu(self.gpu.capability, launched)
        stack.enter_context(pretended)
        stack.enter_context(self)

    def clear(self) -> None:
        for notes in (self.found, self.gpu):
            notes.clear()

    def costs(self) -> list[Cost]:
        """Return them in order."""
        return [self.found[at] for at in range(len(self.gpu.launches))]

    def add(
        self, at: int, kind: str, operations: float, moved: float, operands: Sequence[Tensor],
        **more: Any,
    ) -> None:  # fmt: skip
        name, where = self.gpu.launches[at]
        kind = "optimizer" if self.part == "optimizer" else kind
        shape = shape_of(operands)
        tokens = self.job.tokens
        found = Cost(self.part, kind, name, where, operations, moved, shape, tokens, **more)
        self.found[at] = found

    def products(self, q: Tensor, count: int) -> float:
        """Return the operations of so many products with the scores, of queries q."""
        return count * self.job.scores * self.job.sizes.heads * q.shape[-1]

    def of_kernel(self, at: int, operands: list[Tensor]) -> None:
        """Note a Triton kernel. An argument that stands for one it does not need is given twice."""
        name = self.gpu.launches[at].name
        package = name.partition("/")[0]
        if package not in KIND_OF:
            raise LookupError(f"cost_model: the kernel {name} has no kind; KIND_OF needs one")
        moved = sum(size(t) for t in {id(t): t for t in operands}.values())
        if name in IN_PLACE:
            moved = IN_PLACE[name] * size(operands[0])
        if package == "adamw":
            moved = OF_ADAMW[name] * self.trained
        # a forward kernel may run again in the backward pass
        operations, rate = 0.0, "triton_forward" if name == FORWARD else "triton_backward"
        if name in PRODUCTS:
            operations = self.products(operands[0], PRODUCTS[name])
        if package == "frozen_linear":  # x [M, K] and y [M, N] come last, but for a bias
            x, y = [t for t in operands if t.dim() > 1][-2:]
            operations, rate = 2.0 * x.numel() * y.shape[-1], "product"
        if name == "lora_linear/_strips":  # dlow and dB, each rank times all columns of dy
            dys, sBs = operands[:3], operands[3:6]
            pairs = {id(dy): dy.numel() * sB.shape[1] for dy, sB in zip(dys, sBs, strict=True)}
            operations, rate = 4.0 * sum(pairs.values()), "product"
        if name == "experts/_rows":  # x [M, K] comes first, y [M, N] before the bounds
            operations, rate = 2.0 * operands[0].numel() * operands[-2].shape[1], "product"
        if package == "delta_net":
            operations, rate = self.of_delta_net(name, operands), "tf32"
        kind = KIND_OF.get(name, KIND_OF[package])
        thin = name == "lora_linear/_strips"
        self.add(at, kind, operations, moved, operands[:2], rate=rate, thin=thin)

    def of_delta_net(self, name: str, operands: Sequence[Tensor]) -> float:
        """Return the operations of a kernel of the delta rule, which begins with q, k and v."""
        kernel, chunk = name.partition("/")[2], CHUNK
        deep, keys, values = OF_DELTA_NET[kernel]
        if kernel == "_chunks":
            return 0.0
        q, v = operands[0], operands[2]  # [N, nk, dk] and [N, nv, dv], or the gates [N, nv]
        dk, dv = q.shape[2], math.prod(v.shape[2:])
        inverse = 0.0 if kernel != "_local" else chunk**2 / 2
        if kernel == "_scan" and operands[7].dim() == 3:  # with y
            deep, values = deep + 1, values + 1
        each = deep * dk * dv + chunk * (keys * dk + values * dv) + inverse
        return 2.0 * v.shape[0] * v.shape[1] * each

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        at, kwargs = len(self.gpu.launches), kwargs or {}
        out = func(*args, **kwargs)
        if len(self.gpu.launches) > at + 1:
            self.of_flash_backward(at, *args[1:3])
        elif len(self.gpu.launches) > at:
            self.of_torch(at, args, kwargs, on_device(out))
        return out

    def of_flash_backward(self, at: int, q: Tensor, k: Tensor) -> None:
        """Note the launches of torch's flash backward, whose dq has a part for every split."""
        half, wide = size(q), size(q) * 4 // q.itemsize
        splits = -(-MULTIPROCESSORS // (q.shape[0] * q.shape[1]))
        # dq zeroed in fp32; delta; the gradients, with dk and dv of every head; dq cast; and
        # the sums over the heads of a group
        gradients = 6 * half + 2 * size(k) + splits * wide
        moved = splits * wide, 2 * half, gradients, splits * wide + half, *[half + size(k)] * 2
        for i, n in enumerate(moved):
            operations = self.products(q, 5) if i == 2 else 0.0
            self.add(at + i, "attention", operations, n, (q, k), rate="flash_backward")

    def of_torch(self, at: int, args: Any, kwargs: Any, made: list[Tensor]) -> None:
        """Note an op of torch's."""
        name, where = self.gpu.launches[at]
        given = on_device((args, {k: v for k, v in kwargs.items() if k != "out"}))
        if name in MULTIPLIED:
            a, b = given[MULTIPLIED[name] :][:2]
            read = given if kwargs.get("beta", 1) else [a, b]
            self.of_product(at, a, b, sum(map(size, [*read, *made])))
            return
        if name == meta_gpu().FLASH:
            q, k = given[:2]
            moved, rate = 2 * (size(q) + size(k)), "flash_forward"
            self.add(at, "attention", self.products(q, 2), moved, (q, k), rate=rate)
            return
        read = [] if name in MADE else made if name in PICKED else given
        if name == "copy_":
            read = given[1:]
        kind = "head" if "cross_entropy" in where else "sums, copies and the rest"
        kind = "casts" if "lora_linear" in where and name in ("_to_copy", "copy_") else kind
        self.add(at, kind, 0.0, sum(map(size, [*read, *made])), made)

    def of_product(self, at: int, a: Tensor, b: Tensor, moved: float) -> None:
        """Note a product of a [.., M, K] and b [.., K, N]."""
        name, where = self.gpu.launches[at]
        (M, K), N = a.shape[-2:], b.shape[-1]
        sides = [n for n in (M, N, K) if n != self.job.tokens]
        thin = min(sides, default=THIN + 1) <= THIN
        kind = "products with A and B" if thin else "frozen products"
        if thin and K <= THIN:
            kind, thin = "updates", False  # it streams the sum, which is as good as a copy
        if "cross_entropy" in where or self.job.sizes.vocabularies[0] in (M, N, K):
            kind = "head"
        operations = 2.0 * a.numel() * N
        rate = "fp8" if name == "_scaled_mm" else "product"
        self.add(at, kind, operations, moved, (a, b), rate=rate, thin=thin)


# ---- the step -----------------------------------------------------------------------------------


def meta_gpu() -> ModuleType:
    """Return tests/meta_gpu.py; the folder of the tests is no place to import from by name."""
    if "meta_gpu" not in sys.modules:
        path = Path(__file__).parents[1] / "tests" / "meta_gpu.py"
        spec = importlib.util.spec_from_file_location("meta_gpu", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["meta_gpu"] = module
        spec.loader.exec_module(module)
    return sys.modules["meta_gpu"]


def run_parts(step: Step, notes: Notes) -> None:
    with step.around():
        notes.part = "forward"
        loss = step.loss()
        notes.part = "backward"
        loss.backward()
        notes.part = "optimizer"
        step.update(loss.detach().view(1))
    step.optimizer.zero_grad(set_to_none=True)


def costs(job: Job) -> list[Cost]:
    """Return the launches of a step of `job`, in order; of the second, as the first makes tables.

    Raises:
        LookupError: there is a Triton kernel that this module does not know.
    """
    with meta_gpu().MetaGPU() as gpu, ExitStack() as stack:
        setting = Setting(torch.device("meta"), torch.bfloat16, job.sizes)
        options = job.checkpointing, job.kept_layers, job.float8, job.config
        step = our_step(setting, job.layers, job.rows, "triton", *options)
        notes = Notes(gpu, job)
        notes.trained = sum(p.numel() for p in step.optimizer.param_groups[0]["params"])
        gpu.clear()
        notes.watch(stack)
        run_parts(step, notes)
        notes.clear()
        run_parts(step, notes)
        return notes.costs()


def busy_ms(found: Sequence[Cost], gpu: GPU) -> float:
    """Return how long the launches keep `gpu` busy."""
    return 1e3 * sum(cost.seconds(gpu) for cost in found)


def floor_ms(job: Job, gpu: GPU) -> float:
    """Return what no list of launches can do without; see the module."""
    s, T, H, layers = job.sizes, job.tokens, job.sizes.hidden, job.layers
    frozen = sum(N * K for N, K in job.matrices)
    first = sum(N * K for N, K in job.matrices[:3])  # no gradient goes to the embedding
    products = 2.0 * T * (2 * frozen * layers - first)
    products += 2.0 * T * 3 * job.trained + 4.0 * job.labels * H * s.vocabularies[0]
    scores = job.scores * s.heads * s.head_dim * layers
    attention = 2 * scores / gpu.forward + 5 * scores / gpu.backward
    q, k = s.heads * s.head_dim, s.kv_heads * s.head_dim
    # norms, rope and activations, both ways; each weight made dense twice; the logits
    moved = layers * BF16 * T * (16 * H + 4 * (q + k) + 9 * s.inner)
    moved += layers * 2 * frozen * (NF4 + BF16) - first * (NF4 + BF16)
    moved += 3 * BF16 * job.labels * s.vocabularies[0]
    return 1e3 * (products / gpu.product + attention + moved / gpu.copy)


# ---- the report ---------------------------------------------------------------------------------


def groups(found: Sequence[Cost], gpu: GPU) -> Iterator[tuple[str, list[Cost], float]]:
    """Yield each kind with its launches and their ms, the longest first."""
    kinds = {kind: [c for c in found if c.kind == kind] for kind in {c.kind for c in found}}
    timed = [(kind, mine, busy_ms(mine, gpu)) for kind, mine in kinds.items()]
    yield from sorted(timed, key=lambda each: -each[2])


def report(job: Job, gpu: GPU, found: Sequence[Cost]) -> str:
    lines = [f"{'kind':26} {'launches':>8} {'TFLOP':>7} {'GB':>7} {'ms':>8}"]
    whole = [*groups(found, gpu), ("in all", list(found), busy_ms(found, gpu))]
    for kind, mine, ms in whole:
        operations, moved = sum(c.operations for c in mine), sum(c.moved for c in mine)
        lines.append(
            f"{kind:26} {len(mine):8} {operations / 1e12:7.2f} {moved / 1e9:7.2f} {ms:8.2f}"
        )
    if job.config is None:  # its formula is that of a Llama
        floor = floor_ms(job, gpu)
        lines.append(f"floor {floor:.2f} ms; in all {whole[-1][2] / floor:.2f} times it")
    return "\n".join(lines)


def by_launch(found: Sequence[Cost], gpu: GPU) -> str:
    return "\n".join(
        f"{c.part:9} {c.kind:26} {c.name:22} {c.operations / 1e9:9.1f} GFLOP "
        f"{c.moved / 1e6:9.2f} MB {1e6 * c.seconds(gpu):9.1f} us  {c.shape}  {c.where}"
        for c in found
    )


def sizes_of(config: lk.ModelConfig) -> Sizes:
    return LLAMA_8B._replace(
        hidden=config.hidden_size, inner=config.intermediate_size, head_dim=config.head_dim,
        heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
        vocabularies=(config.vocab_size,),
    )  # fmt: skip


LLAMA_8B = Sizes(
    tokens=0, hidden=4096, inner=14336, heads=32, kv_heads=8, head_dim=128, vocabularies=(128256,),
    matrices=(), rows=(), trained=(),
)  # fmt: skip


def rows_of(args: argparse.Namespace, tokens: int) -> Rows:
    """The rows of `steps.py`, or equal documents with labels on a share of each."""
    if args.documents is None and args.labels is None:
        return make_rows(args.rows, tokens, args.vocab)
    n = args.documents or 1
    lengths = [tokens // n + (i < tokens % n) for i in range(n)]
    learned = [round((1.0 if args.labels is None else args.labels) * t) for t in lengths]
    return [([0] * t, [IGNORE] * (t - k) + [0] * k) for t, k in zip(lengths, learned, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpu", choices=tuple(GPUS), action="append", help="default: H100")
    parser.add_argument("--tokens", type=int, action="append", help="default: 2048 and 8192")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shape", choices=("qwen3.5-4b",), help="layers of these widths instead")
    for name in ("hidden", "inner", "heads", "kv_heads", "head_dim"):
        option, default = name.replace("_", "-"), LLAMA_8B._asdict()[name]
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=LLAMA_8B.vocabularies[0])
    parser.add_argument("--rows", choices=KINDS, default="dense", help="see benchmarks/steps.py")
    parser.add_argument("--documents", type=int, help="instead: so many of one length")
    parser.add_argument("--labels", type=float, help="with labels on this share of each, 0 to 1")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--kept-layers", type=int,
                        help="that keep gate and up for backward; default: all")  # fmt: skip
    parser.add_argument("--frozen-dtype", choices=("float8",), help="default: the model's, bf16")
    parser.add_argument("--launches", action="store_true", help="print every launch")
    args = parser.parse_args()
    sizes = LLAMA_8B._replace(
        vocabularies=(args.vocab,), **{k: v for k, v in vars(args).items() if k in Sizes._fields
                                       and k not in ("tokens", "rows")},
    )  # fmt: skip
    config = None
    if args.shape:
        config = lk.ModelConfig.from_hf(config_of(args.shape, args.layers))
        sizes = sizes_of(config)
    for tokens in args.tokens or (2048, 8192):
        options = args.checkpointing, args.kept_layers, args.frozen_dtype == "float8", config
        job = Job(sizes, args.layers, rows_of(args, tokens), *options)
        found = costs(job)
        for name in args.gpu or ["H100"]:
            gpu = GPUS[name]
            print(
                f"\n{name}: {tokens} tokens, {job.labels} labels, {len(job.rows)} documents, "
                f"{args.layers} layers of {sizes.hidden} and {sizes.inner}, r = {RANK}\n"
                f"({gpu.source})"
            )
            print(by_launch(found, gpu) if args.launches else report(job, gpu, found))


if __name__ == "__main__":
    main()
