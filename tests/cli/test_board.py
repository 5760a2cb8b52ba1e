"""The verb `board`: an address with a token, and an end at once."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

from lorakit.cli import main


def test_a_board_shows_a_folder_until_ctrl_c(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    command = [sys.executable, "-m", "lorakit", "board", str(tmp_path), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as board:
        try:
            line = board.stdout.readline()
            found = re.fullmatch(r"(http://127\.0\.0\.1:\d+/)([\w-]{43})/ shows .*\n", line)
            address = found[1] + found[2]
            with urllib.request.urlopen(f"{address}/api/runs", timeout=20) as answer:
                assert [run["id"] for run in json.load(answer)] == ["run"]
            request = urllib.request.Request(
                f"{address}/api/runs", headers={"Host": "evil.example"}
            )
            for asked in (request, f"{found[1]}api/runs"):
                try:
                    urllib.request.urlopen(asked, timeout=20)
                except urllib.error.HTTPError as error:
                    assert error.code == 403
                else:
                    raise AssertionError("it was answered")
            board.send_signal(signal.SIGINT)
            _, said = board.communicate(timeout=20)
        finally:
            board.kill()
    assert board.returncode == 130
    assert said == "lorakit: interrupted\n"


def test_what_is_wrong_is_one_sentence(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        for arguments, said in [
            ([str(tmp_path / "nowhere")], "is no folder; name the one that holds the runs"),
            ([str(tmp_path), "--port", port], f"cannot listen on 127.0.0.1:{port}"),
            ([str(tmp_path), "--port", "70000"], "port is 70000; it must be at most 65535"),
            ([str(tmp_path), "--host", "0.0.0.0"], "listens on 127.0.0.1, localhost, ::1 only"),
        ]:
            assert main(["board", *arguments]) == 1
            [line] = capsys.readouterr().err.splitlines()
            assert line.startswith("lorakit: ")
            assert said in line
