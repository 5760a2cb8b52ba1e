"""GRPO on a real model: teach SmolLM2-135M-Instruct to add, by telling it what is right.

    python examples/grpo_demo.py SmolLM2-135M-Instruct [--steps 100]

A row is a sum such as "What is 3 + 7?", of 2 to 9 and 2 to 9. Its answer is written down for the
reward alone: a completion gets 1 if its last number is right. 16 of the 64 sums are held out; the
model answers all of these before and after, greedily. Killed, the same command goes on.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch

import lorakit as lk

HELD_OUT, LENGTH, GROUPS, COMPLETIONS = 16, 10, 2, 8


def sums(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows to learn from, and those to ask."""
    pairs = [(a, b) for a in range(2, 10) for b in range(2, 10)]
    random.Random(seed).shuffle(pairs)
    rows = [
        {
            # an empty system message, in place of the template's own of 20 tokens
            "prompt": [
                {"role": "system", "content": ""},
                {"role": "user", "content": f"What is {a} + {b}?"},
            ],
            "answer": a + b,
        }
        for a, b in pairs
    ]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def answers(model, tok, rows: list[dict[str, Any]]) -> list[str]:
    """Greedy answers, as long as those that are rewarded."""
    prompts = [row["prompt"] for row in rows]
    return lk.generate_batch(model, tok, prompts, max_new_tokens=LENGTH, batch_size=len(rows))


def right(texts: list[str], rows: list[dict[str, Any]]) -> float:
    """The share of texts whose last number is the answer."""
    said = [(re.findall(r"\d+", text) or ["-1"])[-1] for text in texts]
    return sum(int(n) == row["answer"] for n, row in zip(said, rows, strict=True)) / len(rows)


def plot(metrics: Path, file: Path, shares: tuple[float, float]) -> None:
    """Draw the reward of every step and its mean over ten, and the answers to what is held out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    rewards = [step["reward"] for step in steps]
    means = [sum(rewards[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(len(rewards))]
    figure, axes = plt.subplots(figsize=(7, 3.6))
    numbers = [step["step"] for step in steps]
    axes.plot(numbers, rewards, color="tab:blue", alpha=0.35, label="reward of a step")
    axes.plot(numbers, means, color="tab:blue", label="mean of its last ten")
    for share, when, style in zip(shares, ("before", "after"), (":", "--"), strict=True):
        label = f"held-out sums, {when}: {share:.0%} right"
        axes.axhline(share, color="tab:red", linestyle=style, label=label)
    axes.set(xlabel="step", ylabel="share of right answers", ylim=(0, 1), title="GRPO on sums")
    axes.legend(loc="best")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a .gguf file, a model directory or a Hub id")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/grpo"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train, held_out = sums(args.seed)
    tok = lk.load_tokenizer(args.model)
    model = lk.load_model(args.model, dtype="float32")
    before = right(answers(model, tok, held_out), held_out)
    torch.manual_seed(args.seed)
    lk.attach(model, lk.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    result = lk.train(
        model,
        tok,
        train,
        lk.TrainConfig(
            output_dir=str(args.output_dir),
            objective="grpo",
            grpo=lk.GrpoConfig(
                rewards=[lk.RewardConfig("numeric_answer")],
                num_generations=COMPLETIONS,
                max_completion_length=LENGTH,
            ),
            per_device_train_batch_size=GROUPS * COMPLETIONS,
            learning_rate=args.rate,
            lr_scheduler_type="constant",
            max_steps=args.steps,
            save_steps=5,
            resume="auto",
            seed=args.seed,
        ),
        base_model=args.model,
    )
    if result.interrupted:
        print("interrupted; the same command goes on")
        sys.exit(130)
    texts = answers(model, tok, held_out)
    after = right(texts, held_out)
    plot(args.output_dir / "metrics.jsonl", args.output_dir / "grpo.png", (before, after))
    for row, text in list(zip(held_out, texts, strict=True))[:5]:
        print(f"{row['prompt'][-1]['content']:18} {text.strip()!r}")
    print(f"held-out sums: {before:.0%} right before, {after:.0%} after {result.steps} steps")
    print(f"metrics.jsonl, rollouts.jsonl, grpo.png in {args.output_dir}/")


if __name__ == "__main__":
    try:
        main()
    except lk.LorakitError as error:
        sys.exit(f"grpo_demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
