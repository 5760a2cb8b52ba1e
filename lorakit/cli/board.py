"""`lorakit board`: show a folder of runs as a page on this machine."""

import argparse
import os
import sys
import threading

import lorakit as lk
from lorakit.cli.arguments import Verbs, count


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "board",
        parents=[common],
        help="show a folder of runs as a page: curves, settings, samples, chat",
        description="Show the runs in a folder as a page on this machine, until Ctrl-C: live "
        "curves, settings side by side, samples, a chat with what they trained, and buttons that "
        "stop, resume and start runs. Only this machine reaches it, by the address it prints.",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="folder that holds the runs, at any depth")
    add("--host", default="127.0.0.1", help="127.0.0.1 (default), localhost or ::1")
    add("--port", type=count, default=8700, help="port to listen on (default: 8700; 0: a free one)")
    add("--open", action="store_true", help="open the page in the browser")
    parser.set_defaults(run=board)


def board(args: argparse.Namespace) -> int:
    """Serve the page until the process is interrupted."""

    def started(address: str) -> None:
        print(f"{address} shows {args.folder}; Ctrl-C ends it", flush=True)

    options = {"host": args.host, "port": args.port, "open_page": args.open, "started": started}
    try:
        lk.serve_board(args.folder, **options)
    except KeyboardInterrupt:
        if threading.active_count() == 1:
            raise
        # A model is being loaded. The threads of its kernels would have the system end this process
        # as one that has crashed, if Python ended it.
        print("lorakit: interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    return 0
