"""The batches of pairs: two rows each, padded or packed."""

import json

import pytest
import torch

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers
from lorakit.data.encode import IGNORE, Example, PairExample
from lorakit.training.losses.batch import collated, summed_loss
from tests.conftest import TINY_VARIANTS, tiny_llama


def test_long_pairs_are_packed_and_scored(tiny_dir, tmp_path):
    """A pair is two rows of max_seq_length at most; the better answer is what is scored."""
    model, tok = lk.attach(lk.load_model(tiny_dir, dtype="float32")), lk.load_tokenizer(tiny_dir)
    pairs = [{"prompt": "p" * 90, "chosen": "b" * 50, "rejected": "c" * 50}] * 3
    config = lk.TrainConfig(
        str(tmp_path), max_steps=2, objective="dpo", packing=True, max_seq_length=64,
        per_device_train_batch_size=1, eval_metrics=["exact_match"],
    )  # fmt: skip
    short = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    result = lk.train(model, tok, {"train": pairs, "validation": short}, config)
    assert result.steps == 2
    assert result.evaluations[-1]["exact_match"] == 0


@pytest.mark.parametrize("objective", ["sft", "dpo", "orpo"])
@pytest.mark.parametrize("variant", ["dynamic_rope", "longrope"])
def test_loss_of_rows_whose_rotation_depends_on_their_length(tmp_path, variant, objective):
    """Padded as packed as alone, also of rows that end in a token 0 without a label."""
    tiny_llama(**TINY_VARIANTS[variant]).save_pretrained(tmp_path)
    model = lk.attach(lk.load_model(tmp_path, dtype="float32"), lk.LoraConfig(r=4))
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, 0, 0.1)

    def example(length):
        ids = [*torch.randint(97, (length - 1,)).tolist(), 0]
        return Example(ids, [IGNORE, *ids[1:-1], IGNORE])

    def batch(lengths):
        if objective == "sft":
            return [example(n) for n in lengths]
        return [PairExample(example(n), example(n + 9)) for n in lengths]

    def loss_of(rows, config):
        return summed_loss(model, collated(model, rows, config), config, None)[0].item()

    rows = batch([7, 40, 23, 26])  # the original context is 24
    padded, packed = (
        lk.TrainConfig(str(tmp_path), objective=objective, packing=on) for on in (False, True)
    )
    total = sum(loss_of([row], packed) for row in rows)
    for config in (padded, packed):
        # fp32 sums of up to 92 losses, in another order
        assert loss_of(rows, config) == pytest.approx(total, rel=1e-5)


def test_padding_of_pairs(tiny_dir, tmp_path):
    """Both answers of a pair are rows of the batch, each as long as the longest."""
    tok = lk.load_tokenizer(tiny_dir)
    model = lk.attach(lk.load_model(tiny_dir, dtype="float32"), lk.LoraConfig(r=4))
    pairs = [{"prompt": "ab", "chosen": "x" * 5, "rejected": "y" * 40}] * 4
    config = lk.TrainConfig(str(tmp_path), max_steps=1, objective="dpo")
    lk.train(model, tok, pairs, config)
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    short, long = 3 + 5 + 1, 3 + 40 + 1  # <s> and the end token
    assert json.loads(line)["padding"] == pytest.approx(1 - (short + long) / (2 * long))
