"""What Python does for a decoder layer in a training step, beside PEFT and bitsandbytes.

    python benchmarks/host_calls.py [--by-function 40] [--time] [--repeats 9]

A GPU waits for the host wherever a layer's Python takes longer than its kernels. Counted are the
calls of Python and C functions, and torch's operations, of forward and backward. Per layer: a model
of MORE layers less one of LESS, over the difference. Counts have no noise.

Ours is the path of a GPU on the meta device (tests/meta_gpu.py), where a Triton kernel is called
and nothing launched. Theirs is transformers' Llama of the same shape in NF4 under PEFT, in autocast
as transformers' Trainer has it, on a CPU, whose operators bitsandbytes chooses in the same way.
Neither side's launcher is counted: Triton's, nor that of torch's own kernels.

--time prints the processor's time for the same steps, of both sides in turn, with what torch does
for its operations. Ours run the same Python on tensors in host memory then, as the meta device's
operations take longer than a GPU's. Other work on the machine is in the figures.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch
from cost_model import meta_gpu
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorakit as lk
import lorakit.kernels.pretend
import lorakit.models.decoder  # the decoder itself: load_model would want a file

LESS, MORE = 2, 6  # layers
# small, but with more tokens than a packed weight is multiplied for, and whole blocks of weights
TOKENS, VOCABULARY, HIDDEN, INNER, HEADS, KEY_HEADS, SIZE = 144, 256, 128, 256, 4, 2, 32
RANK = 8
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

BEFORE_A_MODE = "find_torch_dispatch_rule"  # what torch calls for each operator before the mode

Loss = Callable[[], Tensor]


class Side(NamedTuple):
    """One of the two: its loss for a number of layers, and the surroundings that it runs in."""

    make: Callable[[int], Loss]
    around: Callable[[], AbstractContextManager]


class Calls(NamedTuple):
    """The calls of a layer, by function, and the operations of torch's, by name."""

    functions: Counter[str]
    operations: Counter[str]


# ---- the sides ----------------------------------------------------------------------------------


def nothing(*arguments: Any, **options: Any) -> None:
    """Stands for a launch."""


@contextmanager
def silent() -> Iterator[None]:
    """Let ops run their Triton kernels' Python within the block, on tensors of any device."""
    from triton.runtime.jit import JITFunction

    with (
        mock.patch.object(JITFunction, "run", nothing),
        mock.patch.object(lk.kernels.dispatch, "_interprets", return_value=True),
        mock.patch.object(lk.kernels.dispatch, "compiles_to", return_value="ptx"),
        lk.kernels.use_backend("triton"),
    ):
        yield


def our_loss(layers: int, device: str = "meta") -> Loss:
    config = lk.ModelConfig("llama", VOCABULARY, HIDDEN, INNER, layers, HEADS, KEY_HEADS, SIZE)
    with torch.device(device):
        model = lorakit.models.decoder.Decoder(config)
    lk.quantize(model.to(torch.bfloat16).requires_grad_(False))
    lk.attach(model, lk.LoraConfig(r=RANK, lora_alpha=2 * RANK)).train()
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device=device)
    labels = torch.zeros(1, TOKENS, dtype=torch.int64)  # in host memory, as training has them

    def loss() -> Tensor:
        total, count = model.loss(ids, labels)
        return total / count

    return loss


def their_loss(layers: int) -> Loss:
    import bitsandbytes
    import peft
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=SIZE,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS:
            packed = bitsandbytes.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            packed.weight = bitsandbytes.nn.Params4bit(
                layer.weight.detach(), requires_grad=False, quant_type="nf4"
            )
            model.set_submodule(name, packed.to("cpu"))
    model.is_loaded_in_4bit = True
    adapter = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS)
    model = peft.inject_adapter_in_model(adapter, model).train()
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    return loss


SIDES = {
    "lorakit": Side(our_loss, lambda: meta_gpu().MetaGPU()),
    "peft + bitsandbytes": Side(their_loss, nullcontext),
}


# ---- counting -----------------------------------------------------------------------------------


def _name(frame: FrameType) -> str:
    """Return the place and name of a Python function."""
    file = frame.f_code.co_filename
    for start in ("/site-packages/", f"{Path(__file__).parents[1]}/"):
        file = file.rpartition(start)[2]
    return f"{file}:{frame.f_code.co_firstlineno} {frame.f_code.co_qualname}"


def functions_of(step: Callable[[], None]) -> Counter[str]:
    """Return the calls of Python and C functions of a step, by function.

    What stands for a GPU counts as the one function that it stands for. An operator of the meta
    device, which is Python too, counts as nothing, and so does what that device is taken for, which
    no tensor of a GPU asks.
    """
    found: Counter[str] = Counter()
    stand_in = str(Path("tests", "meta_gpu.py"))
    asked_of_meta = lorakit.kernels.pretend.current.__code__
    inside: FrameType | None = None  # of a function of the stand-in: what it calls is not counted

    def see(frame: FrameType, event: str, called: Any) -> None:
        nonlocal inside
        if inside is not None:
            if event == "return" and frame is inside:
                inside = None
        elif event == "c_call":
            found[f"C {getattr(called, '__qualname__', called)}"] += 1
        elif event == "call":
            name, code = frame.f_code.co_name, frame.f_code
            as_nothing = name == BEFORE_A_MODE or code is asked_of_meta
            if as_nothing or code.co_filename.endswith(stand_in):
                inside = frame
            if not as_nothing and name != "__torch_dispatch__":
                found[_name(frame)] += 1

    sys.setprofile(see)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def operations_of(step: Callable[[], None]) -> Counter[str]:
    """Return the operations of torch's of a step, views too, by name."""
    with _Operations() as operations:
        step()
    return operations.found


def calls_of_a_layer(side: Side) -> Calls:
    """Return the calls and operations of forward and backward of one layer."""
    found = []
    for layers in (LESS, MORE):
        loss = side.make(layers)

        def step(loss: Loss = loss) -> None:
            loss().backward()

        with side.around():
            step()  # what is made once, such as tables and gradients
            step()
            found.append((functions_of(step), operations_of(step)))
    less, more = found
    return Calls(*(_per_layer(a, b) for a, b in zip(less, more, strict=True)))


def _per_layer(less: Counter[str], more: Counter[str]) -> Counter[str]:
    each = {name: (more[name] - less[name]) / (MORE - LESS) for name in more | less}
    return Counter({name: n for name, n in each.items() if n})


def times_of_a_layer(repeats: int) -> dict[str, list[float]]:
    """Return the processor's time per layer of each repeat, in seconds, by side; both in turn."""
    sides = SIDES | {"lorakit": Side(lambda layers: our_loss(layers, "cpu"), silent)}
    losses = {name: [side.make(n) for n in (LESS, MORE)] for name, side in sides.items()}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 2):  # the first two are not counted
        for name, side in sides.items():
            seconds = []
            with side.around():
                for loss in losses[name]:
                    started = time.process_time()
                    for _ in range(5):
                        loss().backward()
                    seconds.append((time.process_time() - started) / 5)
            if repeat > 1:
                found[name].append((seconds[1] - seconds[0]) / (MORE - LESS))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--by-function", type=int, default=0, metavar="N")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = ("torch", "triton", "transformers", "peft", "bitsandbytes")
    print(f"lorakit {lk.__version__}, " + ", ".join(f"{name} {version(name)}" for name in names))
    print("per layer, forward and backward:     calls   operations")
    for name, side in SIDES.items():
        calls = calls_of_a_layer(side)
        print(f"{name:30}{calls.functions.total():12.0f}{calls.operations.total():13.0f}")
        if name == "lorakit":
            most = calls.functions.most_common(args.by_function)
            print("".join(f"{n:12.1f}  {function}\n" for function, n in most), end="")
    if args.time:
        for name, seconds in times_of_a_layer(args.repeats).items():
            least, median = min(seconds), statistics.median(seconds)
            print(f"{name:30}{1e3 * median:12.2f} ms of the processor, {1e3 * least:.2f} at least")


if __name__ == "__main__":
    main()
