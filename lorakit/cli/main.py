"""The `lorakit` command.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 141 nobody reads what it prints. An
error that comes from the input is
one sentence; --debug adds the traceback.
"""

import argparse
import io
import os
import signal
import sys
import traceback
from pathlib import Path

import lorakit as lk
from lorakit.cli.adapter import convert_adapter_files, show_adapter
from lorakit.cli.data import lint_data, show_data
from lorakit.cli.generate import generate as generate_verb
from lorakit.cli.model import merge as merge_verb
from lorakit.cli.model import quantize_report
from lorakit.cli.train import train as train_verb


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text of any file, on a terminal of any encoding
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse closes a list of arguments at the first option: what comes after it lands in `rest`
    if any(argument.startswith("-") for argument in rest) or not args.take(args, rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:  # first: it may come while the names below are being imported
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


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="lorakit", description="Fine-tune language models with LoRA and QLoRA."
    )
    parser.add_argument("--version", action="version", version=f"lorakit {lk.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    train = verbs.add_parser(
        "train",
        parents=[common],
        help="train an adapter as a run file says",
        description="Train a LoRA adapter as a run file says. key=value replaces a value of the "
        "file; a.b=value reaches into a mapping, as in lora.r=8.",
    )
    train.add_argument("run_file", type=Path, metavar="run.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.add_argument(
        "--profile",
        action="store_true",
        help="a few steps only, nothing saved: print where the time of a step goes",
    )
    train.set_defaults(run=train_verb, take=_take_overrides)

    generate = verbs.add_parser(
        "generate",
        parents=[common],
        help="continue a prompt",
        description="Continue a prompt, given as an argument or on standard input.",
    )
    generate.add_argument("model", help="directory, .gguf file or Hub id")
    generate.add_argument("prompt", nargs="?", help="default: read from standard input")
    generate.add_argument("--adapter", type=Path, help="directory of a PEFT or lorakit adapter")
    generate.add_argument("--chat", action="store_true", help="send the prompt as a user's message")
    generate.add_argument("--quantize", choices=["nf4", "fp4", "int8"], help="pack the weights")
    generate.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    generate.add_argument("--top-k", type=int, help="of the likeliest so many tokens only")
    generate.add_argument("--top-p", type=float, default=1.0, help="of the fewest with this mass")
    generate.add_argument("--min-p", type=float, default=0.0, help="of those this near the best")
    generate.add_argument("--repetition-penalty", type=float, default=1.0, help="1: none")
    generate.add_argument("--stop", action="append", default=[], help="end before this text")
    generate.add_argument("--seed", type=int)
    generate.set_defaults(run=generate_verb, take=_take_prompt)

    merge = verbs.add_parser(
        "merge",
        parents=[common],
        help="write a model with an adapter in its weights",
        description="Add an adapter to the weights of a model, write the result as a Hugging Face "
        "directory, and print how far that moved the logits of a few tokens.",
    )
    merge.add_argument("model", help="directory, .gguf file or Hub id")
    merge.add_argument("adapter", type=Path, help="directory of a PEFT or lorakit adapter")
    merge.add_argument("out", type=Path, help="directory to write; new or empty")
    merge.add_argument("--quantize", choices=["nf4", "fp4", "int8"],
                       help="as in training; the logits are compared with its own")  # fmt: skip
    merge.add_argument("--base", choices=["dequantized", "dense", "nf4"], default="dequantized",
                       help="over quantized weights: what the update is added to; nf4 writes the "
                       "result packed again")  # fmt: skip
    merge.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    merge.set_defaults(run=merge_verb, take=_take_nothing)

    report = verbs.add_parser(
        "quantize-report",
        parents=[common],
        help="what quantization would do to each layer of a model",
        description="Quantize each layer of a model, one at a time, and print its bits per "
        "parameter, relative error and cosine. key=value sets a field of QuantConfig, as in "
        "quant_type=fp4 or search_scales=true.",
    )
    report.add_argument("model", help="directory, .gguf file or Hub id")
    report.add_argument("overrides", nargs="*", metavar="key=value")
    report.add_argument("--worst", type=_count, default=10, help="how many layers to list again")
    report.add_argument(
        "--plot", type=Path, default=Path("quantize-report.png"), help="PNG to write"
    )
    report.add_argument(
        "--no-plot", action="store_const", dest="plot", const=None, help="only print"
    )
    report.set_defaults(run=quantize_report, take=_take_overrides)

    data = verbs.add_parser(
        "data",
        help="look at rows of training data as the model sees them, or check them",
        description="Look at rows of training data as the model sees them, or check them.",
    )
    actions = data.add_subparsers(metavar="ACTION", required=True)
    rows = argparse.ArgumentParser(add_help=False)
    rows.add_argument("file", type=Path, help="JSONL, JSON, CSV or Parquet")
    rows.add_argument("--model", required=True, help="directory, .gguf file or Hub id")
    rows.add_argument("--format", help="of the rows; default: what their fields say")
    rows.add_argument("--train-on", default="completion", help="completion, last_turn or all")
    show = actions.add_parser(
        "show",
        parents=[common, rows],
        help="the tokens of the first rows, labels coloured",
        description="Print the tokens of the first rows, a bar between them. What is learned is "
        "coloured, or in double brackets where the output is no terminal.",
    )
    show.add_argument("--rows", type=_count, default=3, help="how many")
    show.add_argument("--no-color", action="store_true", help="brackets on a terminal too")
    show.set_defaults(run=show_data, take=_take_nothing)
    lint = actions.add_parser(
        "lint",
        parents=[common, rows],
        help="duplicates, lengths, class balance, empty turns, over-long rows",
        description="Report lengths, class balance, duplicates, empty turns, over-long rows and "
        "rows that cannot be used. Exits with 1 if there are any of the last.",
    )
    lint.add_argument("--max-seq-length", type=_count, default=1024)
    lint.set_defaults(run=lint_data, take=_take_nothing)
    plot = verbs.add_parser(
        "plot",
        parents=[common],
        help="curves of training runs",
        description="Draw loss, learning rate, gradient norm and tokens per second of training "
        "runs side by side: a PNG for each, and a page that holds them with the last values.",
    )
    plot.add_argument("runs", nargs="+", metavar="RUN_DIR", help="output_dir of a training run")
    plot.add_argument("--out", type=Path, default=Path("plots"), help="directory to write")
    plot.set_defaults(run=_plot, take=_take_runs)

    adapter = verbs.add_parser(
        "adapter",
        help="look at an adapter, or make plain LoRA of it",
        description="Look at an adapter on disk, or make plain LoRA of it.",
    )
    actions = adapter.add_subparsers(metavar="ACTION", required=True)
    show = actions.add_parser(
        "show",
        parents=[common],
        help="ranks, scalings and norms of each layer",
        description="Print rank, scaling and norms of each layer of an adapter, what is stored "
        "beside them, and warnings.",
    )
    show.add_argument("adapter", type=Path, help="directory of a PEFT or lorakit adapter")
    show.set_defaults(run=show_adapter, take=_take_nothing)
    convert = actions.add_parser(
        "convert",
        parents=[common],
        help="write it as plain LoRA, which every server understands",
        description="Write an adapter as plain LoRA: one rank, one lora_alpha, full names of the "
        "layers. rsLoRA and patterns of ranks and alphas are folded in exactly; DoRA is "
        "approximated, and the error of each layer printed.",
    )
    convert.add_argument("adapter", type=Path, help="directory of a PEFT or lorakit adapter")
    convert.add_argument("out", type=Path, help="directory to write, new or empty")
    convert.add_argument(
        "--base-model", help="directory, .gguf file or Hub id; for DoRA and fused experts"
    )
    convert.add_argument(
        "--rank", type=_count, help="default: the largest of a layer; for DoRA twice that"
    )
    convert.set_defaults(run=convert_adapter_files, take=_take_nothing)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _take_overrides(args: argparse.Namespace, rest: list[str]) -> bool:
    args.overrides += rest
    for override in args.overrides:
        name, equals, _ = override.partition("=")
        if not (name and equals):
            print(f"lorakit: {override!r} is not of the form key=value", file=sys.stderr)
            sys.exit(2)
    return True


def _take_prompt(args: argparse.Namespace, rest: list[str]) -> bool:
    if args.prompt is None and rest:
        args.prompt = rest.pop(0)
    return not rest


def _take_runs(args: argparse.Namespace, rest: list[str]) -> bool:
    args.runs += rest
    return True


def _take_nothing(args: argparse.Namespace, rest: list[str]) -> bool:
    return not rest


def _plot(args: argparse.Namespace) -> int:
    print(f"plots in {lk.plot_runs(args.runs, args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
