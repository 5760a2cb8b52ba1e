"""What every method does: files in both directions, selecting, merging, training, refusing."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.adapters.manage import attached
from lorakit.adapters.methods.known import METHODS as METHODS_OF_LORAKIT
from lorakit.adapters.methods.known import method_called, method_of
from tests.adapters.common import filled, hugging_face, nested
from tests.adapters.methods.common import (
    EVERY,
    IDS,
    METHODS,
    assert_same,
    logits_of,
    ours,
    shaken,
    theirs,
)
from tests.conftest import ROWS


@pytest.mark.parametrize("method", EVERY)
def test_we_load_pefts(model, tiny_dir, tmp_path, method):
    before = model(IDS)
    peft_model = shaken(theirs(tiny_dir, method))
    peft_model.save_pretrained(tmp_path)
    lk.load_adapter(model, tmp_path)
    expected = logits_of(peft_model, IDS)
    assert (expected - before).abs().max() > 0.01 * expected.abs().max()
    assert_same(model(IDS), expected)


@pytest.mark.parametrize("method", EVERY)
def test_peft_loads_ours(model, tiny_dir, tmp_path, method):
    from peft import PeftModel

    ours(model, method)
    lk.save_adapter(model, tmp_path / "ours")
    loaded = PeftModel.from_pretrained(hugging_face(tiny_dir), tmp_path / "ours").eval()
    assert_same(logits_of(loaded, IDS), model(IDS))
    theirs(tiny_dir, method).save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {
        k: (v.shape, v.dtype) for k, v in b.items()
    }
    known = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert set(json.loads((tmp_path / "ours" / "adapter_config.json").read_text())) <= set(known)


@pytest.mark.parametrize("method", EVERY)
def test_round_trip(model, tiny_dir, tmp_path, method):
    ours(model, method)
    lk.save_adapter(model, tmp_path / "a")
    other = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), tmp_path / "a")
    assert torch.equal(other(IDS), model(IDS))
    lk.save_adapter(other, tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("method", EVERY)
def test_attach_select_and_detach(model, method):
    before = model(IDS)
    ours(model, method)
    changed = model(IDS)
    with lk.disable_adapters(model):
        assert torch.equal(model(IDS), before)
    lk.attach(model, getattr(lk, EVERY[method][0])(**EVERY[method][1]), name="other")
    assert not torch.equal(model(IDS), changed)
    lk.set_adapter(model, "default")
    assert torch.equal(model(IDS), changed)
    lk.detach(model)
    assert torch.equal(model(IDS), before)
    assert not attached(model)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_merge_and_unmerge(tiny_dir, method, quantize):
    model = ours(lk.load_model(tiny_dir, dtype="float32", quantize=quantize), method)
    adapted = model(IDS)
    lk.merge(model)
    # one rounding of each weight in fp32 instead of one more product
    assert (model(IDS) - adapted).abs().max() <= 1e-4 * adapted.abs().max()
    lk.unmerge(model)
    assert torch.equal(model(IDS), adapted)


# ---- training ----


@pytest.mark.parametrize("method", ["ia3", "vera", "miss"])
def test_ten_steps_of_sgd_are_pefts(model, tiny_dir, tmp_path, method):
    peft_model = theirs(tiny_dir, method).train()
    kind, fields = EVERY[method]
    lk.attach(model, getattr(lk, kind)(**fields))
    for each in (model, peft_model):
        params = [p for p in each.parameters() if p.requires_grad]
        # the gradient of a block of MiSS is a sum over many columns
        optimizer = torch.optim.SGD(params, lr=0.01 if method == "miss" else 0.05)
        for _ in range(10):
            if each is model:
                total, count = model.loss(IDS, IDS)
                loss = total / count
            else:
                loss = peft_model(IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    lk.save_adapter(model, tmp_path / "ours")
    peft_model.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    start = {"ia3": 1.0, "vera": 0.0, "miss": 0.0}[method]
    trained = (v for k, v in b.items() if k.endswith(("ia3_l", "lambda_b", "miss_block")))
    moved = max((v - start).abs().max() for v in trained)
    assert moved > 1e-2
    for key, value in b.items():
        # gradients in fp32, each summed in another order; ten steps of it
        assert (a[key] - value).abs().max() <= 1e-5 * max(1, value.abs().max()), key


@pytest.mark.parametrize("method", EVERY)
def test_train_takes_every_method(model, tiny_dir, tmp_path, method):
    tok = lk.load_tokenizer(tiny_dir)
    ours(model, method)
    before = lk.evaluate(model, tok, ROWS[:8])["loss"]
    config = lk.TrainConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=8,
        learning_rate=0.02,
        lr_scheduler_type="constant",
    )
    result = lk.train(model, tok, ROWS[:8], config)
    assert result.steps == 8
    assert lk.evaluate(model, tok, ROWS[:8])["loss"] < before
    other = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), tmp_path / "run")
    assert torch.equal(other(IDS), model(IDS))


@pytest.mark.parametrize("kind", [lk.IA3Config, lk.VeraConfig, lk.AdaLoraConfig, lk.MissConfig])
def test_a_name_in_which_another_one_ends_of_another_method(tmp_path, kind):
    more = {lk.AdaLoraConfig: {"total_step": 9}, lk.MissConfig: {"r": 3}}.get(kind, {})
    module, x = nested(), torch.randn(3, 8)
    filled(lk.attach(module, kind(target_modules=["0", "1.1"], exclude_modules=["1.0"], **more)))
    lk.save_adapter(module, tmp_path)
    assert torch.equal(lk.load_adapter(nested(), tmp_path)(x), module(x))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lk.IA3Config(target_modules=["q_porj"]), "'q_porj' matches no layer"),
        (
            lambda: lk.IA3Config(target_modules=["q_proj"], feedforward_modules=["down_proj"]),
            "feedforward_modules: 'down_proj' matches no layer",
        ),
        (lambda: lk.VeraConfig(r=0), "r must be positive"),
        (lambda: lk.VeraConfig(target_modules=["embed_tokens"]), "'embed_tokens' matches no layer"),
        (lambda: lk.MissConfig(r=0), "r must be positive"),
        (lambda: lk.MissConfig(r=100), "r is 100, and the layer reads"),
        (lambda: lk.MissConfig(fan_in_fan_out=True), "fan_in_fan_out"),
        (lambda: lk.MissConfig(init_weights="bat"), "which lorakit lacks: choose true or"),
        (lambda: lk.MissConfig(init_weights="min"), "init_weights is 'min'"),
        (
            lambda: lk.MissConfig(r=4, init_weights="mini", mini_r=7),
            "mini_r 7 does not divide its",
        ),
        (lambda: lk.AdaLoraConfig(total_step=5, tinit=3, tfinal=2), "leave no step"),
        (lambda: lk.PromptTuningConfig(num_virtual_tokens=0), "num_virtual_tokens"),
        (
            lambda: lk.PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="RANDM"),
            "did you mean 'RANDOM'",
        ),
        (lambda: lk.TrainConfig(), "TrainConfig is not the config of a lorakit adapter"),
    ],
)
def test_refused_configs(model, make, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.attach(model, make())
    assert not attached(model)


def test_one_layer_takes_one_method(model):
    lk.attach(model, lk.AdaLoraConfig(total_step=9))
    with pytest.raises(lk.LorakitError, match="q_proj is a AdaLoraLinear of another adapter"):
        lk.attach(model, lk.IA3Config(), name="other")
    assert lk.adapter_names(model) == ["default"]


def test_every_method_is_found_by_its_config_and_by_its_name():
    kinds = [
        lk.LoraConfig(),
        lk.IA3Config(),
        lk.VeraConfig(),
        lk.AdaLoraConfig(total_step=9),
        lk.MissConfig(),
        lk.PromptTuningConfig(num_virtual_tokens=2),
        lk.PromptEncoderConfig(num_virtual_tokens=2),
        lk.PrefixTuningConfig(num_virtual_tokens=2),
    ]
    assert [method_of(config) for config in kinds] == list(METHODS_OF_LORAKIT)
    for method in METHODS_OF_LORAKIT:
        assert method_called(method.peft_type) is method
    assert method_called("POLY") is None
    assert method_called(["LORA"]) is None


def test_a_config_of_a_subclass_belongs_to_its_method():
    from lorakit.compat.peft import LoraConfig

    assert method_of(LoraConfig()) is method_of(lk.LoraConfig())


# ---- the guide ----


class Descent:
    """An optimizer of whatever trains when it steps: the guide attaches after this is made."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def step(self):
        for p in self.model.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad

    def zero_grad(self):
        self.model.zero_grad(set_to_none=True)


def test_snippets_of_the_guide(tiny_dir):
    guide = (Path(__file__).parents[3] / "docs" / "methods.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 5
    for snippet in snippets:
        model = lk.load_model(tiny_dir, dtype="float32")
        names = {"lk": lk, "model": model, "optimizer": Descent(model)}
        exec(snippet, names | {"batches": [(IDS, IDS)] * 3})
        assert lk.adapter_names(model)
