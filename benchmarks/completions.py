"""Sampling groups of completions, as GRPO does: lorakit beside transformers' generate, in one run.

    python benchmarks/completions.py MODEL [--dtype bfloat16] [--quantize nf4] [--lora 16]
                                     [--groups 8x8 1x64] [--prompt 96] [--tokens 64] [--repeats 3]
                                     [--ends]

MODEL is a directory, a .gguf file or a Hub id; both sides load the same safetensors, which are
written to a temporary directory first. lorakit samples with its engine, as objective grpo does, and
keeps log-probabilities too. The peer calls `generate` with num_return_sequences, as trainers of
transformers do, with top_k and top_p off. With --quantize nf4 it has bitsandbytes' layers, and with
--lora PEFT's adapter on all linear layers but the head.

A group 8x8 is 8 prompts of 8 completions each. Prompts have the same number of tokens, so that the
peer pads nothing, and nothing ends early. With --ends it is as in training: the prompts are
questions through the chat template, the model ends its answers where it wants to, and only tokens
up to that end are counted. The peer goes on with all rows until the last of them ends. The sides
draw other texts, so --repeats should be a few.

The sides alternate, so that whatever else the machine does hits both; the figures are medians with
the range of the repeats. Processor time leaves out the time in which other programs had the cores.
"""

import argparse
import dataclasses
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

import lorakit as lk

TEXT = "The Roman Empire was the post-Republican period of ancient Rome. "

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "What is 17 + 25?",
    "Who wrote Hamlet?",
    "Give me a word that rhymes with cat.",
    "Why is the sky blue? Answer in one sentence.",
    "Translate 'good morning' into Spanish.",
    "How many days has a week?",
)

# prompts, completions of each, seed -> number of new tokens
Side = Callable[[list[list[int]], int, int], int]


def lorakit_side(folder: str, tok: Any, args: argparse.Namespace) -> Side:
    model = lk.load_model(folder, dtype=args.dtype, device="cpu", quantize=args.quantize)
    adapter = None
    if args.lora is not None:
        adapter = "default"
        config = lk.LoraConfig(r=args.lora, lora_alpha=args.lora, target_modules="all-linear")
        lk.attach(model, config, name=adapter)
    if not args.ends:  # no end token, so that both sides write as many as they are asked to
        model.config = dataclasses.replace(model.config, eos_token_id=None)
        tok.special_tokens, tok.chat_template = {}, None
    engine = lk.Engine(model, tok, slots=64, capacity=args.prompt + args.tokens)
    sampling = lk.Sampling(temperature=1.0)

    def sample(prompts: list[list[int]], completions: int, seed: int) -> int:
        engine.forget()  # as after a step of training
        requests = [
            engine.submit(
                prompt,
                sampling,
                max_new_tokens=args.tokens,
                adapter=adapter,
                seed=(seed * len(prompts) + i) * completions + j,
                logprobs=0,
            )
            for i, prompt in enumerate(prompts)
            for j in range(completions)
        ]
        while not engine.idle:
            engine.step()
        return sum(len(each.tokens) + (each.end_token is not None) for each in requests)

    return sample


def transformers_side(folder: str, ends: list[int], args: argparse.Namespace) -> Side:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype, options = getattr(torch, args.dtype), dict[str, Any]()
    if args.quantize is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    if args.lora is not None:
        import peft

        config = peft.LoraConfig(
            r=args.lora,
            lora_alpha=args.lora,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, config).eval()

    @torch.no_grad()
    def sample(prompts: list[list[int]], completions: int, seed: int) -> int:
        torch.manual_seed(seed)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(each)) + each for each in prompts])
        there = [[0] * (longest - len(each)) + [1] * len(each) for each in prompts]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.tensor(there),
            max_new_tokens=args.tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=completions,
            eos_token_id=ends if args.ends else None,
            pad_token_id=0,
        )
        new = out[:, longest:]
        ended = torch.isin(new, torch.tensor(ends)) if args.ends else torch.zeros_like(new)
        return int((ended.cumsum(1) - ended.int() == 0).sum())

    return sample


def asked(tok: Any, count: int, args: argparse.Namespace) -> list[list[int]]:
    """Return the ids of `count` prompts."""
    if not args.ends:
        ids = tok.encode(TEXT * (2 + args.prompt // 8))
        return [ids[i : i + args.prompt] for i in range(count)]
    chats = [[{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}] for i in range(count)]
    return [tok.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]


def measure(
    sides: dict[str, Side], shape: str, args: argparse.Namespace, prompts: list[list[int]]
) -> None:
    """Sample a group of each side in turn, and print a line for each."""
    completions = int(shape.partition("x")[2])
    walls, cores = {name: [] for name in sides}, {name: [] for name in sides}
    lengths: dict[str, list[float]] = {name: [] for name in sides}
    for seed in range(args.repeats):
        for name, side in sides.items():
            started, used = time.perf_counter(), time.process_time()
            tokens = side(prompts, completions, seed)
            lengths[name].append(tokens / (len(prompts) * completions))
            cores[name].append(tokens / (time.process_time() - used))
            walls[name].append(tokens / (time.perf_counter() - started))
    peers = [statistics.median(each["transformers"]) for each in (walls, cores)]
    for name in sides:
        wall, core = (statistics.median(each[name]) for each in (walls, cores))
        span = f"{min(walls[name]):.1f}-{max(walls[name]):.1f}"
        print(
            f"{shape:7} {name:13} {wall:9.1f} {span:>13} {wall / peers[0]:6.2f} {core:11.1f} "
            f"{core / peers[1]:6.2f} {statistics.mean(lengths[name]):7.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", choices=("nf4",))
    parser.add_argument("--lora", type=int, metavar="RANK")
    parser.add_argument("--groups", nargs="+", default=["8x8", "1x64"])
    parser.add_argument("--prompt", type=int, default=96, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ends", action="store_true", help="questions that the model answers")
    args = parser.parse_args()
    names = ["lorakit", "torch", "transformers"]
    names += ["bitsandbytes"] * (args.quantize is not None) + ["peft"] * (args.lora is not None)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, instruction set "
        f"{torch.backends.cpu.get_cpu_capability()}, "
        + ", ".join(f"{name} {version(name)}" for name in names)
    )
    with tempfile.TemporaryDirectory() as folder:
        lk.save_model(lk.load_model(args.model, dtype=args.dtype, device="cpu"), folder)
        tok = lk.load_tokenizer(folder)
        groups = {shape: asked(tok, int(shape.partition("x")[0]), args) for shape in args.groups}
        sides = {
            "transformers": transformers_side(folder, tok.end_token_ids, args),
            "lorakit": lorakit_side(folder, tok, args),
        }
    name, weights = args.model.rstrip("/").rpartition("/")[2], args.quantize or args.dtype
    adapter = "no adapter" if args.lora is None else f"LoRA of rank {args.lora}"
    print(
        f"{name}, weights {weights}, computed in {args.dtype}, {adapter}; "
        + (
            f"questions, answers of at most {args.tokens} tokens"
            if args.ends
            else f"prompts of {args.prompt} tokens, completions of {args.tokens}"
        )
    )
    for side in sides.values():  # warm up
        side(next(iter(groups.values()))[:1], 2, 0)
    print(
        f"{'group':7} {'':13} {'tokens/s':>9} {'range':>13} {'x':>6} {'per cpu s':>11} {'x':>6} "
        f"{'mean':>7}"
    )
    for shape, prompts in groups.items():
        measure(sides, shape, args, prompts)


if __name__ == "__main__":
    main()
