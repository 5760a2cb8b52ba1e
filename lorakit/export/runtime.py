"""A GGUF file in llama.cpp itself, through the server of the package xllamacpp.

It runs in a process of its own. llama.cpp ends the process where an assertion fails, and it writes
to stderr; neither should reach whoever exports a model.

    python -m lorakit.export.runtime    JSON of `_Request` on stdin -> JSON of `Continued` on stdout
"""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

_SECONDS = 300


class Continued(NamedTuple):
    """What llama.cpp made of a file."""

    texts: list[list[int]]
    """The greedy tokens after each prompt."""
    chat: list[int] | None
    """The tokens of the chat, with the beginning of an answer; None if it was refused."""
    tokens_per_second: list[float]
    """How fast each text was decoded, without its prompt, by llama.cpp's own clock."""


def continue_in_llama_cpp(
    file: Path,
    prompts: list[list[int]],
    chat: Sequence[Mapping[str, Any]],
    new: int,
    threads: int,
) -> Continued | str:
    """Continue prompts in llama.cpp.

    Args:
        file: The .gguf file.
        prompts: The tokens of each.
        chat: Messages to render by the file's template.
        new: The most new tokens for each prompt.
        threads: The number of threads to compute with.

    Returns:
        The new tokens and those of the chat, or why there are none.
    """
    if find_spec("xllamacpp") is None:
        return "llama.cpp itself (pip install xllamacpp)"
    request = {
        "file": str(file),
        "prompts": prompts,
        "chat": chat,
        "new": new,
        "longest": max(map(len, prompts), default=0),
        "threads": threads,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"llama.cpp itself, which took more than {_SECONDS} s"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        said = [line for line in lines if re.search("error|assert", line, re.IGNORECASE)]
        return f"llama.cpp itself, which failed: {(said or [f'exit code {done.returncode}'])[-1]}"
    return Continued(*json.loads(done.stdout.splitlines()[-1]))


def _main() -> None:
    import xllamacpp

    request = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = request["file"]
    params.n_ctx = request["longest"] + request["new"] + 8
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    params.warmup = False
    server = xllamacpp.Server(params)
    address = server.listening_address
    options = {"n_predict": request["new"], "temperature": 0, "return_tokens": True}
    answers = [
        _ask(address, "/completion", prompt=prompt, **options) for prompt in request["prompts"]
    ]
    texts = [answer["tokens"] for answer in answers]
    speeds = [answer["timings"]["predicted_per_second"] for answer in answers]
    print(json.dumps([texts, _rendered(address, request["chat"]), speeds]))


def _rendered(address: str, chat: Any) -> list[int] | None:
    """Return the tokens of a chat as the server renders it, or None if it refuses the chat."""
    try:
        prompt = _ask(address, "/apply-template", messages=chat)["prompt"]
    except urllib.error.HTTPError:
        return None
    found = _ask(address, "/tokenize", content=prompt, add_special=True, parse_special=True)
    return list(found["tokens"])


def _ask(address: str, path: str, **values: Any) -> Any:
    request = urllib.request.Request(
        address + path,
        data=json.dumps(values).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


if __name__ == "__main__":
    _main()
