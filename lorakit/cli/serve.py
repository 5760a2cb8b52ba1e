"""`lorakit serve`: answer OpenAI's API with a model and its adapters."""

import argparse
import json
import os
import sys
from pathlib import Path

import lorakit as lk
from lorakit.cli.arguments import (
    DTYPE_HELP,
    MODEL_HELP,
    NAMED_ADAPTER_HELP,
    STORAGE,
    TEMPLATE_HELP,
    Verbs,
    chat_template,
    count,
    fetched_adapters,
    named_adapter,
    tokenizer_of,
)

_PRODUCTION = (
    "This is for trying models. For traffic use vLLM or llama.cpp: `lorakit export --to vllm` and "
    "`--to gguf` write their files."
)


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "serve",
        parents=[common],
        help="answer OpenAI's API with a model and its adapters",
        description="Answer OpenAI's API over HTTP with a model and its adapters, which clients "
        "choose by `model`, until Ctrl-C. " + _PRODUCTION,
    )
    add = parser.add_argument
    add("model", help=MODEL_HELP)
    add(
        "--adapter",
        type=named_adapter,
        action="append",
        default=[],
        metavar="[NAME=]ADAPTER",
        help=f"{NAMED_ADAPTER_HELP}; clients use the name",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=count, default=8000, help="port to listen on (default: 8000; 0: a free one)")
    add(
        "--api-key",
        default=os.environ.get("LORAKIT_API_KEY") or None,  # an empty one is none
        metavar="KEY",
        help="token that clients must send (default: that of the variable LORAKIT_API_KEY)",
    )
    add("--slots", type=count, default=8, help="texts that are made at a time (default: 8)")
    add("--queue", type=count, default=64, help="texts that may wait beside them (default: 64)")
    add(
        "--context-length",
        type=count,
        metavar="N",
        help="most tokens of a text with its prompt (default: 4096, or the model's if fewer)",
    )
    add("--quantize", choices=STORAGE, help="pack the weights of the model")
    add("--dtype", default="bfloat16", help=DTYPE_HELP)
    add("--chat-template", help=TEMPLATE_HELP)
    parser.set_defaults(run=serve)


def serve(args: argparse.Namespace) -> int:
    """Serve until the process is interrupted."""
    adapters = fetched_adapters(args.adapter)
    only = next(iter(adapters.values())) if len(adapters) == 1 else None
    tok = lk.load_tokenizer(
        tokenizer_of(args.model, only), chat_template=chat_template(args.chat_template, None)
    )
    model = lk.load_model(args.model, dtype=args.dtype, quantize=args.quantize)
    name = _name(args.model)

    def started(address: str) -> None:
        names = [name, *adapters]
        body = {"model": names[-1], "messages": [{"role": "user", "content": "Hello"}]}
        key = "" if args.api_key is None else " -H 'Authorization: Bearer KEY'"
        print(f"{address}/v1 serves {', '.join(names)}; Ctrl-C ends it")
        print(
            f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} "
            f"-d '{json.dumps(body)}'"
        )
        print(_PRODUCTION, flush=True)

    if args.api_key is None and args.host not in ("localhost", "127.0.0.1", "::1"):
        print(
            f"lorakit: whoever reaches {args.host} can use this server; --api-key asks for a token",
            file=sys.stderr,
        )
    lk.serve(
        model,
        tok,
        name=name,
        adapters=adapters,
        host=args.host,
        port=args.port,
        api_key=args.api_key,
        slots=args.slots,
        queue=args.queue,
        capacity=args.context_length,
        started=started,
    )
    return 0


def _name(model: str) -> str:
    """Return the name of a model for clients: its Hub id, or that of its directory or file."""
    path = Path(model).expanduser()
    return path.absolute().name.removesuffix(".gguf") if path.exists() else model
