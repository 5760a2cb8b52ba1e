"""GGUF's blocks: quantizing beside llama.cpp on one thread, in one run.

    python benchmarks/gguf_blocks.py [--rows 1024] [--columns 2048] [--repeats 7]

Prints millions of weights a second, of normal values in fp32, and lorakit's over llama.cpp's. The
sides take turns; a rate is that of the median of the repeats. `bytes` says whether both wrote the
same. llama.cpp is `ggml_quantize_chunk` of the xllamacpp wheel.
"""

import argparse
import ctypes
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

import lorakit as lk

# numbers of ggml_type
TYPES = {
    "q8_0": 8, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "iq4_nl": 20,
    "q4_k": 12, "q5_k": 13, "q6_k": 14,
}  # fmt: skip


def llama_cpp() -> Callable[[Tensor, str, Tensor | None], Tensor]:
    """Return llama.cpp's function, with the arguments of lk.kernels.quantize_blocks."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or not found.submodule_search_locations:
        sys.exit("the package xllamacpp is not installed: pip install xllamacpp")
    module = next(Path(found.submodule_search_locations[0]).glob("xllamacpp*.so"))
    library = ctypes.CDLL(str(module))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.ggml_row_size.restype = library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, size]
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[pointer] * 2, *[size] * 3, pointer]

    def quantize(w: Tensor, block_type: str, importance: Tensor | None) -> Tensor:
        number, (rows, columns) = TYPES[block_type], w.shape
        out = torch.empty(rows, library.ggml_row_size(number, columns), dtype=torch.uint8)
        given = None if importance is None else importance.data_ptr()
        library.ggml_quantize_chunk(number, w.data_ptr(), out.data_ptr(), 0, rows, columns, given)
        return out

    return quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sides = {"lorakit": lk.kernels.quantize_blocks, "llama.cpp": llama_cpp()}
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(args.rows, args.columns, generator=generator)
    importance = torch.rand(args.columns, generator=generator)
    packages = ", ".join(f"{name} {version(name)}" for name in ("lorakit", "torch", "xllamacpp"))
    print(
        f"[{args.rows}, {args.columns}], one thread, Python {platform.python_version()}, {packages}"
    )
    print(f"{'type':8} {'importance':10} {'lorakit':>8} {'llama.cpp':>9} {'x':>5}  bytes")
    for block_type in TYPES:
        for given in (None, importance) if block_type != "q8_0" else (None,):
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            blocks = {}
            for _ in range(args.repeats):
                for name, quantize in sides.items():
                    start = time.perf_counter()
                    blocks[name] = quantize(w, block_type, given)
                    seconds[name].append(time.perf_counter() - start)
            ours, theirs = (w.numel() / 1e6 / statistics.median(seconds[name]) for name in sides)
            same = "equal" if torch.equal(*blocks.values()) else "differ"
            print(
                f"{block_type:8} {'yes' if given is not None else 'no':10} {ours:8.1f} "
                f"{theirs:9.1f} {ours / theirs:5.1f}  {same}",
                flush=True,
            )


if __name__ == "__main__":
    main()
