"""QLoRA on a real model and real text: teach SmolLM2-135M-Instruct to write docstrings.

    python examples/demo.py SmolLM2-135M-Instruct.Q4_1.gguf

The text is this Python's own standard library: a prompt is a function without its docstring, the
completion is the docstring's first line. Modules are split, so that held-out functions come from
modules that training never sees. The weights are packed to NF4 (4.13 bits each), a LoRA of rank 16
is attached to every linear layer, and the model is measured on held-out functions before and
after.
"""

import argparse
import ast
import hashlib
import json
import random
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import torch

import lorakit as lk

SKIP = {"test", "tests", "idlelib", "lib2to3", "site-packages", "idle_test", "__pycache__"}
QUESTION = "\n\nDescribe this function in one line:\n"


def functions(root: Path) -> list[dict[str, str]]:
    """Every function below `root` that has a docstring: module, prompt, completion."""
    rows = []
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root)
        if SKIP & set(module.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(node.body) > 1:
                summary = (ast.get_docstring(node) or "").partition("\n")[0].strip()
                if len(summary.split()) < 3:
                    continue
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                doc = node.body[0]
                kept = lines[first - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]
                prompt = textwrap.dedent("\n".join(kept)) + QUESTION
                rows.append({"module": str(module), "prompt": prompt, "completion": summary})
    return rows


def split(rows: list[dict], tok, max_tokens: int) -> tuple[list[dict], list[dict]]:
    """Rows of at most `max_tokens` tokens, without repeats: (train, held out), cut by module."""
    train, held_out, seen = [], [], set()
    for row in rows:
        length = len(tok.encode(row["prompt"])) + len(tok.encode(row["completion"])) + 1
        if row["prompt"] in seen or length > max_tokens:
            continue
        seen.add(row["prompt"])
        digest = hashlib.sha256(row["module"].encode()).digest()
        (held_out if digest[0] < 256 // 10 else train).append(row)
    return train, held_out


def first_line(text: str) -> str:
    """The first line that says something: no code fence, no empty line."""
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in lines if line and not line.startswith("```")), "")


def rouge(model, tok, rows: list[dict]) -> tuple[float, list[str]]:
    """Mean ROUGE-L of greedy one-line answers, and the answers."""
    prompts = [row["prompt"] for row in rows]
    texts = lk.generate_batch(model, tok, prompts, max_new_tokens=24, batch_size=16, progress=True)
    answers = [first_line(text) for text in texts]
    scores = [lk.rouge_l(a, row["completion"]) for a, row in zip(answers, rows, strict=True)]
    return sum(scores) / len(scores), answers


def plot(metrics: Path, file: Path, losses: tuple[float, float], answers: list[dict]) -> None:
    """Draw the loss of every step, and beside it the first short functions with both answers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, (axes, text) = plt.subplots(1, 2, figsize=(10.5, 4), width_ratios=(4.5, 6))
    axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], label="training, per step")
    before, after = losses
    axes.axhline(before, color="gray", linestyle=":", label=f"held out, before: {before:.2f}")
    axes.axhline(after, color="tab:red", linestyle="--", label=f"held out, after: {after:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="NF4 + LoRA on docstrings")
    axes.legend(loc="lower left")
    text.axis("off")
    text.set_title("Functions that it never saw, described in one line", loc="left")
    short = [each for each in answers if each["prompt"].removesuffix(QUESTION).count("\n") < 3]
    lines = []
    for each in short[:3]:
        lines += [f"{line[:70]}" for line in each["prompt"].removesuffix(QUESTION).splitlines()]
        for who in ("library", "before", "after"):
            lines.append(f"  {who + ':':9}{each[who] or '(nothing)'}"[:78])
        lines.append("")
    style = {"va": "top", "family": "monospace", "fontsize": 9, "parse_math": False}
    text.text(0, 0.97, "\n".join(lines), **style)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a .gguf file, a model directory or a Hub id")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--eval-rows", type=int, default=128, help="held-out rows for the loss")
    parser.add_argument("--rouge-rows", type=int, default=48, help="held-out rows to answer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()

    tok = lk.load_tokenizer(args.model)
    rows = functions(Path(sysconfig.get_paths()["stdlib"]))
    train, held_out = split(rows, tok, args.max_tokens)
    random.Random(args.seed).shuffle(held_out)
    held_out = held_out[: args.eval_rows]
    asked = held_out[: args.rouge_rows]
    print(
        f"standard library of Python {sys.version.split()[0]}: {len(rows)} functions with "
        f"docstrings; {len(train)} short ones to train on, {len(held_out)} of other modules "
        "held out"
    )

    # float32: most CPUs multiply bf16 several times slower
    model = lk.load_model(args.model, dtype="float32", quantize="nf4")
    torch.manual_seed(args.seed)
    lk.attach(model, lk.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

    print("before training: held-out loss and answers")
    loss_before = lk.evaluate(model, tok, held_out)["loss"]
    rouge_before, answers_before = rouge(model, tok, asked)
    result = lk.train(
        model,
        tok,
        train,
        lk.TrainConfig(
            output_dir=str(args.output_dir),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=1e-3,
            warmup_ratio=0.1,
            seed=args.seed,
        ),
        base_model=args.model,
    )
    if result.interrupted:
        print(f"interrupted; the adapter so far is in {args.output_dir}/")
        sys.exit(130)
    print("after training: held-out loss and answers")
    loss_after = lk.evaluate(model, tok, held_out)["loss"]
    rouge_after, answers_after = rouge(model, tok, asked)
    answers = [
        {"prompt": row["prompt"], "library": row["completion"], "before": before, "after": after}
        for row, before, after in zip(asked, answers_before, answers_after, strict=True)
    ]
    rows_file = args.output_dir / "held_out.jsonl"  # as `lorakit export --rows` takes them
    kept = [{key: row[key] for key in ("prompt", "completion")} for row in held_out]
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    picture = args.output_dir / "demo.png"
    plot(args.output_dir / "metrics.jsonl", picture, (loss_before, loss_after), answers)

    summary = {
        "loss_before": loss_before,
        "loss_after": loss_after,
        "rouge_l_before": rouge_before,
        "rouge_l_after": rouge_after,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_mb": result.peak_memory_mb,
        "seconds": time.perf_counter() - started,
    }
    (args.output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for each in answers[:3]:
        print(f"\n{textwrap.indent(each['prompt'].removesuffix(QUESTION), '    | ')}")
        for who in ("library", "before", "after"):
            print(f"    {who + ':':8} {each[who] or '(nothing)'}")
    print(f"""
                      before     after
held-out loss         {loss_before:6.3f}    {loss_after:6.3f}    {loss_after / loss_before - 1:+.1%}
held-out ROUGE-L      {rouge_before:6.3f}    {rouge_after:6.3f}
training              {result.steps} steps, {result.seconds:.0f} s
tokens per second     {result.tokens_per_second:.0f}
peak memory           {result.peak_memory_mb:.0f} MB
whole demo            {summary["seconds"]:.0f} s
adapter, metrics.jsonl, held_out.jsonl, demo.png, summary.json in {args.output_dir}/""")


if __name__ == "__main__":
    try:
        main()
    except lk.LorakitError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
