"""What `kernels.py` and `gpu.py` measure: every op, at given sizes, beside what others have for it.

A `Case` is an op at a shape. Its calls take the inputs that backward is timed for; all else, such
as weights and labels, they hold. A new op is one more Case in a function of CASES, and its name
there.

A peer is imported, and its weights are packed, when its call first runs: if that fails, it is that
one row's error.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lorakit as lk

OURS = ("triton", "cpu", "reference")
# What a peer is called in a row -> the packages it needs beside torch. "torch.compile" runs what
# "torch" runs.
PEERS = {
    "torch": (),
    "torch fused": (),
    "torch.compile": (),
    "dequantize, torch": (),
    "torch, FlashAttention": (),
    "torch, cuDNN": (),
    "Liger": ("liger_kernel",),
    "bitsandbytes": ("bitsandbytes",),
    "PEFT, bitsandbytes": ("peft", "bitsandbytes"),
    "transformers": ("transformers",),
}
GPU_ONLY = ("Liger", "torch, FlashAttention", "torch, cuDNN")
OVERWRITES = ("Liger",)  # its inputs, with outputs or gradients: it gets copies of its own
# The two ways of lorakit's to multiply a few rows by a packed matrix, for any number of them:
# (one_by_one, by_tiles) as in FEW_ROWS of kernels/ops/frozen_linear, which says when to take which.
WAYS = {"lorakit vector": (2**30, 0), "lorakit tiles": (0, 2**30)}
RANK, SCALING = 16, 2.0  # of the adapters


class Sizes(NamedTuple):
    """The shapes of the cases."""

    tokens: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabularies: tuple[int, ...]
    matrices: tuple[tuple[int, int], ...]  # [N, K] of packed weights
    rows: tuple[int, ...]  # M of the products with them
    trained: tuple[int, ...]  # values of each tensor that the optimizer updates
    # Bytes of a tensor of the ops that memory bounds, if the tokens make fewer: so many that two of
    # them do not fit a cache, and so few that malloc returns pages it has rather than fresh ones.
    streamed: int = 0


class Setting(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes

    def random(self, *shape: int, grad: bool = False) -> Tensor:
        x = torch.randn(shape, device=self.device, dtype=self.dtype)
        return x.requires_grad_(grad)

    def rows(self, width: int) -> int:
        """Return the rows of `width` values for an op that memory bounds."""
        return max(self.sizes.tokens, self.sizes.streamed // (width * self.dtype.itemsize))


@dataclass(frozen=True)
class Case:
    """An op at a shape: how each provider runs it, and the bytes that must move."""

    op: str
    shape: str
    moved: int
    call: Callable[..., object]  # lorakit's, of `inputs`, on the backend that is forced around it
    peers: dict[str, Callable[..., object]]  # of `inputs` as well
    inputs: tuple[Tensor, ...] = ()  # with respect to which backward is timed, if any
    moved_back: int = 0
    kernels: tuple[str, ...] = OURS  # the backends that the op has
    overwrites: bool = False  # its inputs: every run gets copies, and there is no backward

    @property
    def passes(self) -> tuple[str, ...]:
        """The ops of its rows."""
        back = self.inputs and not self.overwrites
        return (self.op, f"{self.op} backward") if back else (self.op,)


def liger():
    from liger_kernel import ops

    return ops


def bnb():
    import bitsandbytes

    return bitsandbytes


def norms(s: Setting) -> Iterator[Case]:
    ops, T, H = lk.kernels, s.rows(s.sizes.hidden), s.sizes.hidden
    x, residual, w = s.random(T, H, grad=True), s.random(T, H, grad=True), s.random(H)
    n = x.nbytes
    yield Case(
        "rms_norm", f"{T}x{H}", 2 * n, lambda x: ops.rms_norm(x, w, 1e-5),
        {
            "torch": lambda x: F.rms_norm(x, (H,), w, 1e-5),
            "Liger": lambda x: liger().LigerRMSNormFunction.apply(x, w, 1e-5),
        }, (x,), 3 * n,
    )  # fmt: skip

    def by_torch(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (H,), w, 1e-5), total

    yield Case(
        "add_rms_norm", f"{T}x{H}", 4 * n, lambda x, r: ops.add_rms_norm(x, r, w, 1e-5),
        {
            "torch": by_torch,
            "Liger": lambda x, r: liger().LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-5),
        }, (x, residual), 4 * n,
    )  # fmt: skip


def rotation(s: Setting) -> Iterator[Case]:
    D, heads = s.sizes.head_dim, (s.sizes.heads, s.sizes.kv_heads)
    T = s.rows(sum(heads) * D)
    q, k = (s.random(1, T, n, D, grad=True) for n in heads)
    angle = torch.randn(1, T, D // 2, device=s.device)
    cos, sin = angle.cos(), angle.sin()
    # as transformers has them: once for each half of a head, in the model's dtype
    wide_cos, wide_sin = (torch.cat([table, table], -1).to(s.dtype) for table in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * wide_cos[:, :, None] + torch.cat([-b, a], -1) * wide_sin[:, :, None]

    def by_liger(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        return liger().LigerRopeFunction.apply(q, k, wide_cos, wide_sin)

    shape, n = f"{T}x{sum(heads)}x{D}", q.nbytes + k.nbytes
    yield Case(
        "rope", shape, 2 * n, lambda q, k: lk.kernels.rope(q, k, cos, sin),
        {"torch": lambda q, k: (turned(q), turned(k)), "Liger": by_liger}, (q, k), 2 * n,
    )  # fmt: skip

    wq, wk = s.random(D), s.random(D)

    def norm_by_liger(x: Tensor, w: Tensor) -> Tensor:
        return liger().LigerRMSNormFunction.apply(x, w, 1e-6)

    yield Case(
        "norm_rope", shape, 2 * n,
        lambda q, k: lk.kernels.norm_rope(q, k, wq, wk, 1e-6, cos, sin),
        {
            "torch": lambda q, k: tuple(
                turned(F.rms_norm(x, (D,), w, 1e-6)) for x, w in ((q, wq), (k, wk))
            ),
            "Liger": lambda q, k: by_liger(norm_by_liger(q, wq), norm_by_liger(k, wk)),
        }, (q, k), 3 * n,
    )  # fmt: skip


def attentions(s: Setting) -> Iterator[Case]:
    """Causal, with grouped queries, of a dense row and of one packed document, for which a GPU
    runs Triton's kernels at any length. Arithmetic bounds it, so that GB/s say little.
    """
    T, D, heads = s.sizes.tokens, s.sizes.head_dim, (s.sizes.heads, s.sizes.kv_heads)
    q, k, v = (s.random(1, T, n, D, grad=True) for n in (heads[0], heads[1], heads[1]))

    def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2)

    def only(kernel: SDPBackend, *inputs: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return by_torch(*inputs)

    shape, moved = f"{T}x{heads[0]}/{heads[1]}x{D}", 2 * (q.nbytes + k.nbytes)
    yield Case(
        "attention", shape, moved, lk.kernels.attention,
        {
            "torch": by_torch,
            "torch, FlashAttention": functools.partial(only, SDPBackend.FLASH_ATTENTION),
            "torch, cuDNN": functools.partial(only, SDPBackend.CUDNN_ATTENTION),
        }, (q, k, v), 2 * moved,
    )  # fmt: skip
    yield Case(
        "attention packed", shape, moved, lambda *x: lk.kernels.attention(*x, lengths=[T]), {},
        (q, k, v), 2 * moved,
    )  # fmt: skip


def delta_nets(s: Setting) -> Iterator[Case]:
    """The layer of Qwen 3.5: two value heads to a key head, and a convolution over all of them.

    transformers' rule is its fallback in torch, which fp32 sums make slow; its kernels for GPUs are
    another package.
    """
    T, D, nk, nv = s.sizes.tokens, s.sizes.head_dim, s.sizes.heads, 2 * s.sizes.heads
    x, weight = s.random(1, T, (2 * nk + nv) * D, grad=True), s.random((2 * nk + nv) * D, 4)

    def by_torch(x: Tensor) -> Tensor:
        y = F.conv1d(x.mT, weight[:, None], padding=3, groups=len(weight))[..., :T]
        return F.silu(y).mT

    yield Case(
        "causal_conv", f"{T}x{x.shape[2]}", 2 * x.nbytes,
        lambda x: lk.kernels.causal_conv(x, weight), {"torch": by_torch}, (x,), 3 * x.nbytes,
    )  # fmt: skip
    q, k = (s.random(1, T, nk, D, grad=True) for _ in range(2))
    v, beta = s.random(1, T, nv, D, grad=True), torch.rand(1, T, nv, device=s.device).to(s.dtype)
    g = -torch.rand(1, T, nv, device=s.device)
    inputs, moved = (q, k, v, g.requires_grad_(), beta.requires_grad_()), 4 * v.nbytes

    def by_transformers(*given: Tensor) -> Tensor:
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

        return torch_chunk_gated_delta_rule(*given, use_qk_l2norm_in_kernel=True)[0]

    yield Case(
        "gated_delta_net", f"{T}x{nk}/{nv}x{D}", moved, lk.kernels.gated_delta_net,
        {"transformers": by_transformers}, inputs, 2 * moved,
    )  # fmt: skip


def activations(s: Setting) -> Iterator[Case]:
    """What `lora_mlp` runs backward in place writes over the three tensors that it reads."""
    ops, T, inner = lk.kernels, s.rows(s.sizes.inner), s.sizes.inner
    gate, up = (s.random(T, inner, grad=True) for _ in range(2))
    shape, n, grad = f"{T}x{inner}", gate.nbytes, s.random(T, inner)
    yield Case(
        "swiglu", shape, 3 * n, ops.swiglu,
        {
            "torch": lambda gate, up: F.silu(gate) * up,
            "Liger": lambda gate, up: liger().LigerSiLUMulFunction.apply(gate, up),
        }, (gate, up), 5 * n,
    )  # fmt: skip
    yield Case(
        "geglu", shape, 3 * n, ops.geglu,
        {
            "torch": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
            "Liger": lambda gate, up: liger().LigerGELUMulFunction.apply(gate, up),
        }, (gate, up), 5 * n,
    )  # fmt: skip
    for op, name in (("swiglu", "silu"), ("geglu", "gelu_pytorch_tanh")):
        yield Case(
            f"{op} backward in place", shape, 6 * n,
            lambda grad, gate, up, name=name: ops.gated_backward_(grad, gate, up, name), {},
            (grad, gate.detach(), up.detach()), overwrites=True,
        )  # fmt: skip


def losses(s: Setting) -> Iterator[Case]:
    """Liger computes the gradient in forward, over the logits; so does lorakit in place, which is
    what `linear_cross_entropy` does to a chunk.
    """
    ops, T = lk.kernels, s.sizes.tokens
    module = lk.kernels.ops.cross_entropy
    for V in s.sizes.vocabularies:
        logits, y = s.random(T, V, grad=True), torch.randint(V, (T,), device=s.device)
        yield Case(
            "cross_entropy", f"{T}x{V}", logits.nbytes, lambda z, y=y: ops.cross_entropy(z, y)[0],
            {
                "torch": lambda z, y=y: F.cross_entropy(z.float(), y, reduction="sum"),
                "Liger": lambda z, y=y: liger().LigerCrossEntropyFunction.apply(z, y, None)[0],
            }, (logits,), 2 * logits.nbytes,
        )  # fmt: skip

        def in_place(z: Tensor, y: Tensor = y) -> tuple[Tensor, Tensor | None]:
            backend = ops.dispatch.backend(module.__name__, z.device)
            return backend.loss_and_gradient(z, y, module.Form(), True, -100)

        yield Case(
            "cross_entropy in place", f"{T}x{V}", 2 * logits.nbytes, in_place, {},
            (logits.detach(),), overwrites=True,
        )  # fmt: skip


def heads(s: Setting) -> Iterator[Case]:
    """The product with a frozen head and the loss in one; lorakit and Liger compute the gradient
    in forward.
    """
    T, H, V = s.sizes.tokens, s.sizes.hidden, s.sizes.vocabularies[0]
    hidden, labels = s.random(T, H, grad=True), torch.randint(V, (T,), device=s.device)
    weight = s.random(V, H) * H**-0.5

    def by_torch(h: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, weight).float(), labels, reduction="sum")

    def by_liger(h: Tensor) -> Tensor:
        return liger().LigerFusedLinearCrossEntropyFunction.apply(h, weight, labels)[0]

    yield Case(
        "linear_cross_entropy", f"{T}x{H}x{V}", hidden.nbytes + weight.nbytes,
        lambda h: lk.kernels.linear_cross_entropy(h, weight, labels)[0],
        {"torch": by_torch, "Liger": by_liger}, (hidden,), 2 * hidden.nbytes,
    )  # fmt: skip


def optimizer(s: Setting) -> Iterator[Case]:
    ops = lk.kernels
    p, g = ([torch.randn(n, device=s.device) for n in s.sizes.trained] for _ in range(2))
    m, v = ([torch.zeros_like(t) for t in p] for _ in range(2))
    copies = [nn.Parameter(t.clone()) for t in p]
    for parameter, grad in zip(copies, g, strict=True):
        parameter.grad = grad
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    fused = torch.optim.AdamW(copies, **options, fused=True)
    total = sum(s.sizes.trained)
    shape = f"{len(p)} of {total / 1e6:.0f}M"
    yield Case(
        "adamw", shape, 28 * total, lambda: ops.adamw_step(p, g, m, v, step=9, **options),
        {"torch fused": fused.step},
    )  # fmt: skip
    m8, v8 = ([ops.Moment8bit.zeros(n, s.device) for n in s.sizes.trained] for _ in range(2))
    theirs = functools.cache(lambda: bnb().optim.AdamW8bit(copies, **options))
    yield Case(
        "adamw 8-bit", shape, 16 * total + 16 * total // 256,
        lambda: ops.adamw_step_8bit(p, g, m8, v8, step=9, **options),
        {"bitsandbytes": lambda: theirs().step()},
    )  # fmt: skip


def pack_by_bnb(w: Tensor):
    return bnb().functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)


def quantization(s: Setting) -> Iterator[Case]:
    """Double quantization on, blocks of 64. In panels: all of the matrix in memory that exists, a
    piece after the other, as products take it.
    """
    ops, panels = lk.kernels, lk.kernels.ops.frozen_linear.dense.panels
    for N, K in s.sizes.matrices:
        w, shape = torch.randn(N, K, device=s.device), f"{N}x{K}"
        q, q8 = ops.quantize_nf4(w), ops.quantize_int8(w)
        yield Case(
            "nf4 quantize", shape, w.nbytes + q.nbytes, lambda w=w: ops.quantize_nf4(w),
            {"bitsandbytes": lambda w=w: pack_by_bnb(w)},
        )  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16):
            packed = functools.cache(lambda w=w, d=dtype: pack_by_bnb(w.to(d)))
            yield Case(
                f"nf4 to {dtype_name(dtype)}", shape, q.nbytes + N * K * dtype.itemsize,
                lambda q=q, d=dtype: ops.dequantize_nf4(q, d),
                {"bitsandbytes": lambda p=packed: bnb().functional.dequantize_4bit(*p())},
            )  # fmt: skip
        yield Case(
            "nf4 panels", shape, q.nbytes + N * K * s.dtype.itemsize,
            lambda q=q: [None for _ in panels(q, s.dtype)], {},
            kernels=("reference", "cpu"),
        )  # fmt: skip
        yield Case(
            "int8 dequantize", shape, q8.nbytes + N * K * s.dtype.itemsize,
            lambda q=q8: ops.dequantize_int8(q, s.dtype),
            {"torch": lambda q=q8: (q.values * (q.scale[:, None] / 127)).to(s.dtype)},
            kernels=("reference",),
        )  # fmt: skip
        T, dense = s.sizes.tokens, w.to(s.dtype)
        rows, moved = torch.randint(N, (T,), device=s.device), T * (q.nbytes // N + dense[0].nbytes)
        yield Case(
            "nf4 rows", f"{T} of {shape}", moved,
            lambda q=q, rows=rows: ops.dequantize_rows(q, rows, s.dtype),
            {"torch": lambda w=dense, rows=rows: F.embedding(rows, w)},
        )  # fmt: skip


def products(s: Setting) -> Iterator[Case]:
    """x [M, K] with a packed weight [N, K], without gradients, as in generation."""
    ops, module = lk.kernels, lk.kernels.ops.frozen_linear

    def by_way(way: tuple[int, int], x: Tensor, q: object) -> Tensor:
        forced = dict.fromkeys(module.FEW_ROWS, module.FewRows(*way))
        with mock.patch.dict(module.FEW_ROWS, forced), ops.use_backend("triton"):
            return ops.frozen_linear(x, q)

    for N, K in s.sizes.matrices:
        w = s.random(N, K) * K**-0.5
        q, packed = ops.quantize_nf4(w), functools.cache(functools.partial(pack_by_bnb, w))

        def by_bnb(x: Tensor, packed: Callable = packed) -> Tensor:
            codes, state = packed()
            return bnb().matmul_4bit(x, codes.t(), state)

        for M in s.sizes.rows:
            x = s.random(M, K)
            yield Case(
                "frozen_linear", f"{M} x {N}x{K}", q.nbytes + M * (K + N) * x.itemsize,
                lambda x=x, q=q: ops.frozen_linear(x, q),
                {
                    "dequantize, torch": lambda x=x, q=q: F.linear(x, ops.dequantize(q, x.dtype)),
                    "bitsandbytes": functools.partial(by_bnb, x),
                    **{name: functools.partial(by_way, way, x, q) for name, way in WAYS.items()},
                },
            )  # fmt: skip


class GatedMLP(nn.Module):
    """A gated MLP of frozen weights [N, K], by the names of its three layers."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        for name, weight in weights.items():
            layer = nn.Linear(*weight.t().shape, bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def with_peft(module: nn.Module, targets: list[str]) -> nn.Module:
    """The linear layers `targets` of `module`, by the last part of their names, in bitsandbytes'
    NF4 with double quantization and under PEFT's adapters, in place.
    """
    import peft

    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets:
            weight, options = layer.weight.detach(), {"quant_type": "nf4"}
            packed = bnb().nn.Linear4bit(
                *weight.t().shape, bias=False, compute_dtype=weight.dtype, device="meta", **options
            )
            packed.weight = bnb().nn.Params4bit(weight, requires_grad=False, **options)
            module.set_submodule(name, packed.to(weight.device))
    module.is_loaded_in_4bit = True  # what PEFT asks
    config = peft.LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=targets)
    return peft.inject_adapter_in_model(config, module)


def mixed_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """What transformers' Trainer runs PEFT in; without it PEFT computes the updates in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def adapters(s: Setting) -> Iterator[Case]:
    """LoRA over NF4: one layer, and a gated MLP."""
    ops, T, H, inner = lk.kernels, s.sizes.tokens, s.sizes.hidden, s.sizes.inner
    shapes = {"gate_proj": (inner, H), "up_proj": (inner, H), "down_proj": (H, inner)}
    dense = {name: s.random(N, K) * K**-0.5 for name, (N, K) in shapes.items()}
    bases = lk.quantize(GatedMLP(dense))
    x, parts = s.random(T, H, grad=True), []  # A and B of each layer, fp32
    for N, K in shapes.values():
        parts.append((torch.randn(RANK, K, device=s.device) * K**-0.5).requires_grad_())
        parts.append((torch.randn(N, RANK, device=s.device) * RANK**-0.5).requires_grad_())

    def weights(name: str, A: Tensor, B: Tensor):
        return ops.LoraWeights(bases.get_submodule(name), A, B, SCALING)

    def whole(x: Tensor, *parts: Tensor) -> Tensor:
        pairs = zip(shapes, parts[::2], parts[1::2], strict=True)
        return ops.lora_mlp(x, *(weights(*pair) for pair in pairs), "silu")

    theirs = functools.cache(lambda: with_peft(GatedMLP(dense), list(shapes)))

    def by_peft(module: nn.Module, x: Tensor, *parts: Tensor) -> Tensor:
        names = [name for name, _ in module.named_parameters() if "lora_" in name]
        with mixed_precision(s.device, s.dtype):
            return torch.func.functional_call(module, dict(zip(names, parts, strict=True)), (x,))

    packed = {name: sum(p.nbytes for p in bases.get_submodule(name).parameters()) for name in dense}
    out = x.nbytes // H * inner
    yield Case(
        "lora_linear", f"{T} x {inner}x{H}", packed["gate_proj"] + x.nbytes + out,
        lambda x, A, B: ops.lora_linear(x, weights("gate_proj", A, B)),
        {"PEFT, bitsandbytes": lambda *inputs: by_peft(theirs().gate_proj, *inputs)},
        (x, *parts[:2]), packed["gate_proj"] + 2 * x.nbytes + out,
    )  # fmt: skip
    total = sum(packed.values())
    yield Case(
        "lora_mlp", f"{T} x {inner}x{H}", total + 2 * x.nbytes, whole,
        {"PEFT, bitsandbytes": lambda *inputs: by_peft(theirs(), *inputs)},
        (x, *parts), total + 3 * x.nbytes,
    )  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The functions above, with the ops of their cases; first what a step spends its time on, as a run
# on a GPU may be cut off.
CASES: dict[Callable[[Setting], Iterator[Case]], tuple[str, ...]] = {
    adapters: ("lora_linear", "lora_mlp"),
    heads: ("linear_cross_entropy",),
    attentions: ("attention", "attention packed"),
    delta_nets: ("causal_conv", "gated_delta_net"),
    quantization: (
        "nf4 quantize", "nf4 to float32", "nf4 to bfloat16", "nf4 panels", "nf4 rows",
        "int8 dequantize",
    ),
    products: ("frozen_linear",),
    norms: ("rms_norm", "add_rms_norm"),
    rotation: ("rope", "norm_rope"),
    activations: (
        "swiglu", "geglu", "swiglu backward in place", "geglu backward in place"
    ),
    losses: ("cross_entropy", "cross_entropy in place"),
    optimizer: ("adamw", "adamw 8-bit"),
}  # fmt: skip
