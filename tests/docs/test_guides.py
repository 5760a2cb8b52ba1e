"""Every snippet and command of README and of the guides, run as it stands there."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import lorakit as lk
from tests import programs

ROOT = Path(__file__).parents[2]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, language, file=""):
    found = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```", page(name), re.MULTILINE | re.DOTALL)
    return [text for lang, title, text in found if lang == language and title == file]


def python(name):
    return "\n".join(blocks(name, "python"))


def commands(name):
    """The lines of a page's shell blocks that call lorakit, as lists of words."""
    lines = [line for text in blocks(name, "sh") for line in text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("lorakit ")]


LAYERS = 4  # of the real model's 30: a seventh of the time, and every line runs as it would on all


@pytest.fixture(scope="module")
def prepared(smollm2, tmp_path_factory):
    """An empty directory, and a Hub cache that holds a shallow model under the real one's name."""
    cache, work = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("work")
    commit = "0" * 40
    repo = cache / f"models--{MODEL.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    model = lk.load_model(smollm2, dtype="bfloat16")
    model.config = dataclasses.replace(model.config, num_hidden_layers=LAYERS)
    del model.model.layers[LAYERS:]
    lk.save_model(model, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    lk.load_tokenizer(smollm2).save(snapshot)
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}

    def run(command):
        """Run Python's arguments, or a command line of lorakit."""
        if command[0] == "lorakit":
            command = ["-m", *command]
        done = programs.run(command, cwd=work, env=env)
        assert done.returncode == 0, done.stderr
        return done

    return work, run


def test_ten_lines_of_readme(prepared):
    work, run = prepared
    code = python("README.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    done = run(["-c", code])
    assert done.stdout.splitlines()[-1].strip()  # an answer
    assert (work / "runs" / "first" / "adapter_model.safetensors").exists()


def test_getting_started_from_python(prepared):
    work, run = prepared
    done = run(["-c", python("docs/getting-started.md")])
    before, after = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout).groups())
    assert after < 0.5 * before
    assert (work / "runs" / "plus" / "adapter_model.safetensors").exists()
    assert (work / "runs" / "merged" / "model.safetensors").exists()
    assert (work / "runs" / "merged" / "tokenizer.json").exists()


def test_getting_started_from_the_terminal(prepared):
    work, run = prepared
    guide = "docs/getting-started.md"
    [run_file], [rows] = blocks(guide, "yaml", "run.yaml"), blocks(guide, "json", "train.jsonl")
    (work / "run.yaml").write_text(run_file)
    (work / "train.jsonl").write_text(rows)
    verbs = {"train", "generate", "quantize-report", "data", "plot", "merge", "adapter"}
    assert {c[1] for c in commands(guide)} == verbs
    for command in commands(guide):
        assert run(command).stdout.strip()


def test_examples_of_the_guide_to_training(prepared):
    work, run = prepared
    code = python("docs/training.md")
    done = run(["-c", code])
    assert "\n6 False 0\n" in done.stdout
    assert done.stdout.endswith("['loss', 'preference_accuracy', 'rows', 'step']\n0.6931\n")
    assert (work / "runs" / "sums" / "checkpoint-6" / "state.json").exists()


def test_examples_of_the_guide_to_sessions(prepared):
    work, run = prepared
    *steps, function, several = run(["-c", python("docs/session.md")]).stdout.splitlines()
    losses = [float(line.split()[1]) for line in steps]
    assert [line.split()[0::2] for line in steps] == [[str(i), "True"] for i in (1, 2, 3)]
    assert losses == sorted(losses, reverse=True)
    assert function == "4 True"
    assert several == "['rank-16', 'rank-4'] True"
    assert (work / "runs" / "by-hand" / "state.json").exists()


def test_examples_of_the_guide_to_several_adapters(prepared):
    """The file is run a second time, which goes on from its last checkpoint."""
    work, run = prepared
    [file] = blocks("docs/many.md", "yaml", "many.yaml")
    rows = [{"prompt": f"{i} plus 1 is", "completion": f" {i + 1}"} for i in range(12)]
    (work / "many.yaml").write_text(file)
    for name, some in (("rows.jsonl", rows), ("other.jsonl", rows[4:])):
        (work / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    [command] = [each for each in commands("docs/many.md") if each[1] == "train"]
    first, again = run(command).stdout, run(command).stdout
    assert "step 4/6: 2 adapters, " in first
    assert "small  6 steps, loss " in first
    assert "resumed from " in again
    losses = run(["-c", python("docs/many.md")]).stdout.splitlines()[-1]
    assert re.fullmatch(r"\{'r-4': '\d+\.\d{3}', 'r-16': '\d+\.\d{3}'\}", losses)


def test_examples_of_the_guide_to_memory(prepared):
    _, run = prepared
    done = run(["-c", python("docs/memory.md")])
    *table, last = done.stdout.splitlines()
    assert table[0].split() == ["between", "steps", "at", "the", "peak"]
    assert {"weights", "activations", "together"} <= {line.split()[0] for line in table[1:]}
    assert last == "['per_device_train_batch_size=1', 'gradient_accumulation_steps=4']"


def test_examples_of_the_guide_to_lora(prepared):
    _, run = prepared
    code = python("docs/lora.md")
    done = run(["-c", code])
    names, tokens, close, drift = done.stdout.strip().splitlines()
    assert names == "['first']"
    assert tokens == "49154 49154 {'embed_tokens': [49152, 49153]}"
    assert close == "True"
    assert drift.startswith("merged on dequantized weights: logits of 32 tokens moved by")


def test_examples_of_the_guide_to_quantization(prepared):
    _, run = prepared
    code = python("docs/quantization.md")
    done = run(["-c", code])
    [printed] = re.findall(r"# (LoftQ: .*)", code)
    shallow = done.stdout.strip()
    assert re.sub(r"0\.\d+|\d+ layers", "", shallow) == re.sub(r"0\.\d+|\d+ layers", "", printed)
    # the mean of its first layers is close to that of all
    for found, said in zip(*(re.findall(r"0\.\d+", s) for s in (shallow, printed)), strict=True):
        assert float(found) == pytest.approx(float(said), abs=1e-3)


def test_examples_of_the_guide_to_data(prepared):
    work, run = prepared
    code = python("docs/data.md")
    done = run(["-c", code])
    assert done.stdout.strip().splitlines() == re.findall(r"print.*\)  # (.*)", code)
    [rows] = blocks("docs/getting-started.md", "json", "train.jsonl")
    (work / "train.jsonl").write_text(rows)
    answers = [{"prompt": f"question {i}?", "completion": "yn"[i % 3 == 0]} for i in range(90)]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers * 2))
    shown, linted, *files = (run(command).stdout for command in commands("docs/data.md"))
    assert shown.count("8 tokens, 3 of them labels\n") == 2
    assert linted.startswith("3 rows, ")
    assert [out.splitlines()[0].partition(": ")[2] for out in files[:3]] == [
        "90 of 180 rows",
        "60 of 90 rows",
        "50 of 60 rows",
    ]
    assert files[3].count(" of 50 rows (") == 3


def test_examples_of_the_guide_to_evaluation(prepared):
    work, run = prepared
    [rows] = blocks("docs/getting-started.md", "json", "train.jsonl")
    (work / "train.jsonl").write_text(rows)
    adapter = f"""
model = lk.attach(lk.load_model("{MODEL}"), lk.LoraConfig(r=2))
lk.save_adapter(model, "runs/opposites")
"""
    done = run(["-c", python("docs/evaluation.md") + adapter])
    assert re.fullmatch(
        r"0\.5000 \[0\.[34]\d{3}, 0\.[56]\d{3}\]\n\+0\.25, within noise: False\n", done.stdout
    )
    scored, compared = (run(each).stdout for each in commands("docs/evaluation.md")[:2])
    assert len((work / "base.jsonl").read_text().splitlines()) == 3
    assert scored.splitlines()[-1].startswith("rouge_l")
    # the adapter is new, and changes nothing
    assert compared.splitlines()[-1].endswith("p = 1: the difference is within noise")


def test_examples_of_the_guide_to_comparisons(prepared):
    """The file as it stands there, with one step a run and one seed; one process for all."""
    work, run = prepared
    [file] = blocks("docs/comparison.md", "yaml", "compare.yaml")
    (work / "compare.yaml").write_text(file)
    rows = [
        {"prompt": f"{i}: {a} or {b}, the opposite of {a} is", "completion": f" {b}"}
        for i, (a, b) in enumerate([("hot", "cold"), ("big", "small"), ("light", "dark")] * 10)
    ]
    (work / "opposites.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    planned, made, *others = (command[1:] for command in commands("docs/comparison.md"))
    all_of = [[*planned, "seeds=[0]"], [*made, "seeds=[0]"], *others]
    code = "from lorakit.cli.main import main\n"
    code += f"for command in {all_of}:\n    assert main(command) == 0\n    print('=' * 8)"
    plan, tables, again, _, votes = run(["-c", code]).stdout.split("=" * 8)[:5]
    assert plan.count("memory ") == 2
    assert again.strip() in tables
    assert "SmolLM2-135M-Instruct  untrained  " in tables
    assert "first 0, second 0, ties 0" in votes  # nobody answers
    assert "opposites" in (work / "sizes.html").read_text(encoding="utf-8")


def test_examples_of_the_guide_to_export(prepared):
    work, run = prepared
    [rows] = blocks("docs/getting-started.md", "json", "train.jsonl")
    (work / "train.jsonl").write_text(rows)
    make = f"""if True:
        import lorakit as lk
        model = lk.attach(lk.load_model("{MODEL}"), lk.LoraConfig(r=2))
        lk.save_adapter(model, "runs/opposites")
    """
    run(["-c", make])
    command = commands("docs/export.md")[0]
    said = run(command).stdout
    assert said.startswith("runs/opposites.gguf: q4_k_m, 42.5 M parameters in ")
    assert "not what q4_k_m means" in said
    said = run(["-c", python("docs/export.md")]).stdout
    assert said.startswith("runs/model.gguf: q8_0, 42.5 M parameters in ")


def test_examples_of_the_guide_to_text(prepared):
    _, run = prepared
    done = run(["-c", python("docs/generation.md")])
    assert done.stdout == "5 length\n8 length\n"


@pytest.mark.slow  # half a minute
def test_the_guide_to_classes(prepared):
    """Its rows are learned in three steps as far as a probability goes, and its commands run."""
    work, run = prepared
    scores, film = run(["-c", python("docs/classification.md")]).stdout.splitlines()[-2:]
    assert scores.startswith("{'loss': ")
    assert film.split()[0] in ("bad", "good")
    (work / "films-test.jsonl").write_text('{"text": "A fine film.", "label": "good"}\n')
    [evaluated, merged] = commands("docs/classification.md")
    assert "accuracy" in run(evaluated).stdout
    run(merged)
    assert lk.read_classifier(work / "merged").labels == ["bad", "good"]


def test_example_of_the_guide_to_kernels(prepared):
    _, run = prepared
    done = run(["-c", python("docs/kernels.md")])
    assert done.stdout.strip() == "torch.Size([4, 64])"


def test_make_targets():
    targets = set(re.findall(r"(?:^|`)make ([\w-]+)", page("README.md"), re.MULTILINE))
    targets |= set(re.findall(r"^make ([\w-]+)", page("CONTRIBUTING.md"), re.MULTILINE))
    assert {"demo", "test", "lint", "bench", "test-all", "docs", "gpu"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_ci_runs_what_readme_names():
    [command] = re.findall(r"^make .*$", page(".ci/run"), re.MULTILINE)
    assert command in page("README.md")
