"""QLoRA steps on a few layers of a published model's real widths: lorakit beside PEFT, on the CPU.

    python benchmarks/widths.py gemma-4-e2b [--steps 3] [--length 128] [--batch 2]

The model is random, in bf16, with the sizes that its family has in reality and a few layers: as
many as show every kind that there is. Its rows are random tokens, packed into one by lorakit and
padded by PEFT, unless --packing says otherwise. What a step is, and what was chosen for the peer,
sides.py says; the columns are those of training.py.
"""

import argparse
import math
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from children import Child, SideError, exit_on_terminate
from training import AGREE, SIDES, WARM_UP, measure, report

MODELS: dict[str, dict[str, Any]] = {
    # a layer of each kind, and of each kind one that sees the keys of the layer before
    "gemma-4-e2b": {
        "model_type": "gemma4_text",
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        "hidden_size": 1536,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 6144,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 512,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
}


def batches(vocabulary: int, job: argparse.Namespace) -> list[list[tuple[list[int], list[int]]]]:
    """Rows of random tokens for all steps; the first token of a row has no label."""
    rng = random.Random(0)

    def row() -> tuple[list[int], list[int]]:
        ids = [rng.randrange(vocabulary) for _ in range(job.length)]
        return ids, [-100, *ids[1:]]

    return [[row() for _ in range(job.batch)] for _ in range(WARM_UP + job.steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=tuple(MODELS))
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=2, help="rows of a step")
    parser.add_argument("--packing", choices=("none", "lorakit", "both"), default="lorakit")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dtype", choices=tuple(AGREE), default="bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help=f"after {WARM_UP} to warm up")
    parser.add_argument("--side", action="append", choices=tuple(SIDES))
    parser.set_defaults(busy=0, quota=0)
    job = parser.parse_args()
    exit_on_terminate()
    config = MODELS[job.model]
    with TemporaryDirectory() as folder:
        try:
            with Child("writer") as writer:
                writer.started()
                writer.ask("random_model", folder=folder, config=config)
        except SideError as error:
            sys.exit(f"widths: {error}")
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        print(
            f"{job.model}, {config['num_hidden_layers']} layers, {size / 1e6:.0f} MB of bf16; "
            f"{job.batch} rows of {job.length} a step, rank {job.rank}, packing: {job.packing}"
        )
        names = job.side or ["lorakit", "PEFT, bitsandbytes"]
        rows = measure(names, folder, job, batches(config["vocab_size"], job))
    sys.exit(report(rows, job, math.nan))


if __name__ == "__main__":
    main()
