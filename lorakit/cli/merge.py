"""`lorakit merge`: add an adapter to a model's weights, and write the model."""

import argparse
from pathlib import Path

import lorakit as lk
from lorakit.cli.arguments import (
    ADAPTED_TEMPLATE_HELP,
    ADAPTER_HELP,
    DTYPE_HELP,
    MODEL_HELP,
    OUT_HELP,
    STORAGE,
    Verbs,
    chat_template,
    head_for,
    tokenizer_of,
)


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "merge",
        parents=[common],
        help="write a model with an adapter in its weights",
        description="Add an adapter to the weights of a model, write the result as a Hugging Face "
        "directory, and print how far that moved the logits of a few tokens.",
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("adapter", type=Path, help=ADAPTER_HELP)
    parser.add_argument("out", type=Path, help=OUT_HELP)
    parser.add_argument(
        "--quantize",
        choices=STORAGE,
        help="pack the weights as in training; the logits are compared with the packed model's",
    )
    parser.add_argument(
        "--base",
        choices=["dequantized", "dense", "nf4"],
        default="dequantized",
        help="what the update of a packed model is added to: the unpacked weights (dequantized, "
        "the default), the weights of the model's files (dense), or the unpacked weights, which "
        "are then packed again (nf4)",
    )
    parser.add_argument("--chat-template", help=ADAPTED_TEMPLATE_HELP)
    parser.add_argument("--dtype", default="bfloat16", help=DTYPE_HELP)
    parser.set_defaults(run=merge)


def merge(args: argparse.Namespace) -> int:
    """Write the merged model, and return the exit code."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise lk.LorakitError(f"{args.out} is there already, and not empty: choose another name")
    if args.base == "nf4" and args.quantize not in ("nf4", "fp4"):
        raise lk.LorakitError("--base nf4 packs again what was packed: add --quantize nf4")
    adapter = lk.fetch_adapter(args.adapter)
    template = chat_template(args.chat_template, adapter)
    if args.chat_template is not None:  # an error in it should not take minutes
        lk.load_tokenizer(args.model, chat_template=template)
    head = head_for(args.model, adapter)
    model = lk.load_model(args.model, dtype=args.dtype, quantize=args.quantize, classifier=head)
    lk.load_adapter(model, adapter)
    try:  # before the merge, not after it
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{args.out} cannot be made ({error.strerror}); choose another name"
        raise lk.LorakitError(reason) from None
    print(lk.merge(model, args.base))
    lk.save_model(model, args.out, packed=args.base == "nf4")
    source = tokenizer_of(args.model, adapter)
    new_template = template is not None and (args.out / "tokenizer.json").exists()
    if new_template or source != args.model:
        tok = lk.load_tokenizer(source, chat_template=template)
        if model.source is not None and model.source.path.is_dir():
            tok.source = model.source.path  # of its files, which lie in out, those that differ go
        tok.save(args.out)
    lk.write_card(args.out, base_model=args.model, adapter=adapter if adapter.is_dir() else None)
    print(f"model in {args.out}")
    return 0
