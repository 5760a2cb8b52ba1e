"""Short runs of a tiny model, for the tests of training."""

import contextlib
import resource

import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.training import state as run_state
from tests.conftest import ROWS

ADAPTER = "adapter_model.safetensors"
OPTIONS = {"max_steps": 12, "save_steps": 3, "per_device_train_batch_size": 4}
EVALUATED = {"max_steps": 8, "eval_steps": 2, "save_steps": 3, "learning_rate": 3e-2}
PAIRS = [
    {"prompt": f"{a} plus {b} is ", "chosen": f"{a + b}.", "rejected": f"{a + b + 1}, I think."}
    for a in range(6)
    for b in range(4)
]
JUDGED = [
    {"prompt": f"{a} plus {b} is ", "completion": f"{a + b + b % 2}.", "label": b % 2 == 0}
    for a in range(6)
    for b in range(4)
]


def adapted(tiny_dir, **options):
    model = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    torch.manual_seed(0)
    return lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8, **options))


def run(tiny_dir, tok, out, rows=ROWS, lora=None, **options):
    model = adapted(tiny_dir, **(lora or {}))
    config = lk.TrainConfig(
        **{"output_dir": str(out), "max_steps": 6, "learning_rate": 1e-2, **options}
    )
    return model, lk.train(model, tok, rows, config)


def same_tensors(a, b):
    a, b = load_file(a / run_state.STATE_TENSORS), load_file(b / run_state.STATE_TENSORS)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextlib.contextmanager
def small_files(size):
    """Ends what writes a file of more than so many bytes as a full disk does: with an error of the
    operating system, which safetensors reports in its own way. The limit holds for the report of
    the tests too where that goes to a file, so it must be gone before a test ends.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
