"""Every snippet and command of README, run as it stands there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit as lk

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language, name=""):
    return [text for lang, file, text in BLOCKS if lang == language and file == name]


@pytest.fixture(scope="module")
def prepared(smollm2, tmp_path_factory):
    """An empty directory, and a Hub cache that holds the model under its Hub name."""
    cache, work = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("work")
    commit = "0" * 40
    repo = cache / f"models--{MODEL.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    lk.save_model(lk.load_model(smollm2, dtype="bfloat16"), snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    lk.load_tokenizer(smollm2).save(snapshot)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PATH": path}

    def run(command, check=True):
        return subprocess.run(
            command, cwd=work, env=env, capture_output=True, text=True, check=check
        )

    return work, run


def test_python_example(prepared):
    work, run = prepared
    [code] = blocks("python")
    assert len(code.strip().splitlines()) <= 20
    done = run([sys.executable, "-c", code])
    before, after = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout).groups())
    assert after < 0.5 * before
    assert (work / "runs" / "first" / "adapter_model.safetensors").exists()
    assert (work / "runs" / "merged" / "model.safetensors").exists()
    assert (work / "runs" / "merged" / "tokenizer.json").exists()


def test_command_line(prepared):
    work, run = prepared
    [run_file], [rows] = blocks("yaml", "run.yaml"), blocks("json", "train.jsonl")
    (work / "run.yaml").write_text(run_file)
    (work / "train.jsonl").write_text(rows)
    commands = [line for text in blocks("sh") for line in text.splitlines() if "lorakit " in line]
    commands = [shlex.split(c, comments=True) for c in commands if c.startswith("lorakit ")]
    verbs = {"train", "generate", "quantize-report", "data", "plot", "merge", "adapter"}
    assert {c[1] for c in commands} == verbs
    for command in commands:
        done = run(command, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_examples_of_the_guide_to_training(prepared):
    work, run = prepared
    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL))
    done = run([sys.executable, "-c", code])
    assert "\n6 False 0\n" in done.stdout
    assert done.stdout.endswith("['loss', 'preference_accuracy', 'rows', 'step']\n")
    assert (work / "runs" / "sums" / "checkpoint-6" / "state.json").exists()


def test_examples_of_the_guide_to_lora(prepared):
    _, run = prepared
    guide = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL))
    done = run([sys.executable, "-c", code])
    names, close, drift = done.stdout.strip().splitlines()
    assert names == "['first']"
    assert close == "True"
    assert drift.startswith("merged on dequantized weights: logits of 32 tokens moved by")


def test_examples_of_the_guide_to_quantization(prepared):
    _, run = prepared
    guide = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL))
    done = run([sys.executable, "-c", code])
    [printed] = re.findall(r"# (LoftQ: .*)", code)
    assert done.stdout.strip() == printed


def test_examples_of_the_guide_to_data(prepared):
    work, run = prepared
    guide = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL))
    assert set(re.findall(r"\blk\.(\w+)", guide)) <= set(lk.__all__)
    done = run([sys.executable, "-c", code])
    assert done.stdout.strip().splitlines() == re.findall(r"print.*\)  # (.*)", code)
    (work / "train.jsonl").write_text(blocks("json", "train.jsonl")[0])
    commands = re.findall(r"^lorakit .*$", guide, re.MULTILINE)
    shown, linted = (run(shlex.split(command)).stdout for command in commands)
    assert shown.count("9 tokens, 3 of them labels\n") == 2
    assert linted.startswith("3 rows, ")


def test_make_targets():
    targets = set(re.findall(r"(?:^|`)make ([\w-]+)", README, re.MULTILINE))
    assert {"demo", "test", "lint", "bench", "test-all"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_ci_runs_what_readme_names():
    script = (ROOT / ".ci" / "run").read_text()
    [command] = re.findall(r"^make .*$", script, re.MULTILINE)
    assert command in README


@pytest.mark.parametrize(
    "page",
    ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))],
)
def test_links_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_names_in_readme_are_public():
    for name in set(re.findall(r"\blk\.(\w+)", README)):
        assert name in lk.__all__, name
