"""`lorakit teach`: write what the teacher of a run file says of its rows, for distillation."""

import argparse
import time
from pathlib import Path

import lorakit as lk
from lorakit.cli.arguments import Verbs, count
from lorakit.cli.run_file import add_run_file, read_run_file, rows_of_run


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "teach",
        parents=[common],
        help="write the most likely tokens of a teacher, for a training that does not load it",
        description="Compute the rows of a run file with the teacher that its distillation names, "
        "and write the most likely tokens at every label, with their probabilities, to the file "
        "that it names as logits. `lorakit train` of the same run file then needs no teacher. "
        "key=value replaces a value of the file.",
    )
    add_run_file(parser)
    parser.add_argument(
        "--batch-size", type=count, default=8, metavar="N", help="rows at a time (default: 8)"
    )
    parser.set_defaults(run=teach)


def teach(args: argparse.Namespace) -> int:
    """Write the file, and return the exit code."""
    run = lk.RunConfig.from_dict(read_run_file(args.run_file, args.overrides), str(args.run_file))
    settings = run.train.distillation
    if settings is None or settings.teacher is None or settings.logits is None:
        raise lk.LorakitError(
            f"{args.run_file}: teach needs a mapping `distillation` with the teacher, and with "
            "logits, the file to write"
        )
    tok, data = rows_of_run(run, None if run.adapter is None else lk.fetch_adapter(run.adapter))
    teacher = lk.load_teacher(settings.teacher, settings, tok, run.dtype)
    started = time.perf_counter()
    lk.save_teacher_logits(
        teacher,
        list(data.values()),
        settings.logits,
        top_k=settings.top_k,
        temperature=settings.temperature,
        batch_size=args.batch_size,
    )
    rows, took = sum(map(len, data.values())), time.perf_counter() - started
    size = Path(settings.logits).expanduser().stat().st_size / 1e6
    print(f"{rows} rows in {took:.0f} s, {size:.1f} MB in {settings.logits}")
    return 0
