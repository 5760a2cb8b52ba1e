"""The site of the documentation builds without a warning, and holds every public name and verb."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit as lk
from lorakit.cli.main import build_parser

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    subprocess.run(["make", "view"], cwd=ROOT, check=True, capture_output=True)
    quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],
        cwd=ROOT, env={**os.environ, **quiet}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_the_reference_holds_every_public_name(site):
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in set(lk.__all__) - {"kernels"}:
        assert f"lk.{name}" in python, name
    for module in ("memory", "metrics", "optim"):
        for name in getattr(lk, module).__all__:
            assert f"lk.{module}.{name}" in python, name
    kernels = (site / "reference" / "kernels.html").read_text(encoding="utf-8")
    for name in lk.kernels.__all__:
        assert f"lk.kernels.{name}" in kernels, name


def test_the_command_line_holds_every_verb(site):
    text = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    usage = build_parser().format_help()
    verbs = ["train", "generate", "merge", "export", "quantize-report", "data", "plot", "adapter"]
    for verb in verbs:
        assert verb in usage
        assert f"usage: lorakit {verb}" in text


def test_no_page_asks_another_host(site):
    """Fonts and scripts come from the site itself."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for tag in ('<script src="http', '<link rel="stylesheet" href="http', '<img src="http'):
            assert tag not in text, page
