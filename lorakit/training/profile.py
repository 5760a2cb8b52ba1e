"""Measures where the time of a training step goes: `lorakit train run.yaml --profile`.

torch's profiler notes every call of an op and of its backward, and the calls inside. A row of the
table is one kind of work of a step, as the mean of the STEPS steps after WARM_UP others:

    an op of lorakit.kernels    the whole time of its autograd functions, products inside included
    the optimizer               its step
    torch ops                   the largest few of those that no op above has called
    the rest                    Python and small torch ops; on a GPU also waiting to be launched

On a GPU the times are those of the device's kernels, and the rest is the time of the step beyond
them. The profiler itself takes some of the time.
"""

import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from lorakit.config.training import TrainConfig
from lorakit.data.rows import RowSource
from lorakit.kernels.ops import __name__ as OPS
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer
from lorakit.training.train import train

WARM_UP, STEPS = 2, 3
TORCH_OPS = 8  # rows for torch's ops


@dataclass
class StepProfile:
    """The times of a step, which a run fills by calling it after every step.

    As text it is a table with the milliseconds and the share of each kind of work.
    """

    on_gpu: bool
    """Whether the times are those of a GPU's kernels."""
    seconds: float = 0.0
    """The time of a step."""
    rows: dict[str, float] = field(default_factory=dict)
    """Seconds a step of each kind of work, the largest first."""
    _seen: int = 0
    _started: float = 0.0
    _profiler: profile | None = None

    def __call__(self) -> None:
        self._seen += 1
        if self._seen == WARM_UP:
            self._wait()
            gpu = [ProfilerActivity.CUDA] if self.on_gpu else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profiler.start()
            self._started = time.perf_counter()
        elif self._seen == WARM_UP + STEPS and self._profiler is not None:
            self._wait()
            self.seconds = (time.perf_counter() - self._started) / STEPS
            self._profiler.stop()
            self.rows = _rows(self._profiler.events(), self.seconds, self.on_gpu)
            self._profiler = None

    def stop(self) -> None:
        """Stop the profiler, if a run ended before it was done."""
        if self._profiler is not None:
            self._profiler.stop()

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def __str__(self) -> str:
        width = max(map(len, self.rows), default=0)
        lines = [f"a step takes {1e3 * self.seconds:.1f} ms, the mean of {STEPS} after {WARM_UP}:"]
        lines += [
            f"  {name:{width}}  {1e3 * seconds:9.1f} ms  {seconds / self.seconds:6.1%}"
            for name, seconds in self.rows.items()
        ]
        return "\n".join(lines)


def profile_training(
    model: Decoder, tok: Tokenizer, data: RowSource, config: TrainConfig | None = None
) -> StepProfile:
    """Measure where the time of a training step goes, in a run of five steps.

    The first two steps do not count. Nothing is saved, but the adapter has changed. Print the
    result to see a table.

    Args:
        model: A model with an adapter, as `train` takes it.
        tok: The model's tokenizer.
        data: A file of rows or an iterable of them, as `read_rows` takes it.
        config: The settings of the run. Its max_steps, output_dir, eval_metrics and cuda_graph do
            not count.

    Returns:
        The times of a step, by kind of work.

    Raises:
        LorakitError: `train` raises it for this model, these rows or these settings.
        KeyboardInterrupt: Ctrl-C ended the run.
    """
    found = StepProfile(model.device.type == "cuda")
    try:
        with TemporaryDirectory() as folder:
            few = replace(
                config or TrainConfig(),
                max_steps=WARM_UP + STEPS,
                output_dir=folder,
                eval_metrics=[],  # nothing is evaluated
                cuda_graph="off",  # whose kernels do not tell which op they are of
            )
            if train(model, tok, data, few, after_step=found).interrupted:
                raise KeyboardInterrupt
    finally:
        found.stop()
    return found


def _functions() -> dict[str, str]:
    """Return the row that each of lorakit's ops belongs to, by the profiler's name of the op."""
    names: dict[str, str] = {}
    for function in torch.autograd.Function.__subclasses__():
        if function.__module__.startswith(f"{OPS}."):
            folder = function.__module__[len(OPS) + 1 :].partition(".")[0]
            row = f"{folder}: {function.__name__.strip('_')}"
            names[function.__name__] = row
            names[f"{function.__name__}Backward"] = f"{row} backward"
    return names


def _rows(events: list[FunctionEvent], step: float, on_gpu: bool) -> dict[str, float]:
    """Return the seconds of each row, from events of STEPS steps that took `step` seconds each."""
    functions = _functions()
    ours: defaultdict[str, float] = defaultdict(float)
    of_torch: defaultdict[str, float] = defaultdict(float)

    def row(event: FunctionEvent) -> str | None:
        if event.name.startswith("Optimizer.step#"):
            return "optimizer"
        return functions.get(event.name)

    def inside(event: FunctionEvent) -> bool:
        above = event.cpu_parent
        return above is not None and (row(above) is not None or inside(above))

    for event in events:
        if event.device_type != DeviceType.CPU or inside(event):
            continue
        name = row(event)
        if name is not None:
            ours[name] += event.device_time_total if on_gpu else event.cpu_time_total
        elif event.name.startswith("aten::"):
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            of_torch[event.name.replace("aten::", "torch: ")] += own
    largest = sorted(of_torch, key=of_torch.__getitem__, reverse=True)[:TORCH_OPS]
    found = {**ours, **{name: of_torch[name] for name in largest}}
    ordered = sorted(found, key=found.__getitem__, reverse=True)
    rows = {name: found[name] / 1e6 / STEPS for name in ordered}  # from microseconds
    return rows | {"the rest": max(0.0, step - sum(rows.values()))}
