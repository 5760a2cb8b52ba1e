"""The endpoint's speed: one client, and several at once, in one run.

    python benchmarks/serving.py MODEL [--clients 1,8,32] [--tokens 192] [--repeats 3]
                                 [--quantize nf4]

`lorakit serve` runs in a process of its own, with as many slots as there are clients. A client asks
for streams of --tokens tokens, one after the other, with a prompt of its own, over loopback. The
numbers of clients alternate, so that whatever else the machine does hits all of them. The figures
are medians of the repeats: tokens a second of all clients together, their ratio to one client's,
and the time from a request to its first token.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time

import httpx

import lorakit as lk

SUBJECTS = ["Rome", "tides", "bread", "glass", "bees", "chess", "salt", "maps"]


async def ask(client: httpx.AsyncClient, url: str, model: str, number: int, tokens: int) -> float:
    """Take one stream to its end; return the seconds until its first token."""
    subject = f"{SUBJECTS[number % len(SUBJECTS)]}, part {number}"
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell me the history of {subject}."}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "logit_bias": dict.fromkeys(ENDS, -100),
        "stream_options": {"include_usage": True},
    }
    began, first, count = time.perf_counter(), 0.0, 0
    async with client.stream("POST", f"{url}/chat/completions", json=body) as stream:
        async for line in stream.aiter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if not first and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - began
            if chunk["usage"]:
                count = chunk["usage"]["completion_tokens"]
    if count != tokens:
        raise SystemExit(f"a text has {count} tokens, not {tokens}")
    return first


async def measure(
    url: str, model: str, clients: int, tokens: int, start: int
) -> tuple[float, float]:
    """Return the tokens a second of some clients together, and the median time to a first token."""
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        began = time.perf_counter()
        asked = [ask(client, url, model, start + i, tokens) for i in range(clients)]
        firsts = await asyncio.gather(*asked)
    return clients * tokens / (time.perf_counter() - began), statistics.median(firsts)


ENDS: list[str] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", choices=("nf4", "fp4", "int8"))
    args = parser.parse_args()
    clients = [int(each) for each in args.clients.split(",")]
    ENDS[:] = map(str, lk.load_tokenizer(args.model).end_token_ids)
    command = [sys.executable, "-m", "lorakit", "serve", args.model, "--port", "0"]
    command += ["--slots", str(max(clients)), "--dtype", args.dtype]
    command += ["--quantize", args.quantize] if args.quantize else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            words = server.stdout.readline().split()
            url, model = words[0], words[2].rstrip(";,")
            number = 0
            found: dict[int, list[tuple[float, float]]] = {each: [] for each in clients}
            for repeat in range(args.repeats + 1):
                for each in clients:
                    measured = asyncio.run(measure(url, model, each, args.tokens, number))
                    number += each  # no prompt twice
                    if repeat:  # the first round warms up
                        found[each].append(measured)
        finally:
            server.terminate()
    alone = statistics.median(rate for rate, _ in found[clients[0]])
    print(f"{model}, {args.quantize or args.dtype}, {args.tokens} tokens a text")
    print(f"{'clients':>7} {'tokens/s':>9} {'range':>13} {'x':>5} {'first token ms':>15}")
    for each, rows in found.items():
        rates = [rate for rate, _ in rows]
        rate = statistics.median(rates)
        first = 1e3 * statistics.median(first for _, first in rows)
        span = f"{min(rates):.1f}-{max(rates):.1f}"
        print(f"{each:7} {rate:9.1f} {span:>13} {rate / alone:5.2f} {first:15.0f}")


if __name__ == "__main__":
    main()
