"""Runs of tiny models on several ranks, and the processes that take them.

ranks = start(2, command(model, folder, ["padded", {}], ["packed", {"seed": 1}]))
ended(ranks)                                     what they return, when all have ended
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

import lorakit as lk
from lorakit.training import ranks
from lorakit.training.state import STATE_TENSORS, checkpoints
from tests.conftest import ROWS
from tests.training.runs import ADAPTER, JUDGED, PAIRS

ROOT = Path(__file__).parents[2]
MODEL = "model.safetensors"
LIMIT = 300.0  # s that a group of processes may take

SHORT = {"max_steps": 3, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
# name -> the model's dtype, the adapter's settings or None, the run's, and the rows
CASES = {
    "padded": (
        "float32",
        {"lora_dropout": 0.2},
        {"gradient_accumulation_steps": 3, "neftune_noise_alpha": 5.0, "optim": "adamw_8bit",
         "eval_steps": 2, "eval_metrics": ["exact_match", "rouge_l"]},
        ROWS,
    ),
    "packed": (
        "bfloat16",
        {"modules_to_save": ["lm_head"]},
        {"packing": True, "max_seq_length": 40, "gradient_accumulation_steps": 4,
         "gradient_checkpointing": True},
        ROWS,
    ),
    "idle": ("float32", {"use_dora": True}, {}, ROWS),  # all ranks but one have nothing to do
    "dpo": (
        "float32",
        {"lora_dropout": 0.1},
        {"objective": "dpo", "gradient_accumulation_steps": 2, "eval_steps": 3},
        PAIRS,
    ),
    "kto": (
        "float32",
        {"lora_dropout": 0.1},
        {"objective": "kto", "gradient_accumulation_steps": 3, "eval_steps": 3,
         "undesirable_weight": 0.5},
        JUDGED,
    ),
    "grpo": (
        "float32",
        {},
        {"objective": "grpo", "gradient_accumulation_steps": 4, "packing": True,
         "grpo": lk.GrpoConfig(
             [lk.RewardConfig("length", length=12)], num_generations=4, max_completion_length=5,
             num_iterations=2, beta=0.05)},
        [{"prompt": row["prompt"]} for row in PAIRS],
    ),
    "full": (
        "bfloat16",
        None,
        {"train": "full", "gradient_accumulation_steps": 3, "optim": "adamw_8bit", "eval_steps": 3},
        ROWS,
    ),
    "divided": (
        "bfloat16",
        None,
        {"train": "full", "gradient_accumulation_steps": 3, "eval_steps": 3, "max_grad_norm": 0.1},
        ROWS,
    ),
    "divided orpo": (
        "bfloat16",
        None,
        {"train": "full", "objective": "orpo", "gradient_accumulation_steps": 3, "eval_steps": 3},
        PAIRS,
    ),
    "fast": ("float32", {}, {"gradient_accumulation_steps": 3, "reduce": "fast"}, ROWS),
}  # fmt: skip


def take(path: Path, out: Path, case: str, options: dict):
    """Take the run of a case in this process, alone or as one of the ranks."""
    dtype, lora, own, rows = CASES[case]
    mesh = None
    if case.startswith("divided"):
        run = {"model": str(path), "data": "rows.jsonl", "shard": "full", "train": "full"}
        mesh = lk.mesh_of_run(lk.RunConfig.from_dict(run))
    quantize = None if lora is None else "nf4"
    model = lk.load_model(path, dtype=dtype, quantize=quantize, mesh=mesh)
    torch.manual_seed(options.get("seed", 0))
    if lora is not None:
        lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8, **lora))
    config = lk.TrainConfig(**{"output_dir": str(out / case), **SHORT, **own, **options})
    data = {"train": rows, "validation": rows[:5]} if config.eval_steps else rows
    written = [bytes_written()]
    lk.train(
        model,
        lk.load_tokenizer(path),
        data,
        config,
        after_step=lambda: written.append(bytes_written()),
    )
    return model, written


def bytes_written() -> int:
    """Return how many bytes this process has written, to sockets too; Linux counts them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def found(out: Path, case: str) -> dict:
    """What a run has left: bytes of its files, and its numbers without times."""
    steps = [json.loads(line) for line in (out / case / "metrics.jsonl").open()]
    timed = ("tokens_per_second", "peak_memory_mb", "rollout_seconds")
    # the sampler's logits have other last bits with other rows beside them
    timed += ("sampling_logp_difference", "sampling_logp_difference_max")
    return {
        "result": (out / case / (MODEL if CASES[case][1] is None else ADAPTER)).read_bytes(),
        "state": (checkpoints(out / case)[-1].path / STATE_TENSORS).read_bytes(),
        "steps": [{k: v for k, v in step.items() if k not in timed} for step in steps],
    }  # fmt: skip


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(size: int, *arguments: list[str]) -> list[subprocess.Popen]:
    """Start the ranks of a group, as torchrun would, each a python with arguments.

    They are those of its rank, or the last ones that are given.
    """
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, *arguments[min(rank, len(arguments) - 1)]],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
                 "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for rank in range(size)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen], limit: float = LIMIT) -> list[tuple[int, str, str]]:
    """Wait for processes, and return the exit code and the output of each; none outlives this."""
    end, results = time.monotonic() + limit, []
    try:
        for each in processes:
            out, err = each.communicate(timeout=max(0.1, end - time.monotonic()))
            results.append((each.returncode, out, err))
    finally:
        for each in processes:
            with contextlib.suppress(ProcessLookupError):
                each.kill()
            each.wait()
    return results


def command(path: Path, out: Path, *jobs, limit: float = 120.0) -> list[str]:
    """Return what python is given to take the runs of some cases, each [case, options].

    A message between the ranks takes `limit` seconds at most.
    """
    words = [str(path), str(out), json.dumps(jobs), str(limit)]
    return ["-m", "tests.training.rank_runs", *words]


def main(path: Path, out: Path, jobs: str, limit: float) -> None:
    torch.set_num_threads(1)
    out.mkdir(exist_ok=True)
    rank = os.environ.get("RANK", "0")
    (out / f"pid-{rank}").write_text(str(os.getpid()))
    ranks.STEP = timedelta(seconds=limit)
    for case, options in json.loads(jobs):
        _, written = take(path, out, case, options)
        (out / f"written-{case}-{rank}").write_text(json.dumps(written))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
