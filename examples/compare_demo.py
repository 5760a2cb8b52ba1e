"""A comparison on a real model and real text: which learning rate, on three tasks?

    python examples/compare_demo.py SmolLM2-135M-Instruct.Q4_1.gguf

The text is this Python's own standard library, and the tasks are made of its functions:

    package      classification   the first line of a docstring -> the package that it comes from
    signature    extraction       a "def" line -> the function's name and its arguments
    describe     writing          a function without its docstring -> the docstring's first line

The program writes rows and a comparison file, compare.yaml, and makes its runs as `lorakit compare`
does: the untrained model and two learning rates on each task. A run that was stopped goes on.
Further models on the command line are compared too. The end is a page, comparison.html.
"""

import argparse
import ast
import json
import random
import sys
import sysconfig
import textwrap
from pathlib import Path

import yaml

import lorakit as lk

PACKAGES = ("asyncio", "email", "logging", "unittest")
OTHERS = ("collections", "concurrent", "http", "importlib", "json", "multiprocessing", "xml")
KINDS = {"package": "classification", "signature": "extraction", "describe": "writing"}


def functions(root: Path) -> list[tuple[Path, list[str], ast.FunctionDef]]:
    """Every function of the packages: its file, the lines of the file, and its definition."""
    found = []
    for path in sorted(path for name in PACKAGES + OTHERS for path in (root / name).rglob("*.py")):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        lines = source.splitlines()
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        found += [(path.relative_to(root), lines, node) for node in nodes]
    return found


def summary(node: ast.FunctionDef) -> str:
    """The first line of a docstring, if it says something."""
    line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
    return line if len(line.split()) >= 3 else ""


def task_rows(root: Path, count: int, seed: int) -> dict[str, list[dict[str, str]]]:
    """Return `count` rows of each task, none of them twice, drawn by a seed."""
    rows: dict[str, dict[str, str]] = {name: {} for name in KINDS}
    for path, lines, node in functions(root):
        said, package = summary(node), path.parts[0]
        if said and package in PACKAGES:
            prompt = f"Text: {said}\nPackage ({', '.join(PACKAGES)}):"
            rows["package"].setdefault(prompt, package)
        names = [argument.arg for argument in node.args.args]
        line = lines[node.lineno - 1].strip()
        if 2 <= len(names) <= 5 and line.startswith("def ") and line.endswith(":"):
            parts = [f"name: {node.name}", *(f"argument: {name}" for name in names)]
            rows["signature"].setdefault(f"{line}\nParts:", "; ".join(parts))
        if said and len(node.body) > 1 and node.end_lineno - node.lineno < 14:
            doc = node.body[0]
            kept = lines[node.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]
            prompt = textwrap.dedent("\n".join(kept)) + "\n\nDescribe this function in one line:"
            rows["describe"].setdefault(prompt, said)
    chosen = {}
    for name, found in rows.items():
        # a prompt that ended in a space would share a token with what follows
        pairs = [{"prompt": p, "completion": f" {c}"} for p, c in found.items() if len(p) < 500]
        random.Random(seed).shuffle(pairs)
        chosen[name] = balanced(pairs)[:count] if name == "package" else pairs[:count]
    return chosen


def balanced(pairs: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return as many rows of each class, one class after the other in turns."""
    classes = [[pair for pair in pairs if pair["completion"] == f" {name}"] for name in PACKAGES]
    return [pair for turn in zip(*classes, strict=False) for pair in turn]


def write_files(args: argparse.Namespace) -> Path:
    """Write the rows and the comparison file, and return the file's path."""
    folder, file = args.output_dir, args.output_dir / "compare.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(sysconfig.get_paths()["stdlib"])
    tasks = {}
    for name, rows in task_rows(root, args.rows, args.seed).items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tasks[name] = {"data": str(path), "kind": KINDS[name]}
    values = {
        "name": "learning rates",
        "output_dir": str(folder),
        "models": {Path(model).stem.partition(".")[0]: model for model in args.models},
        "tasks": tasks,
        "base": {
            "dtype": "float32",  # most CPUs multiply bf16 several times slower
            "quantize": "nf4",
            "lora": {"r": 16, "lora_alpha": 32},
            "max_steps": args.steps,
            "per_device_train_batch_size": 8,
            "max_seq_length": 192,
            "warmup_ratio": 0.1,
        },
        "settings": {"lr2e-4": {"learning_rate": 2e-4}, "lr1e-3": {"learning_rate": 1e-3}},
        "seeds": [args.seed],
        "exports": args.exports,
    }
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help=".gguf files, model directories or Hub ids")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/compare-demo"))
    parser.add_argument("--rows", type=int, default=600, help="rows of each task")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--exports", nargs="*", default=["q4_k_m", "q8_0"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    file = write_files(args)
    print(f"the comparison is in {file}; `lorakit compare {file}` makes the same runs")
    result = lk.compare_models(file)
    print(result)
    if result.interrupted:
        print("interrupted; the same command goes on from here")
        sys.exit(130)
    page = lk.write_report(result.folder, result.folder / "comparison.html")
    print(f"comparison.json, comparison.md and the runs are in {result.folder}/")
    print(f"{page} shows all of it; it opens in a browser")
    sys.exit(1 if result.failed else 0)


if __name__ == "__main__":
    try:
        main()
    except lk.LorakitError as error:
        sys.exit(f"compare_demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
