"""Python programs as a user starts them, without the seconds in which each would import torch.

One process has imported torch and nothing of lorakit. It forks for every program, and the child
gets its own arguments, directory, environment and output. So a program has modules, settings and an
end of its own, as if Python had been started for it. Only what torch itself reads of the
environment, as it is imported, is that of the tests. What a program imports at all is shown by
test_light_import.py and others, which do start Python.
"""

import atexit
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = Path(__file__)


def run(command, *, cwd, env=None, check=False) -> subprocess.CompletedProcess:
    """Run `python -c CODE ARGS` or `python -m MODULE ARGS`, given without `python`.

    Returns what it printed, and its exit status. With `check` any status but 0 raises
    CalledProcessError.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        request = {
            "command": list(map(str, command)),
            "cwd": str(cwd),
            "env": dict(os.environ if env is None else env),
            "files": list(map(str, files)),
        }
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        texts = [file.read_text() for file in files]
    done = subprocess.CompletedProcess(command, status, *texts)
    if check:
        done.check_returncode()
    return done


@functools.cache
def _server() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, SERVER], **pipes)
    atexit.register(server.stdin.close)  # where its input ends it ends
    return server


def _serve() -> None:
    import torch  # noqa: F401

    sys.path[0] = ""  # as of -c and -m: the program's directory
    gc.freeze()  # otherwise a child takes a second to look through all of torch at its end
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(request)
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


def _become(request: dict) -> None:
    import runpy

    signal.alarm(600)  # no program hangs for good
    for number, path in zip((1, 2), request["files"], strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - requests were read from the other
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    how, what, *sys.argv[1:] = request["command"]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    sys.argv[0] = "-c"
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    exec(compile(what, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    _serve()
