"""Decoding speed on the CPU: lorakit beside transformers' generate, in one run.

    python benchmarks/generation.py MODEL.gguf [--dtype bfloat16] [--tokens 128] [--repeats 5]
                                    [--quantize nf4 | int8] [--lora 16]

MODEL is a directory, a .gguf file or a Hub id; both sides load the same safetensors, which are
written to a temporary directory first. --quantize packs lorakit's weights alone, and --lora
attaches an adapter of that rank to all its linear layers. Both continue the same prompt greedily,
by one token and by exactly --tokens more: the first takes the prompt's time, the difference is the
decoding. The sides alternate, so that whatever else the machine does hits both; the figures are
medians with the range of the repeats.
"""

import argparse
import dataclasses
import platform
import statistics
import tempfile
import time
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM

import lorakit as lk

PROMPT = "The Roman Empire was the post-Republican period of ancient Rome. As a polity, it included"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quantize", choices=("nf4", "int8"))
    parser.add_argument("--lora", type=int, metavar="RANK")
    args = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("lorakit", "torch", "transformers"))
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, instruction set "
        f"{torch.backends.cpu.get_cpu_capability()}, {versions}"
    )
    with tempfile.TemporaryDirectory() as folder:
        lk.save_model(lk.load_model(args.model, dtype=args.dtype, device="cpu"), folder)
        tok = lk.load_tokenizer(folder)
        ours = lk.load_model(folder, dtype=args.dtype, device="cpu", quantize=args.quantize)
        if args.lora is not None:
            lk.attach(ours, lk.LoraConfig(r=args.lora, target_modules="all-linear"))
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, args.dtype)
        ).eval()
    ids = torch.tensor([tok.encode(PROMPT)])
    # no end token, so that both sides write as many tokens as they are asked to
    ours.config = dataclasses.replace(ours.config, eos_token_id=None)
    tok.special_tokens, tok.chat_template = {}, None

    def lorakit(count: int) -> str:
        return lk.generate(ours, tok, PROMPT, max_new_tokens=count)

    def transformers(count: int) -> str:
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return tok.decode(out[0, ids.shape[1] :].tolist())

    sides = {"lorakit": lorakit, "transformers": transformers}
    texts = {name: side(args.tokens + 1) for name, side in sides.items()}  # and warm up
    prompts, rates = {name: [] for name in sides}, {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            side(1)
            middle = time.perf_counter()
            side(args.tokens + 1)
            prompt = middle - started
            prompts[name].append(prompt)
            rates[name].append(args.tokens / (time.perf_counter() - middle - prompt))
    weights = sum(p.nbytes for p in ours.parameters())
    memory = torch.ones(weights // 8, dtype=torch.int64)
    reads = []
    for _ in range(9):
        started = time.perf_counter()
        memory.sum()
        reads.append(time.perf_counter() - started)
    peer = statistics.median(rates["transformers"])
    name = args.model.rpartition("/")[2]
    print(f"{name}, {args.dtype}, {args.tokens} tokens after a prompt of {ids.shape[1]}")
    print(f"{'':14} {'prompt ms':>9} {'tokens/s':>9} {'range':>13} {'GB/s':>6} {'x':>6}")
    for name in sides:
        rate, span = (
            statistics.median(rates[name]),
            f"{min(rates[name]):.1f}-{max(rates[name]):.1f}",
        )
        print(
            f"{name:14} {1e3 * statistics.median(prompts[name]):9.0f} {rate:9.1f} {span:>13} "
            f"{rate * weights / 1e9:6.1f} {rate / peer:6.2f}"
        )
    same = len(_common(*texts.values())) / max(len(text) for text in texts.values())
    plain = weights / statistics.median(reads) / 1e9
    print(
        f"GB/s: the weights, read once per token; a plain sum over as many bytes: {plain:.1f} GB/s."
    )
    print(f"The same text for {same:.0%} of its length.")


def _common(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]


if __name__ == "__main__":
    main()
