"""Every op as a function and its inputs, for tests that ask the same of all of them."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit import kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
Op = tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[Tensor]]


class Shape(NamedTuple):
    """The sizes of rows [rows, width], heads [1, rows, 3, head_dim], logits [rows, vocabulary]."""

    device: torch.device
    dtype: torch.dtype
    rows: int
    width: int
    head_dim: int
    vocabulary: int

    def random(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        return random(self.device, *shape, seed=seed, scale=scale).to(self.dtype)

    def labels(self) -> Tensor:
        """Make labels, of which some do not count."""
        generator = torch.Generator().manual_seed(9)
        labels = torch.randint(self.vocabulary, (self.rows,), generator=generator)
        ignored = torch.rand(self.rows, generator=generator) < 0.3
        return labels.masked_fill(ignored, -100).to(self.device)


def random(device: torch.device, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal fp32; the same for the same seed and kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device) * scale


def outputs_and_gradients(f: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """Run f and its backward, for gradients that depend on the shapes of its outputs alone."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = f(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    if not leaves:
        return list(out)
    given = [random(y.device, *y.shape, seed=i).to(y.dtype) for i, y in enumerate(out)]
    return [y.detach() for y in out] + list(torch.autograd.grad(out, leaves, given))


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    flat = (x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(*flat)


def parts(q: kernels.NF4Tensor) -> tuple[Tensor, ...]:
    found = (q.codes, q.absmax, q.nested_absmax, q.offset)
    return tuple(part for part in found if part is not None)


def rms_norm(s: Shape) -> Op:
    w = s.random(s.width, seed=1)
    return lambda x: kernels.rms_norm(x, w, 1e-5), [s.random(s.rows, s.width)]


def rms_norm_of_a_trained_weight(s: Shape) -> Op:
    inputs = [s.random(s.rows, s.width), s.random(s.width, seed=1)]
    return lambda x, w: kernels.rms_norm(x, w, 1e-5), inputs


def add_rms_norm(s: Shape) -> Op:
    gemma = {"weight_offset": 1.0, "casting_mode": "gemma"}
    inputs = [s.random(s.rows, s.width), s.random(s.rows, s.width, seed=1)]
    inputs.append(s.random(s.width, seed=2))
    return lambda x, r, w: kernels.add_rms_norm(x, r, w, 1e-5, **gemma), inputs


def rope(s: Shape, **options) -> Op:
    angle = random(s.device, 1, s.rows, s.head_dim // 2, seed=2, scale=5)
    cos, sin = angle.cos(), angle.sin()
    q, k = (s.random(1, s.rows, n, s.head_dim, seed=n) for n in (2, 1))
    return lambda q, k: kernels.rope(q, k, cos, sin, **options), [q, k]


def rope_in_place(s: Shape) -> Op:
    f, inputs = rope(s, inplace=True)
    return lambda q, k: f(q.clone(), k.clone()), inputs


def norm_rope(s: Shape) -> Op:
    angle = random(s.device, 1, s.rows, s.head_dim // 2, seed=2, scale=5)
    cos, sin = angle.cos(), angle.sin()
    wq, wk = (s.random(s.head_dim, seed=i) for i in (3, 4))
    inputs = [s.random(1, s.rows, n, s.head_dim, seed=n) for n in (2, 1)]
    return lambda q, k: kernels.norm_rope(q, k, wq, wk, 1e-6, cos, sin), inputs


def attention(s: Shape, **options) -> Op:
    inputs = [s.random(1, s.rows, n, s.head_dim, seed=i) for i, n in enumerate((4, 2, 2))]
    return lambda q, k, v: kernels.attention(q, k, v, **options), inputs


def causal_conv(s: Shape) -> Op:
    inputs = [s.random(1, s.rows, s.width), random(s.device, s.width, 4, seed=1)]
    return lambda x, w: kernels.causal_conv(x, w), inputs


def gated_delta_net(s: Shape) -> Op:
    """Build the op of 16-bit operands, which its kernels take."""
    dtype = torch.bfloat16 if s.dtype == torch.float32 else s.dtype
    shapes = [(1, s.rows, n, s.head_dim) for n in (1, 1, 2)]
    inputs = [random(s.device, *shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    inputs += [random(s.device, 1, s.rows, 2, seed=i) for i in (3, 4)]

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return kernels.gated_delta_net(q, k, v, -g.square(), beta.sigmoid())

    return run, inputs


def gated(s: Shape, hidden_act: str) -> Op:
    inputs = [s.random(s.rows, s.width, seed=i, scale=3) for i in range(2)]
    return lambda gate, up: kernels.gated(gate, up, hidden_act), inputs


def cross_entropy(s: Shape) -> Op:
    labels, options = s.labels(), {"softcap": 20.0, "label_smoothing": 0.1, "z_loss": 1e-3}
    logits = s.random(s.rows, s.vocabulary, scale=4)
    return lambda z: kernels.cross_entropy(z, labels, **options)[0], [logits]


def linear_cross_entropy(s: Shape) -> Op:
    labels = s.labels()
    inputs = [s.random(s.rows, s.width), s.random(s.vocabulary, s.width, seed=1, scale=0.1)]
    return lambda h, w: kernels.linear_cross_entropy(h, w, labels)[0], inputs


def linear_cross_entropy_of_a_packed_head(s: Shape) -> Op:
    labels, head = s.labels(), kernels.quantize_nf4(s.random(s.vocabulary, s.width, seed=1))
    return lambda h: kernels.linear_cross_entropy(h, head, labels)[0], [s.random(s.rows, s.width)]


def quantize(s: Shape, **options) -> Op:
    w = s.random(s.rows, s.width)
    pack = kernels.quantize_fp4 if options.pop("fp4", False) else kernels.quantize_nf4
    return lambda: parts(pack(w, **options)), []


def dequantize(s: Shape, **options) -> Op:
    q = kernels.quantize_nf4(s.random(s.rows, s.width), **options)
    return lambda: kernels.dequantize_nf4(q), []


def dequantize_rows(s: Shape) -> Op:
    q = kernels.quantize_nf4(s.random(s.vocabulary, s.width))
    rows = s.labels().clamp(min=0)
    return lambda: kernels.dequantize_rows(q, rows), []


def frozen_linear(s: Shape, rows: int) -> Op:
    q = kernels.quantize_nf4(s.random(s.vocabulary, s.width, scale=s.width**-0.5))
    return lambda x: kernels.frozen_linear(x, q), [s.random(rows, s.width)]


def lora_mlp(s: Shape) -> Op:
    names, inner = ("gate_proj", "up_proj", "down_proj"), s.head_dim
    shapes = [(inner, s.width), (inner, s.width), (s.width, inner)]
    bases, inputs = nn.ModuleDict(), [s.random(s.rows, s.width)]
    for i, (name, (N, K)) in enumerate(zip(names, shapes, strict=True)):
        bases[name] = nn.Linear(K, N, bias=False, device="meta")
        bases[name].weight = nn.Parameter(s.random(N, K, seed=i, scale=K**-0.5))
        inputs += [random(s.device, 8, K, seed=i + 3, scale=K**-0.5)]
        inputs += [random(s.device, N, 8, seed=i + 6)]
    bases = lk.quantize(bases)

    def f(x: Tensor, *small: Tensor) -> Tensor:
        pairs = zip(names, small[::2], small[1::2], strict=True)
        layers = [kernels.LoraWeights(bases[name], A, B, 0.5) for name, A, B in pairs]
        return kernels.lora_mlp(x, *layers, "silu")

    return f, inputs


def adamw_step(s: Shape) -> Op:
    """Tensors of odd sizes; always fp32."""
    sizes = (s.rows * s.width, s.width, 1, s.rows)
    state = [[random(s.device, n, seed=i) for n in sizes] for i in range(4)]

    def f() -> tuple[Tensor, ...]:
        p, g, m, v = ([t.clone() for t in tensors] for tensors in state)
        v = [t.abs_() for t in v]
        kernels.adamw_step(p, g, m, v, step=3, **ADAMW)
        return (*p, *m, *v)

    return f, []


def adamw_step_8bit(s: Shape) -> Op:
    sizes = (s.rows * s.width, s.width, 1, 257)
    state = [[random(s.device, n, seed=i) for n in sizes] for i in range(2)]

    def f() -> tuple[Tensor, ...]:
        p, g = ([t.clone() for t in tensors] for tensors in state)
        m, v = ([kernels.Moment8bit.zeros(n, s.device) for n in sizes] for _ in range(2))
        for step in (1, 2):
            kernels.adamw_step_8bit(p, g, m, v, step=step, **ADAMW)
        return (*p, *(part for moment in m + v for part in moment))

    return f, []


OPS: dict[str, Callable[[Shape], Op]] = {
    "attention": attention,
    "attention with a window": partial(attention, window=9),
    "rms_norm": rms_norm,
    "rms_norm of a trained weight": rms_norm_of_a_trained_weight,
    "add_rms_norm": add_rms_norm,
    "rope": rope,
    "rope in place": rope_in_place,
    "norm_rope": norm_rope,
    "causal_conv": causal_conv,
    "gated_delta_net": gated_delta_net,
    "swiglu": partial(gated, hidden_act="silu"),
    "geglu tanh": partial(gated, hidden_act="gelu_pytorch_tanh"),
    "geglu": partial(gated, hidden_act="gelu"),
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_cross_entropy of a packed head": linear_cross_entropy_of_a_packed_head,
    "quantize": quantize,
    "quantize fp4": partial(quantize, fp4=True, double_quant=False, block_size=128),
    "quantize searching": partial(quantize, search_scales=True),
    "dequantize": dequantize,
    "dequantize plain": partial(dequantize, double_quant=False, block_size=4096),
    "dequantize rows": dequantize_rows,
    "frozen_linear of 1": partial(frozen_linear, rows=1),
    "frozen_linear of 5": partial(frozen_linear, rows=5),
    "frozen_linear of 300": partial(frozen_linear, rows=300),
    "lora_mlp": lora_mlp,
    "adamw": adamw_step,
    "adamw 8-bit": adamw_step_8bit,
}
