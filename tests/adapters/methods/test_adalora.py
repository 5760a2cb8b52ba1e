"""AdaLoRA: which triplets stay, as PEFT chooses them."""

import json

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.adapters.manage import attached
from lorakit.adapters.methods.adalora import AdaLoraLinear
from tests.adapters.common import hugging_face
from tests.adapters.methods.common import IDS, LAYERS, assert_same
from tests.conftest import ROWS

ADALORA = {
    "target_modules": LAYERS,
    "init_r": 4,
    "target_r": 2,
    "total_step": 12,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
}


def test_adalora_allocates_as_peft_does(model, tiny_dir, tmp_path):
    import peft

    torch.manual_seed(0)
    config = peft.AdaLoraConfig(**ADALORA, task_type="CAUSAL_LM")
    peft_model = peft.get_peft_model(hugging_face(tiny_dir), config).train()
    peft_model.save_pretrained(tmp_path / "start")
    lk.load_adapter(model, tmp_path / "start")
    kept = []
    for each in (model, peft_model):
        params = [p for p in each.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(params, lr=0.5)
        for step in range(ADALORA["total_step"]):
            if each is model:
                total, count = model.loss(IDS, IDS)
                loss = total / count + lk.adalora_orthogonality(model)
            else:
                loss = peft_model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            if each is model:
                lk.adalora_allocate(model, step)
            else:
                peft_model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            if each is model:
                layers = [m for m in attached(model).values() if isinstance(m, AdaLoraLinear)]
                kept.append(sum(int(m.part.left.sum()) for m in layers))
    assert kept[2] == len(layers) * 4  # none goes until tinit
    assert kept[-1] == len(layers) * 2 < kept[5] < len(layers) * 4
    lk.save_adapter(model, tmp_path / "ours")
    peft_model.eval().save_pretrained(tmp_path / "theirs")
    configs = [
        json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs")
    ]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert a.keys() == b.keys()
    for key, value in b.items():
        # twelve steps at a large rate, whose penalty pulls both to the same; gradients in fp32
        assert a[key].shape == value.shape
        assert value.numel() == 0 or (a[key] - value).abs().max() <= 1e-5, key
    # and both read what the other wrote: the rank of a layer is that of the file
    cut = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), tmp_path / "theirs")
    assert_same(cut(IDS), peft_model(IDS).logits)
    again = peft.PeftModel.from_pretrained(hugging_face(tiny_dir), tmp_path / "ours").eval()
    assert_same(again(IDS).logits, model(IDS))


def test_train_allocates(model, tiny_dir, tmp_path):
    steps = iter(range(100))
    lk.attach(model, lk.AdaLoraConfig(**{**ADALORA, "total_step": 6, "tfinal": 1}))
    config = lk.TrainConfig(output_dir=str(tmp_path), max_steps=6)
    lk.train(
        model,
        lk.load_tokenizer(tiny_dir),
        ROWS[:8],
        config,
        after_step=lambda: lk.adalora_allocate(model, next(steps)),
    )
    layers = [m for m in attached(model).values() if isinstance(m, AdaLoraLinear)]
    assert sum(int(m.part.left.sum()) for m in layers) == 2 * len(layers)


def test_refused_uses_of_adalora(model):
    lk.attach(model, lk.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(
        lk.LorakitError, match="adalora_allocate: the selected adapter is no AdaLoRA"
    ):
        lk.adalora_allocate(model, 0)
    with pytest.raises(lk.LorakitError, match="adalora_orthogonality: the selected adapter is no"):
        lk.adalora_orthogonality(model)
    lk.detach(model)
    lk.attach(model, lk.AdaLoraConfig(total_step=9))
    with pytest.raises(lk.LorakitError, match="no gradients"):
        lk.adalora_allocate(model, 0)
    lk.attach(model, lk.AdaLoraConfig(total_step=9, init_r=3), name="small")
    with pytest.raises(lk.LorakitError, match="target_r is 8, more than init_r, 3"):
        lk.adalora_allocate(model, 0)


def test_the_penalty_is_the_mean_distance_from_orthogonal(model):
    lk.attach(model, lk.AdaLoraConfig(total_step=9, target_modules=["q_proj"], orth_reg_weight=0.3))
    parts = [m.part for m in attached(model).values()]
    sides = [side.double() for part in parts for side in (part.lora_A, part.lora_B.t())]
    one = torch.eye(12, dtype=torch.float64)
    truth = 0.3 * sum((side @ side.t() - one).norm() for side in sides) / len(sides)
    # fp32 sums of some 144 squares
    assert abs(lk.adalora_orthogonality(model) - truth) <= 1e-6 * truth
