"""Chromium for tests of the page: one process of node drives it, as long as tests go on."""

import json
import os
import select
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
MODULES = ROOT / "build" / "browser"  # where `make browser` installs playwright-core and axe-core
SECONDS = 180  # for one call; what it waits for has limits of its own


class Browser:
    """A Chromium that runs JavaScript, each call on a page of its own."""

    def __init__(self, process):
        self.process = process
        self.said = []  # what the last page logged
        self.asked = []  # the hosts that it asked something

    def run(self, code, *, theme="light", width=1280, height=900, **arg):
        """Run the body of an async function of (page, arg, axe) and return what it returns."""
        line = {"code": code, "arg": arg, "theme": theme, "width": width, "height": height}
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        assert ready, f"the browser did not answer in {SECONDS} s"
        answer = json.loads(self.process.stdout.readline())
        self.said, self.asked = answer["said"], answer["asked"]
        assert "error" not in answer, (answer["error"], self.said)
        return answer["value"]


def missing():
    """Return what the tests need and this machine lacks, None if it has all."""
    if _chromium() is None or shutil.which("node") is None:
        return "needs node and chromium"
    return None if (MODULES / "node_modules").is_dir() else "needs `make browser`"


def _chromium():
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def started():
    """Give a Browser, whose processes end with the block."""
    driver = Path(__file__).parent / "browser" / "driver.mjs"
    process = subprocess.Popen(
        ["node", driver, MODULES, _chromium()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # with Chromium's own processes, so that all of them end
    )
    try:
        yield Browser(process)
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
