"""What each rank needs to load a model whose weights are divided, and to take a step with it.

    python benchmarks/sharding.py MODEL [--quantize nf4] [--tokens 256]                  one process
    torchrun --nproc-per-node 2 benchmarks/sharding.py MODEL [--offload] ...             several

Each rank prints the bytes of its parameters, the memory that the process has taken over what the
imports take, at its peak and after loading, the seconds of loading, and those of a step, which is
the loss and the gradients of LoRA on all linear layers.
"""

import argparse
import os
import resource
import time
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

import lorakit as lk


def resident() -> float:
    """Return the memory that the process has now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def peak() -> float:
    """Return the most memory that the process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def bytes_here(parameter: torch.Tensor) -> int:
    """Return the bytes of a parameter that lie in this process."""
    local = getattr(parameter, "to_local", lambda: parameter)()
    return local.nbytes


def main() -> None:
    """Load the model and take three steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--quantize", default="nf4", help="nf4, int8 or none")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--offload", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank, mesh = int(os.environ.get("RANK", "0")), None
    lk.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)))  # what is loaded when it is needed
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        lk.shard  # noqa: B018
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    before, started = resident(), time.perf_counter()
    quantize = None if args.quantize == "none" else args.quantize
    options = {"quantize": quantize, "mesh": mesh, "offload_weights": args.offload}
    model = lk.load_model(args.model, **options)
    loading, after, most = time.perf_counter() - started, resident() - before, peak() - before
    held = sum(map(bytes_here, model.parameters())) / 1e6
    lk.attach(model, lk.LoraConfig(r=8)).train()
    ids = torch.randint(model.config.vocab_size, (1, args.tokens), generator=torch.manual_seed(0))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        loss, count = model.loss(ids, ids)
        (loss / count).backward()
        times.append(time.perf_counter() - started)
    print(
        f"rank {rank}: {held:.0f} MB of parameters; over the imports {after:.0f} MB, at the peak "
        f"of loading {most:.0f} MB; loaded in {loading:.1f} s, a step {min(times):.2f} s",
        flush=True,
    )
    if mesh is not None:
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
