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
TYPES += ["q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "mxfp4_moe"]

_OF_GGUF = {
    "no_check",
    "type",
    "imatrix",
    "calibrate",
    "tensor_type",
    "name",
    "context_length",
    "rows",
}
# What --to writes -> the options that it has.
FORMATS = {
    "gguf": _OF_GGUF,
    "gguf-lora": {"type", "name"},
    "ollama": _OF_GGUF | {"system", "unmerged"},
    "mlx": set(),
    "vllm": set(),
    "sglang": set(),
    "peft": set(),
}


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "export",
        parents=[common],
        help="write a model or an adapter for llama.cpp, Ollama, LM Studio, MLX, vLLM or SGLang",
        description="Write a model as a GGUF file, with an adapter in its weights if one is given, "
        "or an adapter alone for another program; print what was written and how it is run. A "
        "model's file is read back and run beside the model.",
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("adapter", nargs="?", type=Path, help=ADAPTER_HELP)
    parser.add_argument(
        "out",
        type=Path,
        help="file to write, or a directory: with several --type, which gets one file of each, and "
        "for all --to but gguf and gguf-lora",
    )
    parser.add_argument(
        "--to",
        choices=[*FORMATS],
        default="gguf",
        help="gguf: a file for llama.cpp or LM Studio; ollama: a directory with a Modelfile; the "
        "others write the adapter alone: gguf-lora for llama.cpp, mlx for mlx_lm, and plain LoRA "
        "for vllm, sglang and what else reads PEFT's files (default: gguf)",
    )
    parser.add_argument(
        "--type",
        type=_types,
        action="extend",
        metavar="TYPE",
        help=f"{', '.join(TYPES)} (default: q4_k_m); several times, or a list with commas",
    )
    _add_quantization(parser)
    parser.add_argument("--name", help="what the file calls the model (default: its directory's)")
    parser.add_argument(
        "--context-length",
        type=count,
        metavar="N",
        help="positions that the file states (default: the model's), and Ollama's num_ctx",
    )
    _add_ollama(parser)
    _add_check(parser)
    parser.set_defaults(run=export)


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how matrices are quantized, beside --type."""
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


def _add_ollama(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that only Ollama's directory has."""
    parser.add_argument("--system", metavar="TEXT", help="system prompt of a Modelfile")
    parser.add_argument(
        "--unmerged", action="store_true", help="give Ollama the adapter as a file of its own"
    )


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
    _check_options(args)
    if args.adapter is not None:
        args.adapter = lk.fetch_adapter(args.adapter)
    if args.to in ("gguf", "ollama"):
        _export_model(args)
    else:
        _export_adapter(args)
    return 0


def _export_adapter(args: argparse.Namespace) -> None:
    """Write an adapter alone, and print how it is run."""
    if args.to == "gguf-lora":
        kind = args.type or ["f16"]
        if kind not in (["f16"], ["f32"]):
            raise lk.LorakitError("an adapter's --type is f16 or f32")
        dtype = {"f16": "float16", "f32": "float32"}[kind[0]]
        adapter = lk.export_gguf_adapter(
            args.adapter, args.out, base_model=args.model, dtype=dtype, name=args.name
        )
        print(f"{adapter}\n\nllama-server -m MODEL.gguf --lora {args.out}")
    elif args.to == "mlx":
        print(lk.export_mlx(args.adapter, args.out, base_model=args.model))
        print(f"\nmlx_lm.generate --model {args.model} --adapter-path {args.out} --prompt TEXT")
    else:
        print(lk.export_for_server(args.adapter, args.out, server=args.to, base_model=args.model))


def _check_options(args: argparse.Namespace) -> None:
    """Raise LorakitError if an option does not go with --to."""
    for option in sorted(set().union(*FORMATS.values()) - FORMATS[args.to]):
        if vars(args)[option]:
            flag = option.replace("_", "-")
            others = [each for each, has in FORMATS.items() if option in has]
            raise lk.LorakitError(f"--{flag} is for --to {' and '.join(others)}, not {args.to}")
    if args.adapter is None and (args.to not in ("gguf", "ollama") or args.unmerged):
        what = "--unmerged" if args.unmerged else f"--to {args.to}"
        raise lk.LorakitError(f"{what} writes an adapter: name it between the model and {args.out}")


def _export_model(args: argparse.Namespace) -> None:
    """Write a model as one or more GGUF files, or for Ollama, and check it."""
    if args.to == "ollama" and args.type is not None and len(args.type) > 1:
        raise lk.LorakitError("--to ollama writes one --type at a time")
    files = _files(args) if args.to == "gguf" else {args.out: (args.type or ["q4_k_m"])[0]}
    if args.rows is not None:
        lk.read_rows(args.rows)  # an error in them should not take minutes
    imatrix = None if args.imatrix is None else lk.load_importance(args.imatrix)
    if args.calibrate is not None:
        imatrix = _measured(args)
    options = {
        "adapter": args.adapter,
        "imatrix": imatrix,
        "tensor_types": dict(args.tensor_type),
        "name": args.name,
        "context_length": args.context_length,
    }
    if args.to == "ollama":
        options |= {"system": args.system, "merge": not args.unmerged}
    for file, quantization in files.items():
        if args.to == "gguf":
            print(
                lk.export_gguf(args.model, file, quantization=quantization, **options), flush=True
            )
            _check(args, file)
        else:
            written = lk.export_ollama(args.model, file, quantization=quantization, **options)
            _check(args, written.gguf[0].path)
            print(written)


def _check(args: argparse.Namespace, file: Path) -> None:
    """Run a written model beside the one that it was made of, and print how they differ."""
    if not args.no_check:
        adapter = None if args.unmerged else args.adapter
        rows = args.rows or args.calibrate
        print(lk.check_export(file, args.model, adapter, rows=rows), flush=True)


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
