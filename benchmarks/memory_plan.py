"""Forecasts of memory beside what was measured.

    python benchmarks/memory_plan.py [MODEL_DIRECTORY] [--gpu]

With a directory, such as that of SmolLM2-135M, steps run on this machine's processor. `measured` is
the most that torch held at a time beyond the model and what trains, as its profiler saw every
allocation. With --gpu, the steps of gpu.md are forecast that an H200 has taken.
"""

import argparse
from dataclasses import dataclass, field

from torch.profiler import ProfilerActivity, profile

import lorakit as lk
import lorakit.training.device_step
import lorakit.training.memory_plan.forecast
import lorakit.training.step
import lorakit.training.stepping
import lorakit.training.trainable

STEPS = 2


@dataclass(frozen=True)
class Case:
    """A step of this name."""

    name: str
    rows: int
    tokens: int
    dtype: str = "bfloat16"
    quantize: str | None = "nf4"
    train: dict = field(default_factory=dict)

    def config(self) -> lk.TrainConfig:
        return lk.TrainConfig(
            per_device_train_batch_size=self.rows, max_seq_length=self.tokens, **self.train
        )


CASES = (
    Case("NF4, 8 x 112", 8, 112),
    Case("checkpointed", 8, 112, train={"gradient_checkpointing": True}),
    Case("packed", 8, 112, train={"packing": True}),
    Case("1 x 512", 1, 512),
    Case("dense", 8, 112, quantize=None),
    Case("fp32, dense", 2, 112, "float32", None),
)
LORA = lk.LoraConfig(r=16, lora_alpha=32)


def measured(model: lk.ModelConfig, case: Case) -> int:
    """Return the most bytes that torch held at a time in real steps, beyond what is kept."""
    config, numbers = case.config(), iter(range(1000))
    setting = lorakit.training.memory_plan.forecast.Setting(
        model.config, [], 0, model.dtype, None, LORA, config, (case.tokens,) * case.rows, 1.0,
        "cpu", (9, 0),
    )  # fmt: skip
    batches = lorakit.training.memory_plan.forecast.micro_batches(setting)
    examples = [example for batch in batches for example in batch]
    rows = [[next(numbers) for _ in batch] for batch in batches]
    lk.attach(model, LORA).train()
    model.gradient_checkpointing = config.gradient_checkpointing
    part = lorakit.training.trainable.trained_part(model, config)
    optimizer, shares = lorakit.training.stepping.run_optimizer(part, config)
    params = [p for p in model.parameters() if p.requires_grad]
    update = lorakit.training.device_step.optimizer_step(optimizer, params, [shares] * 1000, 1.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        for number in range(1, STEPS + 1):
            step = lorakit.training.step.prepare(model, examples, number, rows, config, None)
            update(lorakit.training.step.backward(model, step, config, None)[0])
            optimizer.zero_grad(set_to_none=True)
    return most_held(found)


def most_held(found: profile) -> int:
    """Return the most bytes that were held at a time while the profiler looked."""
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def forecast(config: lk.ModelConfig, case: Case) -> int:
    """Return what is forecast for that: all but the weights."""
    plan = lk.plan_memory(
        config, dtype=case.dtype, quantize=case.quantize, lora=LORA, train=case.config(),
        tokens=case.tokens, device="cpu",
    )  # fmt: skip
    kept = ("embeddings", "head", "packed weights", "scales", "weights", "adapters")
    return plan.peak - sum(plan.at_peak.get(kind, 0) for kind in kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="a Hugging Face directory")
    parser.add_argument("--gpu", action="store_true", help="the steps of gpu.md")
    args = parser.parse_args()
    if args.model is not None:
        print("MB beyond the model   forecast  measured")
        for case in CASES:
            model = lk.load_model(
                args.model, dtype=case.dtype, quantize=case.quantize, device="cpu"
            )
            said = forecast(model.config, case)
            took = measured(model, case)
            print(f"{case.name:20} {said / 1e6:9.1f} {took / 1e6:9.1f}  {said / took - 1:+.2%}")
    if args.gpu:
        config = lk.ModelConfig("llama", 128256, 4096, 14336, 4, 32, 8, 128)
        for tokens, took in ((2048, 4037), (8192, 7279)):
            train = lk.TrainConfig(per_device_train_batch_size=1)
            plan = lk.plan_memory(config, quantize="nf4", lora=LORA, train=train, tokens=tokens)
            print(f"{tokens} tokens: {plan.peak / 1e6:.1f} MB, measured {took}")


if __name__ == "__main__":
    main()
