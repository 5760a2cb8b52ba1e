"""Liger's and bitsandbytes' Triton kernels, for the table of static_gpu.py.

`cases` calls the installed packages as their users do, on CPU tensors of the shapes and dtypes that
static_gpu.py has under the same name; that program notes the launches and compiles them. A package
that is not installed has no cases.

Liger chooses by the GPU, so it is told that it runs on the target: on Blackwell it cuts the rows of
SwiGLU into tiles and gives cross-entropy 8 warps instead of 32, on AMD 16. Backward of its RMSNorm
shares the rows out among the multiprocessors, of which it sees one on a CPU: 8 rows a program here
are what 1056 rows are on an H100, the same kernel.

bitsandbytes launches its Triton kernels on Intel GPUs alone. On NVIDIA's and AMD's it has others,
in CUDA and HIP, which are not compiled here. Its module of ops cannot be imported where torch finds
no accelerator; what is called here are the functions that it calls, on the tensors it would make.

Neither package tunes these kernels at run time. The values of a program's pass are, for Liger, a
row, and for rope a token, all heads of q and k. Its cross-entropy is one kernel with two loops, for
the loss and for the gradient, of 32768 logits a pass: it compares with the sum of lorakit's forward
and backward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from unittest import mock

import torch
from torch import Tensor


def cases(target: str = "sm_90") -> Iterator[tuple[str, str, Callable[[], None], int]]:
    """What the peers launch on `target`, a name in static_gpu.TARGETS: the peer, the op as
    static_gpu.py calls it, the call, and the values of a program's pass.
    """
    if find_spec("liger_kernel") is not None:
        yield from _liger(target)
    if find_spec("bitsandbytes") is not None:
        yield from _bitsandbytes()


def _liger(target: str) -> Iterator[tuple[str, str, Callable[[], None], int]]:
    from liger_kernel import ops  # takes seconds, for it imports peft where that is installed

    blackwell = target in ("sm_100", "sm_120")

    @contextmanager
    def on_target() -> Iterator[None]:
        family, hip = "blackwell" if blackwell else "hopper", target.startswith("gfx")
        with (
            mock.patch("liger_kernel.ops.cross_entropy.infer_device_arch", return_value=family),
            mock.patch("liger_kernel.ops.swiglu.infer_device_arch", return_value=family),
            mock.patch("liger_kernel.ops.cross_entropy.is_hip", return_value=hip),
        ):
            yield

    def bf16(*shape: int, grad: bool = True) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).requires_grad_(grad)

    def both(function: type[torch.autograd.Function], *arguments) -> Callable[[], None]:
        def run() -> None:
            with on_target():
                y = function.apply(*arguments)
                y = y if isinstance(y, tuple) else (y,)
                torch.autograd.backward(y, [torch.empty_like(t) for t in y])

        return run

    norm, add_norm = ops.LigerRMSNormFunction, ops.LigerFusedAddRMSNormFunction
    x, w = bf16(8, 4096), bf16(4096, grad=False)
    yield "Liger", "rms_norm 4096", both(norm, x, w, 1e-5), 4096
    yield "Liger", "rms_norm 4096 with dw", both(norm, x, bf16(4096), 1e-5), 4096
    gemma = bf16(8, 2304), bf16(2304, grad=False), 1e-6, 1.0, "gemma"
    yield "Liger", "rms_norm 2304 gemma", both(norm, *gemma), 2304
    yield "Liger", "add_rms_norm 4096", both(add_norm, x, bf16(8, 4096), w, 1e-5), 4096

    q, k = (bf16(1, 8, heads, 128).transpose(1, 2) for heads in (32, 8))
    # Liger computes in the tables' dtype, which transformers makes bf16; lorakit's are fp32
    for peer, dtype in (("Liger", torch.bfloat16), ("Liger fp32", torch.float32)):
        table = torch.empty(1, 8, 128, dtype=dtype)
        yield peer, "rope 128", both(ops.LigerRopeFunction, q, k, table, table), (32 + 8) * 128

    gate, up = bf16(8, 14336), bf16(8, 14336)
    tile = 1024 if blackwell else 14336
    yield "Liger", "swiglu", both(ops.LigerSiLUMulFunction, gate, up), tile
    yield "Liger", "geglu tanh", both(ops.LigerGELUMulFunction, gate, up), 14336

    labels = torch.zeros(4, dtype=torch.int64)
    for vocabulary, cap in ((128256, None), (151936, None), (256000, 30.0), (50257, None)):
        logits = bf16(4, vocabulary)
        options = None, -100, 0.0, 0.0, "mean", cap

        def run(logits: Tensor = logits, options: tuple = options) -> None:
            with on_target():
                loss = ops.LigerCrossEntropyFunction.apply(logits, labels, *options)[0]
                loss.backward()  # from 1; any other gradient costs a second pass over the logits

        yield "Liger", f"cross_entropy {vocabulary}" + (" capped" if cap else ""), run, 32768


def _bitsandbytes() -> Iterator[tuple[str, str, Callable[[], None], int]]:
    from bitsandbytes.backends.triton import kernels_4bit, kernels_8bit_quant, kernels_optim

    peer, n, block = "bitsandbytes", 64 * 4096, 64
    codes, scales = torch.empty(n // 2, 1, dtype=torch.uint8), torch.empty(n // block)
    y = torch.empty(64, 4096, dtype=torch.bfloat16)
    code = torch.empty(256)  # the levels of 8 bits

    def dequantize() -> None:
        kernels_4bit.dequantize_4bit_impl(codes, scales, block, "nf4", y.dtype, out=y)

    def dequantize_scales() -> None:
        nested = torch.empty(n // block, dtype=torch.uint8), torch.empty(n // block // 256)
        kernels_8bit_quant.dequant_8bit_blockwise(*nested, code, 256, dtype=torch.float32)

    yield peer, "nf4 dequantize", dequantize, 512
    # double quantization is undone in a launch before, 256 scales a program (and an addition)
    yield peer, "nf4 dequantize double", dequantize_scales, 256 * block
    yield peer, "nf4 dequantize double", dequantize, 512

    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        w, absmax = torch.empty(64, 4096, dtype=dtype), torch.empty(n // block, dtype=dtype)

        def quantize(w: Tensor = w, absmax: Tensor = absmax) -> None:
            pairs = n // block // 2
            kernels_4bit.quantize_4bit_blockwise_triton(w, block, "nf4", pairs, absmax, n, codes)

        yield peer, f"nf4 quantize {name}", quantize, 512

    g, p, m, v = torch.empty(4, 4096)
    adam = {"beta1": 0.9, "beta2": 0.999, "beta3": 0.0, "alpha": 0.0, "eps": 1e-8}
    adam |= {"weight_decay": 0.0, "step": 1, "lr": 1e-3}

    def adamw() -> None:
        kernels_optim.optimizer_update_32bit_impl("adam", g, p, m, v, None, 0.0, 0.0, **adam)

    def adamw_8bit() -> None:
        m8, v8 = torch.empty(2, 4096, dtype=torch.uint8)
        absmax1, absmax2 = torch.empty(2, 16)
        kernels_optim.optimizer_update_8bit_blockwise_impl(
            "adam", g, p, m8, v8, **adam, qmap1=code, qmap2=code, absmax1=absmax1, absmax2=absmax2
        )

    yield peer, "adamw", adamw, 256
    yield peer, "adamw 8-bit", adamw_8bit, 256
