"""`lorakit export`: write a model, with or without an adapter, for another program."""

import argparse
from pathlib import Path

import lorakit as lk
from lorakit.cli.arguments import (
    ADAPTER_HELP,
    MODEL_HELP,
    Verbs,
    chat_template,
    count,
    tokenizer_of,
)

TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_s", "q4_k_m"]
TYPES += ["q5_k_s", "q5_k_m", "q6_k", "iq4_nl"]


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "export",
        parents=[common],
        help="write a model for llama.cpp, Ollama or LM Studio",
        description="Write a model as a GGUF file, with an adapter in its weights if one is given, "
        "and print which block formats it has. The file is read back and run beside the model.",
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("adapter", nargs="?", type=Path, help=ADAPTER_HELP)
    parser.add_argument(
        "out",
        type=Path,
        help="file to write; with several --type it is a directory, which gets one file of each",
    )
    parser.add_argument("--to", choices=["gguf"], default="gguf", help="format (default: gguf)")
    parser.add_argument(
        "--type",
        type=_types,
        action="extend",
        metavar="TYPE",
        help=f"{', '.join(TYPES)} (default: q4_k_m); several times, or a list with commas",
    )
    matters = parser.add_mutually_exclusive_group()
    matters.add_argument(
        "--imatrix", type=Path, metavar="FILE", help="importance matrix, of llama-imatrix in GGUF"
    )
    matters.add_argument(
        "--calibrate",
        type=Path,
        metavar="ROWS",
        help="file of rows, such as that of the training, to measure an importance matrix on",
    )
    parser.add_argument(
        "--tensor-type",
        type=_pattern,
        action="append",
        default=[],
        metavar="PATTERN=TYPE",
        help="block format of the matrices whose names a regex fits, as in ffn_down=q8_0; the "
        "first that fits decides",
    )
    parser.add_argument("--name", help="what the file calls the model (default: its directory's)")
    parser.add_argument(
        "--context-length",
        type=count,
        metavar="N",
        help="positions that the file states (default: the model's)",
    )
    _add_check(parser)
    parser.set_defaults(run=export)


def _add_check(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the check of the written files."""
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="file of rows to check the written file on, such as those held out of the training "
        "(default: those of --calibrate, or a short text of lorakit's own)",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not read the written file back and run it"
    )


def export(args: argparse.Namespace) -> int:
    """Write the files, and return the exit code."""
    if args.adapter is not None:
        args.adapter = lk.fetch_adapter(args.adapter)
    files = _files(args)
    if args.rows is not None:
        lk.read_rows(args.rows)  # an error in them should not take minutes
    imatrix = None if args.imatrix is None else lk.load_importance(args.imatrix)
    if args.calibrate is not None:
        imatrix = _measured(args)
    for file, quantization in files.items():
        written = lk.export_gguf(
            args.model,
            file,
            quantization=quantization,
            adapter=args.adapter,
            imatrix=imatrix,
            tensor_types=dict(args.tensor_type),
            name=args.name,
            context_length=args.context_length,
        )
        print(written, flush=True)
        if not args.no_check:
            rows = args.rows or args.calibrate
            print(lk.check_export(file, args.model, args.adapter, rows=rows), flush=True)
    return 0


def _types(text: str) -> list[str]:
    """Return the quantizations in an argument; argparse reports others as wrong usage."""
    types = text.lower().split(",")
    for each in types:
        if each not in TYPES:
            raise argparse.ArgumentTypeError(f"{each!r} is none of {', '.join(TYPES)}")
    return types


def _pattern(text: str) -> tuple[str, str]:
    """Return the pattern and the format in an argument."""
    pattern, equals, kind = text.rpartition("=")
    if not (equals and pattern):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form PATTERN=TYPE")
    return pattern, kind


def _files(args: argparse.Namespace) -> dict[Path, str]:
    """Return the files to write, each with its quantization."""
    types = list(dict.fromkeys(args.type or ["q4_k_m"]))
    if args.adapter is None and (args.out / "adapter_config.json").is_file():
        raise lk.LorakitError(f"{args.out} is an adapter: name what to write after it")
    if len(types) == 1 and not args.out.is_dir():
        return {args.out: types[0]}
    if args.out.suffix == ".gguf":
        raise lk.LorakitError(
            f"{args.out} is one file, and --type names {len(types)} of them: give a directory"
        )
    name = args.name or Path(args.model).expanduser().absolute().name.removesuffix(".gguf")
    name = name.replace("/", "-")  # a name may be any text
    return {args.out / f"{name}-{each.upper()}.gguf": each for each in types}


def _measured(args: argparse.Namespace) -> "lk.Importance":
    """Return the importance of the weights' columns on the rows of --calibrate."""
    rows = lk.read_rows(args.calibrate)  # an error in them should not take minutes
    template = chat_template(None, args.adapter)
    tok = lk.load_tokenizer(tokenizer_of(args.model, args.adapter), chat_template=template)
    model = lk.load_model(args.model)
    if args.adapter is not None:
        lk.load_adapter(model, args.adapter)
    return lk.importance(model, tok, rows)
