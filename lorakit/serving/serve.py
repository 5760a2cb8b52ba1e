"""Serve a model over HTTP until somebody ends it.

The endpoint is for trying a model and its adapters from any client of OpenAI's API, on the machine
that trained them. vLLM and llama.cpp are for traffic: they keep many more users busy at a time.
"""

import importlib.util
import ipaddress
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer
from lorakit.serving.listen import listen


def serve(
    model: Decoder,
    tok: Tokenizer,
    *,
    name: str,
    adapters: Mapping[str, str | Path] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    slots: int = 8,
    capacity: int | None = None,
    queue: int = 64,
    started: Callable[[str], Any] | None = None,
) -> None:
    """Answer requests of OpenAI's API until the process is interrupted.

    Args:
        model: The model. The adapters that it carries are served under their names.
        tok: Its tokenizer.
        name: What clients call the model.
        adapters: More adapters, by the names that clients use: a directory, a .gguf file or a Hub
            id of each.
        host: The address to listen on; by 0.0.0.0 other machines reach the server.
        port: The port to listen on; 0 takes a free one.
        api_key: What clients must send as bearer token, one word of ASCII; None: nothing.
        slots: How many texts are made at a time.
        capacity: Positions that a text may reach with its prompt. None: 4096, or as many as the
            model is meant for if that is less.
        queue: How many texts may wait beside those; others get the status 429.
        started: Called with the address, "http://127.0.0.1:8000", once it is served.

    Raises:
        LorakitError: The address is taken, an adapter cannot be read or served, or a package of
            the extra `serve` is missing.
        KeyboardInterrupt: The process was interrupted. The texts that were being made have ended.
    """
    _check_options(port, queue, api_key)
    _check_packages()
    from lorakit.serving.adapters import Models
    from lorakit.serving.endpoint import Endpoint, application
    from lorakit.serving.server import run

    with listen(host, port) as (listener, address):
        models = Models(model, tok, name)
        for each, path in (adapters or {}).items():
            models.add(each, path)
        local = _is_loopback(host)
        endpoint = Endpoint(
            model,
            tok,
            models,
            slots=slots,
            capacity=capacity,
            most_waiting=queue,
            may_load=local or api_key is not None,
        )
        hosts = _own_names(host) if local and api_key is None else None
        app = application(endpoint, api_key=api_key, hosts=hosts)
        tell = started or (lambda _: None)
        run(app, listener, started=lambda: tell(address), ending=endpoint.worker.close)


def _check_options(port: int, queue: int, api_key: str | None) -> None:
    if queue < 0 or not 0 <= port < 2**16:
        raise LorakitError(
            f"serve: queue is {queue} and port {port}; queue must be at least 0, and port at most "
            "65535"
        )
    if api_key is not None and not re.fullmatch("[!-~]+", api_key):
        raise LorakitError(
            "serve: the key must be one word of ASCII letters, digits and signs, as clients send "
            "no other; leave it out to ask for none"
        )


def _check_packages() -> None:
    """Raise LorakitError if a package of the extra is missing."""
    for package in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise LorakitError(f'serving takes the package {package}: pip install "lorakit[serve]"')


def _is_loopback(host: str) -> bool:
    """Return whether an address is this machine's own, which no other machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _own_names(host: str) -> list[str]:
    """Return the names by which programs of this machine call a loopback address."""
    return list(dict.fromkeys(["localhost", "127.0.0.1", "::1", host]))
