"""The most bytes of gathered weights: of two real processes, and of two that are not there.

`python -m tests.training.memory_plan.gathering FOLDER` writes FOLDER/found.json, for test_several.
"""

import dataclasses
import datetime
import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed import fsdp, tensor  # noqa: F401 - once, before there are two processes
from torch.distributed.device_mesh import init_device_mesh

import lorakit as lk
from lorakit.models.decoder import Decoder
from lorakit.models.sharding import shard
from lorakit.training.memory_plan import forecast as rooms
from lorakit.training.memory_plan.forecast import Setting, forecast, own_weights
from lorakit.training.memory_plan.ledger import GATHERED, Ledger
from lorakit.training.memory_plan.several import gathering

SECONDS = 120  # that a process may take
TOKENS = 32
# an odd number of rows and a width that 2 x 64 does not divide, so that parts are filled up
CONFIG = lk.ModelConfig("llama", 301, 96, 160, 5, 4, 2, 24)
ENDS = lk.QuantConfig(embed_tokens="nf4", lm_head="nf4")
MANY = dataclasses.replace(CONFIG, vocab_size=4001)  # so that the head takes more than a block
CASES = {
    "kept": (CONFIG, False, lk.QuantConfig()),
    "checkpointed": (CONFIG, True, lk.QuantConfig()),
    "dense": (CONFIG, True, None),
    "a large head": (MANY, False, lk.QuantConfig()),
    "a large packed head": (MANY, True, ENDS),
}


class Most(Ledger):
    """A ledger that keeps the most bytes of gathered weights."""

    found = 0

    def _taken(self, size, kind):
        taken = super()._taken(size, kind)
        Most.found = max(Most.found, self.now[GATHERED])
        return taken


def of_real(mesh, config, checkpointing, quantize):
    """Return what this process of several gathers in two steps."""
    model = Decoder(config).to(torch.bfloat16)
    if quantize is not None:
        lk.quantize(model, quantize)
    shard(model, mesh)
    ledger = Most("cpu")
    with ledger, gathering(ledger):
        own_weights(ledger, model)
        lk.attach(model, lk.LoraConfig(r=4)).train()
        model.gradient_checkpointing = checkpointing
        rows = torch.ones(1, TOKENS, dtype=torch.int64)
        for _ in range(2):
            loss, _ = model.loss(rows, rows)
            loss.backward()


def of_pretended(config, checkpointing, quantize):
    """Return what the forecast says that rank 0 of two gathers."""
    layers = config.num_hidden_layers
    train = lk.TrainConfig(
        per_device_train_batch_size=1, gradient_checkpointing=checkpointing, max_seq_length=TOKENS
    )
    kinds = torch.bfloat16, quantize, lk.LoraConfig(r=4), train, (TOKENS,), 1.0, "cpu", (9, 0)
    forecast(Setting(config, list(range(layers)), layers, *kinds, ranks=2, divided=True))


def most_of(function, *arguments):
    """Return the most bytes that are gathered while a function runs."""
    Most.found = 0
    function(*arguments)
    return Most.found


def main():
    folder = Path(sys.argv[1])
    rank = 0 if os.fork() else 1
    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    place = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=wait)
    mesh = init_device_mesh("cpu", (2,))
    real = {name: most_of(of_real, mesh, *case) for name, case in CASES.items()}
    distributed.destroy_process_group()
    if rank == 0:
        rooms.Ledger = Most  # what a forecast books with, in this process
        pretended = {name: most_of(of_pretended, *case) for name, case in CASES.items()}
        (folder / "found.json").write_text(json.dumps({"real": real, "pretended": pretended}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
