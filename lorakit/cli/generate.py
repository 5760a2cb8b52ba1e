"""`lorakit generate`: continue a prompt, with an adapter or without."""

import argparse
import sys
from pathlib import Path

import lorakit as lk
from lorakit.cli.arguments import (
    ADAPTED_TEMPLATE_HELP,
    ADAPTER_HELP,
    DTYPE_HELP,
    MODEL_HELP,
    STORAGE,
    Verbs,
    add_sampling,
    chat_template,
    tokenizer_of,
)


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "generate",
        parents=[common],
        help="continue a prompt",
        description="Continue a prompt, given as an argument or on standard input.",
    )
    add = parser.add_argument
    add("model", help=MODEL_HELP)
    add("prompt", nargs="?", help="text to continue (default: standard input)")
    add("--adapter", type=Path, help=ADAPTER_HELP)
    add("--chat", action="store_true", help="send the prompt as a user's message")
    add("--chat-template", help=ADAPTED_TEMPLATE_HELP)
    add("--quantize", choices=STORAGE, help="pack the weights of the model")
    add("--dtype", default="bfloat16", help=DTYPE_HELP)
    add(
        "--max-new-tokens", type=int, default=128, help="stop after this many tokens (default: 128)"
    )
    add_sampling(parser)
    parser.set_defaults(run=generate, take_rest=_take_prompt)


def _take_prompt(args: argparse.Namespace, rest: list[str]) -> bool:
    """Take one argument after an option as the prompt, if there is none yet."""
    if args.prompt is None and rest:
        args.prompt = rest.pop(0)
    return not rest


def generate(args: argparse.Namespace) -> int:
    """Print the prompt's continuation, piece by piece, and return the exit code."""
    prompt = args.prompt if args.prompt is not None else sys.stdin.read()
    adapter = None if args.adapter is None else lk.fetch_adapter(args.adapter)
    template = chat_template(args.chat_template, adapter)
    source = tokenizer_of(args.model, adapter)
    tok = lk.load_tokenizer(source, chat_template=template)
    model = lk.load_model(args.model, dtype=args.dtype, quantize=args.quantize)
    if adapter is not None:
        lk.load_adapter(model, adapter)
    lk.generate(
        model,
        tok,
        [{"role": "user", "content": prompt}] if args.chat else prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=args.stop,
        stream=lambda piece: print(piece, end="", flush=True),
    )
    print()
    return 0
