"""The `lorakit` command: collect the verbs, parse the arguments and run one verb.

A verb is one file of this folder, with its arguments, its help and its work. A verb uses the public
API of lorakit alone, so whatever the command does, a few lines of Python do as well.

An error that comes from the input is one sentence on standard error; --debug adds the traceback.
The exit codes are 0 for done, 1 for failed, 2 for wrong usage, 130 for interrupted, and 141 when
nobody reads what the command prints.
"""

import argparse
import io
import os
import signal
import sys
import traceback

import lorakit as lk
from lorakit.cli import (
    adapter,
    board,
    chat,
    compare,
    data,
    evaluate,
    export,
    generate,
    merge,
    plan,
    plot,
    push,
    quantize_report,
    report,
    serve,
    teach,
    train,
)
from lorakit.cli.arguments import take_nothing


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the command's name. None means those of this process.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal's encoding may lack a letter
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # the tokenizer refuses what is no UTF-8
        sys.stdin.reconfigure(errors="surrogateescape")
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if any(argument.startswith("-") for argument in rest) or not args.take_rest(args, rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:  # first: it may come while lk.LorakitError is being imported
        print("lorakit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (lk.LorakitError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        print(f"lorakit: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line, every verb included.

    Returns:
        The parser. Its result holds `run`, the function that does the verb's work, and `take_rest`,
        which takes the arguments that argparse left over (see arguments.py).
    """
    parser = argparse.ArgumentParser(
        prog="lorakit", description="Fine-tune language models with LoRA and QLoRA."
    )
    parser.add_argument("--version", action="version", version=f"lorakit {lk.__version__}")
    parser.set_defaults(take_rest=take_nothing)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    teach.add_parser(verbs, common)
    train.add_parser(verbs, common)
    evaluate.add_parser(verbs, common)
    compare.add_parser(verbs, common)
    generate.add_parser(verbs, common)
    chat.add_parser(verbs, common)
    serve.add_parser(verbs, common)
    merge.add_parser(verbs, common)
    export.add_parser(verbs, common)
    push.add_parser(verbs, common)
    quantize_report.add_parser(verbs, common)
    data.add_parser(verbs, common)
    plan.add_parser(verbs, common)
    plot.add_parser(verbs, common)
    board.add_parser(verbs, common)
    report.add_parser(verbs, common)
    adapter.add_parser(verbs, common)
    return parser
