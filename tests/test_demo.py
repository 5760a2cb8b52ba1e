"""The demo: its data, its files, its determinism; whole in `make test-all`."""

import importlib.util
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import lorakit as lk

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(model, out, *options):
    command = [sys.executable, ROOT / "examples" / "demo.py", model, "--output-dir", out, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "summary.json").read_text())


SHORT = ["--steps=2", "--batch-size=2", "--eval-rows=4", "--rouge-rows=2", "--max-tokens=64"]


def test_rows_are_functions_without_their_docstring(demo, tmp_path):
    (tmp_path / "m.py").write_text(
        "class A:\n"
        "    @property\n"
        "    def f(self):\n"
        '        """Give the answer now.\n\n        More.\n        """\n'
        "        return 42\n"
        "def g():\n"
        '    """Only a docstring, no body."""\n'
        "def h():\n"
        '    """Too short."""\n'
        "    return 1\n"
    )
    (tmp_path / "broken.py").write_text("def (")
    [row] = demo.functions(tmp_path)
    source = "@property\ndef f(self):\n    return 42"
    assert row == {
        "module": "m.py",
        "prompt": source + demo.QUESTION,
        "completion": "Give the answer now.",
    }


def test_a_few_thousand_rows_and_no_module_on_both_sides(demo, smollm2):
    rows = demo.functions(Path(sysconfig.get_paths()["stdlib"]))
    assert len(rows) > 3000
    given_away = [row for row in rows if row["completion"] in row["prompt"]]
    assert len(given_away) < 0.005 * len(rows)  # docstrings that repeat a comment or the signature
    train, held_out = demo.split(rows, lk.load_tokenizer(smollm2), 160)
    assert len(train) > 2000
    assert len(held_out) > 100
    assert not {r["module"] for r in train} & {r["module"] for r in held_out}
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}


@pytest.mark.slow
def test_short_demo_twice_gives_the_same_bytes(smollm2, tmp_path):
    out, summary = run(smollm2, tmp_path / "a", *SHORT)
    run(smollm2, tmp_path / "b", *SHORT)
    assert "held-out loss" in out
    assert set(summary) == {
        "loss_before", "loss_after", "rouge_l_before", "rouge_l_after",
        "tokens_per_second", "peak_memory_mb", "seconds",
    }  # fmt: skip
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "a" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_adapter_of_a_real_model_loads_in_peft(smollm2, tmp_path):
    """Both have one base: the real weights as a dense directory."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    model = lk.load_model(smollm2, dtype="float32")
    lk.save_model(model, base)
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=16, lora_alpha=32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.01)
    lk.save_adapter(model, tmp_path / "adapter")
    ids = torch.tensor([lk.load_tokenizer(smollm2).encode("def add(a, b):\n    return a + b\n")])
    with torch.no_grad():
        ours = model(ids)
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
        ).eval()
        assert (theirs(ids).logits - ours).abs().max() <= 1e-4
        del theirs
        # merged, through the disk, in transformers
        lk.merge(model)
        merged = model(ids)
        lk.save_model(model, tmp_path / "merged")
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        assert (back(ids).logits - merged).abs().max() <= 2e-4  # 30 layers of fp32 sums
        assert (merged - ours).abs().max() <= 2e-3 * ours.abs().max()


@pytest.mark.slow
def test_the_whole_demo(smollm2, tmp_path):
    _, summary = run(smollm2, tmp_path / "a")
    assert summary["loss_after"] <= 0.85 * summary["loss_before"]
    assert summary["rouge_l_after"] > summary["rouge_l_before"]
    _, again = run(smollm2, tmp_path / "b")
    file = "adapter_model.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert again["loss_after"] == summary["loss_after"]
