"""The memory of several adapters before they are trained: a line, or the sentence that refuses."""

import re

import pytest
import torch

import lorakit as lk
from lorakit.training.many import memory

LENGTHS = {"small": [9, 30, 12, 20], "large": [40, 8, 8]}


def many(tiny_dir, **keys):
    values = {"model": str(tiny_dir), "data": "rows.jsonl", "dtype": "float32", "quantize": "nf4"}
    adapters = {"small": {"lora": {"r": 2}}, "large": {"lora": {"r": 16}, "optim": "adamw_8bit"}}
    return lk.ManyConfig.from_dict(values | {"adapters": adapters} | keys)


def said(monkeypatch, tiny_dir, free, **keys):
    monkeypatch.setattr(memory, "own_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    return lk.check_many_memory(many(tiny_dir, **keys), LENGTHS)


def megabytes(text):
    [(number, unit)] = re.findall(r", ([\d.]+) (kB|MB) of it for all adapters but", text)
    return float(number) * {"kB": 1e-3, "MB": 1.0}[unit]


def test_more_memory_than_is_free_is_refused(tiny_dir, monkeypatch):
    with pytest.raises(lk.LorakitError, match="^[^\n]*$") as error:
        said(monkeypatch, tiny_dir, 1 << 20)
    assert "2 adapters in one pass need " in str(error.value)
    assert "and 1.0 MB are free: train fewer at a time" in str(error.value)


def test_a_run_that_fits_gets_a_line_about_the_others(tiny_dir, monkeypatch):
    """The smaller one takes 16 bytes for each parameter: itself, gradient and AdamW's two means."""
    line = said(monkeypatch, tiny_dir, 8 << 20)
    assert line.startswith("memory: ")
    model = lk.attach(lk.load_model(tiny_dir, dtype="float32"), lk.LoraConfig(r=2))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # it is printed with two or three digits
    assert megabytes(line) == pytest.approx(16 * count / 1e6, rel=0.05)


def test_a_run_that_is_tight_says_so(tiny_dir, monkeypatch):
    """A hundredth is missing, which is below the margin of a forecast."""
    config = many(tiny_dir)
    largest = memory._as_one(config, "large", LENGTHS, torch.device("cpu"))
    needed = largest.forecast().reserved + memory._sizes_of_adapters(config)["small"]
    line = said(monkeypatch, tiny_dir, needed - needed // 100)
    assert line.endswith("; this is tight, and may fail")


def test_a_small_run_says_nothing(tiny_dir, monkeypatch):
    assert said(monkeypatch, tiny_dir, 1 << 40) == ""


def test_the_largest_batches_of_all_are_in_one_row(tiny_dir):
    device = torch.device("cpu")
    config = many(tiny_dir, per_device_train_batch_size=2)
    run = memory._as_one(config, "large", LENGTHS, device)
    assert sorted(run.documents()) == [8, 20, 30, 40]
    packed = many(tiny_dir, per_device_train_batch_size=1, packing=True, max_seq_length=40)
    run = memory._as_one(packed, "large", LENGTHS, device)
    assert sorted(run.documents()) in ([9, 30, 40], [8, 30, 40])


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"use_dora": True}, "'small' does more at "),
        ({"target_modules": ["x_proj"]}, "adapter 'small': "),
        ({"modules_to_save": ["lm_head"]}, "'small' does more at "),
    ],
)
def test_an_adapter_that_cannot_be_there_is_refused(tiny_dir, monkeypatch, lora, message):
    with pytest.raises(lk.LorakitError, match="^[^\n]*$") as error:
        said(monkeypatch, tiny_dir, 1 << 40, adapters={"small": {"lora": lora}, "large": {}})
    assert message in str(error.value)
