"""`lorakit push`: upload an adapter, a model or GGUF files to the Hub, with a card."""

import argparse
from pathlib import Path

import lorakit as lk
from lorakit.cli.arguments import Verbs


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "push",
        parents=[common],
        help="upload an adapter, a model or GGUF files to the Hub",
        description="Upload an adapter, a model or GGUF files to the Hub, as one commit, with a "
        "README.md that tells what is known of them. Only files that lorakit knows are uploaded: "
        "no checkpoints, no logs. Log in first, with `hf auth login`.",
    )
    parser.add_argument("path", type=Path, help="directory of the files, or one .gguf file")
    parser.add_argument("repo_id", metavar="org/name", help="repository, made if it is missing")
    parser.add_argument(
        "--private",
        action="store_true",
        default=None,
        help="make a private repository, and upload into no public one",
    )
    parser.add_argument(
        "--revision", metavar="BRANCH", help="branch, made if it is missing (default: main)"
    )
    parser.add_argument(
        "--base-model",
        metavar="org/name",
        help="Hub id of the model that the files were made from (default: what an adapter says)",
    )
    parser.set_defaults(run=push)


def push(args: argparse.Namespace) -> int:
    """Upload the files, print their address, and return the exit code."""
    address = lk.push_to_hub(
        args.path,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        base_model=args.base_model,
    )
    print(address)
    return 0
