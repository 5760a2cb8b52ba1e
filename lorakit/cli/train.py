"""Carried out of lorakit/cli.py."""

import argparse
import sys
import time

import lorakit as lk
from lorakit.cli.run_file import read_run_file


def train(args: argparse.Namespace) -> int:
    import torch

    run = lk.RunConfig.from_dict(read_run_file(args.run_file, args.overrides), str(args.run_file))
    # bad rows should not wait for the model
    data = {"train": lk.read_rows(run.data.train, format=run.data.format)}
    if run.data.validation is not None:
        data["validation"] = lk.read_rows(run.data.validation, format=run.data.format)
    tok = lk.load_tokenizer(run.model)
    started = time.perf_counter()
    model = lk.load_model(run.model, dtype=run.dtype, quantize=run.quantize)
    print(f"loaded {run.model} in {time.perf_counter() - started:.1f} s on {model.device}")
    torch.manual_seed(run.train.seed)
    lk.attach(model, run.lora)
    lk.tune_allocator()  # not before: what loading takes for a moment goes back to the system
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"training {trainable:,} adapter parameters on {len(data['train'])} rows")
    if args.profile:
        print(lk.profile_training(model, tok, data["train"], run.train))
        return 0
    result = lk.train(model, tok, data, run.train, base_model=run.model)
    print(
        f"{result.steps} steps in {result.seconds:.0f} s, loss {result.loss:.4f}, "
        f"{result.tokens_per_second:.0f} tokens/s, peak {result.peak_memory_mb:.0f} MB"
    )
    if result.interrupted:
        print(
            f"lorakit: interrupted; the adapter so far is in {result.output_dir}", file=sys.stderr
        )
        return 130
    print(f"adapter in {result.output_dir}")
    return 0
