"""Exporting to GGUF: what a format costs a model, and how long writing takes in how much memory.

    python benchmarks/export.py loss MODEL [--adapter DIR] [--rows FILE] [--types q8_0,q4_k_m]
    python benchmarks/export.py speed TOKENIZER [--type q4_k_m] [--repeats 1]

`loss` writes the model in each type and compares it with the model in fp32: the KL divergence in
nats and the share of equal top tokens, read by lorakit in fp32 (`check_export`), and of the same
file in llama.cpp, which rounds activations as its format has it. Both sides see the same positions
of the same rows, or of a text that comes with lorakit. `bytes` says whether every matrix of the
file is what llama.cpp's own quantizer makes of the same weights.

`speed` writes a random model of Qwen2.5-1.5B's shapes in bf16 first, with the tokenizer of a model.
Then a process of its own exports it. The peak is the process's resident memory, Python and torch
included, and the mapped pages of the model's files too: the system drops those when memory is
short. So the peak without them, of anonymous memory, stands beside it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import gguf
import gguf_blocks
import torch
from torch import Tensor

import lorakit as lk
import lorakit.export.sample
import lorakit.models.decoder

WIDTHS = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936,
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPORT = """if True:
    import json, sys, threading, time
    import torch
    import lorakit as lk
    torch.set_num_threads(int(sys.argv[4]))
    peaks, done = {"RssAnon": 0, "VmRSS": 0}, threading.Event()
    def watch():
        while not done.wait(0.01):
            for line in open("/proc/self/status"):
                name, _, rest = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(rest.split()[0]) * 1024)
    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    written = lk.export_gguf(sys.argv[1], sys.argv[2], quantization=sys.argv[3])
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    print(json.dumps({"seconds": seconds, "size": written.size, **peaks}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    loss = verbs.add_parser("loss")
    loss.add_argument("model")
    loss.add_argument("--adapter")
    loss.add_argument("--rows", help="file of rows; without it a text of lorakit's own")
    loss.add_argument("--types", default="bf16,q8_0,q6_k,q5_k_m,q4_k_m")
    speed = verbs.add_parser("speed")
    speed.add_argument("tokenizer", help="model whose tokenizer is written")
    speed.add_argument("--type", default="q4_k_m")
    speed.add_argument("--threads", type=int, default=2)
    speed.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    names = ("lorakit", "torch", "xllamacpp")
    print(platform.machine(), *(f"{name} {version(name)}" for name in names), sep=", ")
    with tempfile.TemporaryDirectory() as folder:
        (print_loss if args.verb == "loss" else print_speed)(args, Path(folder))


# ---- what a format costs ------------------------------------------------------------------------


def llama_cpp() -> ModuleType:
    """Return tests/export/llama_cpp.py, which calls llama.cpp's C functions for logits."""
    path = Path(__file__).parents[1] / "tests" / "export" / "llama_cpp.py"
    spec = spec_from_file_location("llama_cpp", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def print_loss(args: argparse.Namespace, folder: Path) -> None:
    model = lk.load_model(args.model, dtype="float32", device="cpu")
    if args.adapter is not None:
        lk.load_adapter(model, args.adapter)
    beside = args.adapter is not None and (Path(args.adapter) / "tokenizer.json").is_file()
    tok = lk.load_tokenizer(args.adapter if beside else args.model)
    rows = args.rows
    if rows is None:
        rows = [{"text": text} for text in lorakit.export.sample.TEXTS]
    texts = []
    for example in lk.encode_rows(rows, tok, max_seq_length=256)[:16]:
        texts.append((example.input_ids, torch.tensor(example.labels[1:]) != -100))
    oracle = llama_cpp()
    dense = folder / "f32.gguf"
    lk.export_gguf(args.model, dense, quantization="f32", adapter=args.adapter)
    with torch.no_grad():
        ours = [model(torch.tensor([ids]))[0, :-1][asked] for ids, asked in texts]
    print(f"{sum(map(len, ours))} positions of {len(texts)} rows")
    print(f"{'':16} {'lorakit':>19}   {'llama.cpp':>19}")
    print(f"{'type':8} {'MB':>7}" + 2 * f"   {'KL':>10} {'top-1':>8}" + "   bytes")
    for quantization in args.types.split(","):
        file = folder / f"{quantization}.gguf"
        written = lk.export_gguf(args.model, file, quantization=quantization, adapter=args.adapter)
        read = lk.load_model(file, dtype="float32", device="cpu")
        sides = []
        with torch.no_grad():
            found = [read(torch.tensor([ids]))[0, :-1][asked] for ids, asked in texts]
        sides.append(compared(ours, found))
        del read
        with oracle.LlamaCpp(file) as theirs:
            found = [theirs.logits(ids)[:-1][asked] for ids, asked in texts]
        sides.append(compared(ours, found))
        (kl, top), (their_kl, their_top) = sides
        print(
            f"{quantization:8} {written.size / 1e6:7.1f}   {kl:10.5f} {100 * top:6.1f} %   "
            f"{their_kl:10.5f} {100 * their_top:6.1f} %   {same_bytes(dense, file)}",
            flush=True,
        )
        file.unlink()


def same_bytes(dense: Path, file: Path) -> str:
    """Return whether llama.cpp's quantizer makes the matrices of `file` of those in fp32."""
    weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(dense).tensors}
    quantize, equal = gguf_blocks.llama_cpp(), []
    for tensor in gguf.GGUFReader(file).tensors:
        kind = tensor.tensor_type.name.lower()
        if kind in gguf_blocks.TYPES:
            w = torch.tensor(weights[tensor.name])
            theirs = quantize(w, kind, None)
            equal.append(torch.equal(theirs, torch.tensor(tensor.data)))
    return "-" if not equal else "equal" if all(equal) else f"{equal.count(False)} differ"


def compared(ours: list[Tensor], theirs: list[Tensor]) -> tuple[float, float]:
    """Return the mean KL divergence in nats, and the share of equal top tokens."""
    divergence, same, count = 0.0, 0, 0
    for each, other in zip(ours, theirs, strict=True):
        p, q = each.double().log_softmax(-1), other.double().log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        count += len(p)
    return divergence / count, same / count


# ---- how long writing takes ---------------------------------------------------------------------


def print_speed(args: argparse.Namespace, folder: Path) -> None:
    model = folder / "model"
    write_random(model, args.tokenizer)
    found = []
    for number in range(args.repeats):
        file = folder / f"{number}.gguf"
        options = [str(model), str(file), args.type, str(args.threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(
            [sys.executable, "-c", EXPORT, *options],
            env=environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        found.append(json.loads(done.stdout))
        file.unlink()
    seconds = statistics.median(each["seconds"] for each in found)
    peak, anonymous = (max(each[name] for each in found) for name in ("VmRSS", "RssAnon"))
    print(
        f"1.54 G parameters, bf16 -> {args.type}, {args.threads} threads: {seconds:.1f} s, "
        f"{found[0]['size'] / 1e9:.2f} GB written, peak {peak / 1e9:.2f} GB, "
        f"{anonymous / 1e9:.2f} GB without mapped files"
    )


def write_random(folder: Path, tokenizer: str) -> None:
    """Write a model of WIDTHS, each weight normal with a standard deviation of 0.02."""
    from safetensors.torch import save_file

    folder.mkdir()
    config = lk.ModelConfig.from_hf(WIDTHS, "WIDTHS")
    with torch.device("meta"):
        empty = lorakit.models.decoder.Decoder(config)
    shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(WIDTHS), encoding="utf-8")
    lk.load_tokenizer(tokenizer).save(folder)


if __name__ == "__main__":
    main()
