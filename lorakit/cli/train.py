"""`lorakit train`: train adapters or a model as a run file says, or profile a few steps of it."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import lorakit as lk
from lorakit.cli.arguments import Verbs, count
from lorakit.cli.launch import launch, one_of_many
from lorakit.cli.run_file import add_run_file, read_run_file, rows_of_run
from lorakit.cli.train_many import names_several, train_many


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "train",
        parents=[common],
        help="train an adapter, or the model itself, as a run file says",
        description="Train an adapter, a new one or one that is there, or with train: full the "
        "model itself, as a run file says. A file with adapters or sweep trains several adapters, "
        "in one pass a step. "
        "key=value replaces a value of the file; a.b=value reaches into a mapping, as in lora.r=8.",
    )
    add_run_file(parser)
    parser.add_argument(
        "--profile",
        action="store_true",
        help="run a few steps only, save nothing, and print where the time of a step goes",
    )
    parser.add_argument(
        "--nproc",
        type=count,
        metavar="N",
        help="train on N processes of this machine, each with a GPU, or without GPUs with its "
        "share of the cores",
    )
    parser.set_defaults(run=train)


def train(args: argparse.Namespace) -> int:
    """Run the training or its profile, and return the exit code."""
    values = read_run_file(args.run_file, args.overrides)
    if names_several(values):
        return train_many(args, values)
    run = lk.RunConfig.from_dict(values, str(args.run_file))
    lk.metrics.check_usable(run.train.eval_metrics)
    lk.check_outputs(run.train)
    if args.nproc is not None:
        return launch(args)
    with one_of_many():
        return _train(args, run)


def _train(args: argparse.Namespace, run: "lk.RunConfig") -> int:
    """Run the training or its profile in this process."""
    import torch

    adapter = None if run.adapter is None else _checked(lk.fetch_adapter(run.adapter))
    # The rows are encoded before the model is loaded: an error in them should not take minutes.
    tok, data = rows_of_run(run, adapter)
    head = lk.head_of_run(run, data["train"])
    mesh = lk.mesh_of_run(run)
    if line := lk.check_run(run, data["train"].lengths, tok, divided=mesh is not None):
        print(line, flush=True)
    started = time.perf_counter()
    torch.manual_seed(run.train.seed)  # of a new head
    model = lk.load_model(
        run.model,
        dtype=run.dtype,
        quantize=run.quantize,
        mesh=mesh,
        offload_weights=run.offload_weights,
        classifier=head,
    )
    where = model.device if mesh is None else f"{mesh.size()} ranks, which divide its weights"
    print(f"loaded {run.model} in {time.perf_counter() - started:.1f} s on {where}")
    torch.manual_seed(run.train.seed)
    lora = lk.add_tokens(model, tok, run.add_tokens, run.lora) if run.add_tokens else run.lora
    full = run.train.train == "full"
    if adapter is not None:
        lk.load_adapter(model, adapter)
        print(f"going on from the adapter in {run.adapter}")
    elif not full:
        lk.attach(model, lora)
    lk.tune_allocator()  # after loading, so that the memory of loading goes back to the system
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    learns = "the model" if full else f"{trainable:,} adapter parameters"
    print(f"training {learns} on {len(data['train'])} rows{_classes(model, run)}")
    if args.profile:
        print(lk.profile_training(model, tok, data["train"], run.train))
        return 0
    return _report(lk.train(model, tok, data, run.train, base_model=run.model, run=run), run)


def _classes(model: Any, run: "lk.RunConfig") -> str:
    """Return what to say of the labels that a run learns, "" if it learns none."""
    head = model.config.classifier
    if head is None or run.train.objective != "classification":
        return ""
    if head.regression:
        return ", whose labels are numbers"
    return f" of the classes {', '.join(head.labels)}"


def _report(result: Any, run: "lk.RunConfig") -> int:
    """Say what a run has done, and return the exit code."""
    print(
        f"{result.steps} steps in {result.seconds:.0f} s, loss {result.loss:.4f}, "
        f"{result.tokens_per_second:.0f} tokens/s, peak {result.peak_memory_mb:.0f} MB"
    )
    what = "model" if run.train.train == "full" else "adapter"
    if result.interrupted:
        print(f"lorakit: interrupted; the {what} so far is in {result.output_dir}", file=sys.stderr)
        return 130
    print(f"{what} in {result.output_dir}")
    if result.address is not None:
        print(f"uploaded to {result.address}")
    return 1 if run.train.push_to_hub and result.address is None else 0


def _checked(adapter: Path) -> Path:
    """Return a directory that holds an adapter, before the model takes its time.

    Raises LorakitError if it holds none.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise lk.LorakitError(
            f"adapter: {adapter} holds no adapter_config.json; name the directory of an adapter, "
            "or leave adapter out to start a new one"
        )
    return adapter
