"""`lorakit serve` as a process: its first lines, Ctrl-C, and a port that is taken."""

import json
import signal
import socket
import subprocess
import sys

import httpx
import pytest

import lorakit as lk
from lorakit.cli.main import main


def test_it_serves_until_ctrl_c(tiny_dir, tmp_path):
    lk.save_adapter(lk.attach(lk.load_model(tiny_dir), lk.LoraConfig(r=2)), tmp_path)
    command = [sys.executable, "-m", "lorakit.cli", "serve", str(tiny_dir), "--port", "0"]
    command += ["--adapter", f"mine={tmp_path}", "--quantize", "nf4", "--api-key", "secret"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    first, curl, production = (server.stdout.readline() for _ in range(3))
    address = first.split()[0]
    assert first == f"{address} serves {tiny_dir.name}, mine; Ctrl-C ends it\n"
    assert curl.startswith(f"curl {address}/chat/completions ")
    assert "vLLM" in production
    assert "lorakit export" in production
    headers = {"Authorization": "Bearer secret"}
    body = {"model": "mine", "prompt": "ab", "max_tokens": 60, "logit_bias": {"2": -100}}
    taken = address.rpartition(":")[2].removesuffix("/v1")
    second = subprocess.run([*command, "--port", taken], capture_output=True, text=True)
    assert second.returncode == 1
    assert second.stderr.startswith(f"lorakit: cannot listen on 127.0.0.1:{taken} (Address")
    assert second.stderr.count("\n") == 1
    lines = []
    with httpx.stream(
        "POST", f"{address}/completions", json=body | {"stream": True}, headers=headers, timeout=60
    ) as stream:
        for line in stream.iter_lines():
            if not lines:
                server.send_signal(signal.SIGINT)
            lines += [line.removeprefix("data: ")] if line else []
    _, said = server.communicate(timeout=30)
    assert lines[-1] == "[DONE]"
    last = json.loads(lines[-2])
    # the tiny model may have written its 60 tokens before the signal came
    whole = last.get("choices", [{}])[0].get("finish_reason") == "length"
    assert whole or "shutting down" in last["error"]["message"]
    assert server.returncode == 130
    assert said == "lorakit: interrupted\n"


def test_what_is_wrong_is_one_sentence(tiny_dir, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        for options, said in [
            (["--port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--port", "70000"], "port at most 65535"),
            (["--port", "0", "--host", "no.such.host.invalid"], "cannot listen on no.such"),
            (["--port", "0", "--slots", "0"], "slots must be at least 1"),
            (["--port", "0", "--context-length", "100"], "64"),
            (["--port", "0", "--adapter", f"a={tmp_path}"], "adapter_config.json"),
            (["--adapter", "a=b", "--adapter", "a=c"], "two adapters have one name"),
        ]:
            assert main(["serve", str(tiny_dir), *options]) == 1
            err = capsys.readouterr().err
            assert said in err
            assert err.splitlines()[-1].startswith("lorakit: ")
    with pytest.raises(SystemExit):
        main(["serve", str(tiny_dir), "--adapter", "=nameless"])
    assert "not of the form NAME=ADAPTER" in capsys.readouterr().err


def test_an_open_server_is_warned_about(tiny_dir, capsys):
    assert main(["serve", str(tiny_dir), "--host", "0.0.0.0", "--slots", "0"]) == 1
    warning, _ = capsys.readouterr().err.splitlines()
    assert "whoever reaches 0.0.0.0 can use this server" in warning
