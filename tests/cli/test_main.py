"""The `lorakit` command: wrong usage, help, and how it ends."""

import argparse
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lorakit as lk
from lorakit.cli.arguments import STORAGE
from lorakit.cli.main import build_parser, main
from lorakit.config import quantization


def test_options_may_stand_anywhere(run_file, tiny_dir, capsys):
    assert main(["train", str(run_file), "--debug", "max_steps=1", "learning_rate=2e-3"]) == 0
    assert "step 1/1: loss" in capsys.readouterr().out
    short = ["--max-new-tokens", "2"]
    assert main(["generate", str(tiny_dir), "--chat", "hello", *short]) == 0
    assert main(["generate", "--dtype", "float32", str(tiny_dir), *short, "hello"]) == 0


def test_debug_shows_the_traceback(run_file, capsys):
    assert main(["train", str(run_file), "model=/nowhere", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


WRONG = [
    [],
    ["tain"],
    ["train"],
    ["train", "run.yaml", "max_steps"],
    ["train", "run.yaml", "=3"],
    ["generate", "m", "--top-q", "1"],
    ["generate", "m", "a", "b"],
    ["chat", "m", "a"],
    ["plan"],
    ["plan", "x", "y"],
    ["plot"],
    ["report"],
    ["board"],
    ["plot", "--out", "x"],
    ["plot", "x", "--to", "y"],
    ["adapter"],
    ["adapter", "shw", "x"],
    ["adapter", "show"],
    ["adapter", "show", "x", "y"],
    ["adapter", "convert", "x"],
    ["adapter", "convert", "x", "y", "--rank", "r"],
    ["adapter", "convert", "x", "y", "--base", "b", "z"],
]


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "usage" in err or "is not of the form key=value" in err


HELP = [
    [],
    ["train"],
    ["evaluate"],
    ["generate"],
    ["chat"],
    ["compare"],
    ["serve"],
    ["merge"],
    ["export"],
    ["push"],
    ["quantize-report"],
    ["teach"],
    ["data"],
    ["data", "show"],
    ["data", "lint"],
    ["data", "split"],
    ["data", "dedup"],
    ["data", "balance"],
    ["data", "sample"],
    ["plan"],
    ["plot"],
    ["report"],
    ["board"],
    ["adapter"],
    ["adapter", "show"],
    ["adapter", "convert"],
]


def parsers(parser, name=()):
    """Return every parser of the command line, by the words before its arguments."""
    found = {name: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                found |= parsers(inner, (*name, word))
    return found


def test_every_verb_is_in_the_list_of_helps_and_has_its_work():
    found = parsers(build_parser())
    assert sorted(found) == sorted(map(tuple, HELP))
    for name, parser in found.items():
        if not any(other[:-1] == name for other in found):  # no action below it
            assert parser.get_default("run").__name__ == "_".join(name).replace("-", "_")
            assert parser.description


def test_every_argument_has_its_help():
    for name, parser in parsers(build_parser()).items():
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help, (name, action.dest)


def test_storages_are_those_of_the_settings():
    assert list(quantization.STORAGE) == STORAGE


SCRIPT = Path(sys.executable).with_name("lorakit")


@pytest.mark.parametrize(
    "start",
    [[sys.executable, "-m", "lorakit"], [sys.executable, "-m", "lorakit.cli"], [SCRIPT]],
    ids=["python -m lorakit", "python -m lorakit.cli", "lorakit"],
)
def test_how_it_is_started(start):
    done = subprocess.run([*start, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"lorakit {lk.__version__}\n"


@pytest.mark.parametrize("arguments", [[*verb, "--help"] for verb in HELP])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "usage: lorakit" in capsys.readouterr().out


def test_ctrl_c_before_anything_is_imported():
    """The exit imports nothing: torch, cut off once, cannot be imported again."""
    code = """
        import sys
        from lorakit.cli import main, plot
        def interrupted(args):
            raise KeyboardInterrupt
        plot.plot = interrupted
        assert main(["plot", "x"]) == 130
        assert "torch" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "lorakit: interrupted\n")
