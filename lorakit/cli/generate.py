"""Carried out of lorakit/cli.py."""

import argparse
import sys

import lorakit as lk


def generate(args: argparse.Namespace) -> int:
    prompt = args.prompt if args.prompt is not None else sys.stdin.read()
    tok = lk.load_tokenizer(args.model)
    model = lk.load_model(args.model, dtype=args.dtype, quantize=args.quantize)
    if args.adapter is not None:
        lk.load_adapter(model, args.adapter)
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
