"""Folders of runs as training writes them, with hostile names and texts, and a comparison."""

import json
import math

HOSTILE = "<img src=x onerror=alert(1)>"
COMPLETION = "</script><script>alert(2)</script>\u2028<img src=x onerror=alert(3)>"


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def bump(x, phase):
    """A number in [-1, 1] that looks drawn, and is the same each time."""
    return math.sin(x * x + phase)


def curve(steps, floor=1.2, tau=40.0, phase=0.0):
    """A loss that falls, with the same bumps for a phase, and what training writes beside it."""
    return [
        {
            "step": step,
            "epoch": step / 100,
            "loss": floor + 1.8 * math.exp(-step / tau) + 0.09 * bump(2.7 * step, phase),
            "learning_rate": 2e-4 * (1 - step / (steps + 1)),
            "grad_norm": 0.4 + math.exp(-step / (45 + phase)) + 0.1 * bump(step, phase),
            "tokens": 2048 * step,
            "tokens_per_second": 760.0 - 2 * phase + 12 * bump(step, phase),
            "padding": 0.1,
            "peak_memory_mb": 1240.0,
        }
        for step in range(1, steps + 1)
    ]


def write_run(run, *, steps=120, r=8, floor=1.2, state="finished", started=1.79e9, samples=True):
    """A run with metrics, evaluations, settings and samples."""
    run.mkdir(parents=True)
    lines = curve(steps, floor, phase=r)
    measured = range(steps // 4, steps + 1, steps // 4)
    for step in measured:
        loss = floor + 0.1 + 1.8 * math.exp(-step / 40)
        scores = {"eval_loss": loss, "eval_exact_match": 0.6 * (1 - math.exp(-step / 60))}
        lines.append({"step": step, **scores, "eval_rouge_l": 0.5 + step / 1000})
    lines.sort(key=lambda line: line["step"])
    write_lines(run / "metrics.jsonl", lines)
    settings = {"learning_rate": 2e-4, "max_steps": steps, "seed": 0, "lora": {"r": r}}
    record = {
        "version": 1,
        "state": state,
        "error": "the loss was not finite in ten steps" if state == "failed" else None,
        "started": started,
        "ended": started + 3.1 * steps,
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "objective": "sft",
        "total_steps": steps,
        "settings": settings,
        "run_file": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "lora": {"r": r}},
    }
    (run / "run.json").write_text(json.dumps(record))
    if samples:
        write_lines(run / "samples.jsonl", (line for step in measured for line in answers(step)))


def answers(step):
    """What a run answers after a step: it comes nearer to the reference."""
    prompt = "Write a docstring.\n\ndef area(width, height):\n    return width * height"
    reference = "Return the area of a rectangle of this width and height."
    words = reference.split()
    near = " ".join(words[: min(len(words), 2 + step // 15)])
    yield {"step": step, "row": 0, "prompt": prompt, "reference": reference, "completion": near}
    hostile = {"prompt": f"What is {HOSTILE}?", "reference": "A picture.", "completion": COMPLETION}
    yield {"step": step, "row": 1, **hostile}


def write_comparison(folder, name=f"sizes {HOSTILE}"):
    """A finished comparison of two settings and the untrained model, on one task."""
    folder.mkdir(parents=True)

    def score(value, width):
        return {"value": value, "low": value - width, "high": value + width, "better": "higher"}

    def row(settings, accuracy, f1, **more):
        scores = {"accuracy": score(accuracy, 0.04), "macro_f1": score(f1, 0.05)}
        ids = [f"sentiment--small--{settings}--s0"]
        return {"run ids": ids, "model": "small", "settings": settings, "scores": scores, **more}

    def pair(first, second, value, p, noise):
        sides = {
            name: {"model": "small", "settings": each}
            for name, each in (("first", first), ("second", second))
        }
        gap = {"value": value, "low": value - 0.05, "high": value + 0.05}
        said = {"metric": "accuracy", "difference": gap, "p_value": p, "within_noise": noise}
        return {**sides, **said}

    trained = {"seconds": 122.0, "peak_memory_mb": 1240.0}
    size = {"q4_k_m": {"bytes": 105_000_000, "tokens_per_second": 61.0, "measured_by": "lorakit"}}
    rows = [
        row("r8", 0.84, 0.82, tokens_per_second=713.0, export=size, **trained),
        row("r16", 0.86, 0.85, tokens_per_second=701.0, export={}, **trained),
        row("untrained", 0.51, 0.40, tokens_per_second=None, seconds=None, peak_memory_mb=None),
    ]
    runs = [
        {"id": each["run ids"][0], "model": "small", "task": "sentiment", "seed": 0}
        | {"settings": each["settings"], "folder": "x", "state": "finished"}
        for each in rows
    ]
    task = {
        "name": "sentiment",
        "kind": "classification",
        "metrics": ["accuracy", "macro_f1"],
        "sizes": {"train": 960, "validation": 120, "test": 120},
        "rows": rows,
        "pairs": [
            pair("r8", "r16", 0.02, 0.31, True),
            pair("untrained", "r16", 0.35, 0.0002, False),
        ],
    }
    rules = [
        {"rule": "The best score comes first.", "says": "r16 has an accuracy of 0.860."},
        {"rule": "Within noise the smaller one wins.", "says": "r8 has half the parameters."},
    ]
    advice = {"text": "Take small with r8: no other is better by more than noise.", "rules": rules}
    values = {"version": 1, "name": name, "runs": runs, "tasks": [task]}
    values |= {"notes": ["120 rows tell differences of 0.08."], "recommendation": advice}
    (folder / "comparison.json").write_text(json.dumps(values))
    (folder / "predictions").mkdir()
    for number, each in enumerate(runs):
        write_lines(
            folder / "predictions" / f"{each['id']}.jsonl",
            [
                {"prompt": f"Is {i} good?", "reference": "yes", "prediction": f"{number} {HOSTILE}"}
                for i in range(2)
            ],
        )
