"""`lorakit train` of a run file with several adapters: train them in one pass a step."""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorakit as lk
from lorakit.cli.arguments import chat_template, tokenizer_of
from lorakit.cli.run_file import encode_as


def names_several(values: Mapping[str, Any]) -> bool:
    """Return whether the mapping of a run file is one of several adapters."""
    return any(values.get(key) is not None for key in ("adapters", "sweep"))


def train_many(args: argparse.Namespace, values: Mapping[str, Any]) -> int:
    """Train the adapters of a run file, and return the exit code."""
    many = lk.ManyConfig.from_dict(values, str(args.run_file))
    for option, given in (("--profile", args.profile), ("--nproc", args.nproc is not None)):
        if given:
            raise lk.LorakitError(f"{option} is for a run of one adapter; leave it out")
    configs = {name: run.train for name, run in many.runs.items()}
    lk.check_many(configs)
    for config in configs.values():
        lk.metrics.check_usable(config.eval_metrics)
    return _train(many, configs)


def _train(many: "lk.ManyConfig", configs: Mapping[str, "lk.TrainConfig"]) -> int:
    import torch

    first = many.first
    tok = lk.load_tokenizer(
        tokenizer_of(first.model, None), chat_template=chat_template(first.chat_template, None)
    )
    data = _encoded(many, tok)
    lengths = {name: each["train"].lengths for name, each in data.items()}
    if line := lk.check_many_memory(many, lengths):
        print(line, flush=True)
    started = time.perf_counter()
    model = lk.load_model(first.model, dtype=first.dtype, quantize=first.quantize)
    print(f"loaded {first.model} in {time.perf_counter() - started:.1f} s on {model.device}")
    for name, run in many.runs.items():
        torch.manual_seed(run.train.seed)  # as for the adapter alone
        if run.adapter is None:
            lk.attach(model, run.lora, name=name)
        else:
            lk.load_adapter(model, run.adapter, name=name)
    lk.tune_allocator()  # after loading, so that the memory of loading goes back to the system
    print(f"training {len(many.runs)} adapters in one pass a step: {', '.join(many.runs)}")
    results = lk.train_many(
        model,
        tok,
        data,
        configs,
        output_dir=many.output_dir,
        base_model=first.model,
        runs=many.runs,
    )
    return _report(results, Path(many.output_dir))


def _encoded(many: "lk.ManyConfig", tok: Any) -> dict[str, dict[str, Any]]:
    """Return the encoded rows of each adapter; those that say the same share them."""
    names = ("max_seq_length", "over_length", "train_on", "skip_empty")
    found = list[tuple[Any, dict[str, Any]]]()
    rows = {}
    for name, run in many.runs.items():
        key = run.rows, [getattr(run.train, setting) for setting in names]
        there = next((each for known, each in found if known == key), None)
        if there is None:
            opened = lk.open_data(run.rows, skip_empty=run.train.skip_empty)
            there = {part: encode_as(run.train, each, tok) for part, each in opened.items()}
            found.append((key, there))
        rows[name] = there
    return rows


def _report(results: Mapping[str, Any], folder: Path) -> int:
    """Say what the runs have done, and return the exit code."""
    wide = max(map(len, results))
    for name, each in results.items():
        losses = [found["loss"] for found in each.evaluations]
        best = f", best validation loss {min(losses):.4f}" if losses else ""
        how = "failed: " + each.error if each.error else f"loss {each.loss:.4f}{best}"
        print(f"{name:<{wide}}  {each.steps} steps, {how}")
    if any(each.interrupted for each in results.values()):
        print(f"lorakit: interrupted; set resume: auto to go on from {folder}")
        return 130
    print(f"adapters in {folder}")
    return 1 if any(each.error for each in results.values()) else 0
