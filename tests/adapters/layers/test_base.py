"""Linear layers of all kinds under an adapter.

They show a weight, have hooks or a forward of their own, or store their weight in an unusual way.
"""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lorakit as lk
from tests.adapters.common import CLOSE, CONFIG, IDS, SHORT_IDS, chain, filled, randomize


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_layer_shows_the_weight_that_it_computes_with(options):
    module = chain(**options)
    layer, x = module[0], torch.randn(5, 8)
    truth = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), truth, **CLOSE)
    lk.merge(module)
    torch.testing.assert_close(layer(x), truth, **CLOSE)
    assert torch.equal(layer.weight, layer.merged.weight)
    with lk.disable_adapters(module):
        assert torch.equal(layer.weight, layer.original.weight)
    lk.unmerge(module)
    with lk.disable_adapters(module):
        assert torch.equal(layer.weight, layer.original.weight)


def test_a_packed_layer_shows_its_weight():
    module = lk.quantize(nn.Sequential(nn.Linear(64, 64)))
    lk.attach(module, lk.LoraConfig(r=2))
    base = module[0].base.dequantize()
    assert torch.equal(module[0].weight, base)  # B is zero
    with lk.disable_adapters(module):
        assert torch.equal(module[0].weight, base)


def test_the_fast_path_of_torch_has_the_adapter():
    """nn.TransformerEncoderLayer hands the weights of its layers to one fused function."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    before = layer(x)
    filled(lk.attach(layer, lk.LoraConfig(r=2, target_modules=["linear1", "linear2"])))
    slow = layer(x)
    with torch.no_grad():
        fast = layer(x)
    torch.testing.assert_close(fast, slow, **CLOSE)
    assert (fast - before).abs().max() > 0.01


def test_t5_reads_the_dtype_of_its_weights():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            decoder_start_token_id=0,
        )
    ).eval()  # fmt: skip
    ids = torch.arange(6)[None]
    before = model(input_ids=ids, labels=ids).logits
    filled(lk.attach(model, lk.LoraConfig(r=2, target_modules=["wi", "wo"])))
    adapted = model(input_ids=ids, labels=ids).logits
    assert (adapted - before).abs().max() > 0.01
    lk.merge(model)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).logits, adapted, **CLOSE)


def test_ia3_on_layers_whose_weight_is_read(t5, tmp_path):
    options = {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}
    theirs = peft.get_peft_model(copy.deepcopy(t5), peft.IA3Config(**options)).eval()
    filled(theirs).save_pretrained(tmp_path)
    ours = lk.load_adapter(copy.deepcopy(t5), tmp_path)
    truth = theirs(input_ids=SHORT_IDS, labels=SHORT_IDS).logits
    torch.testing.assert_close(ours(input_ids=SHORT_IDS, labels=SHORT_IDS).logits, truth, **CLOSE)


def test_a_layer_with_hooks_is_called():
    torch.manual_seed(0)
    module, seen = nn.Sequential(nn.Linear(8, 8)), []
    module[0].register_forward_hook(lambda *_: seen.append(1))
    module[0].register_forward_pre_hook(lambda _, args: (2 * args[0],))
    filled(lk.attach(module, lk.LoraConfig(r=2, lora_alpha=2)))
    x = torch.randn(2, 3, 8)
    truth = module[0].original(x) + x @ module[0].lora_A.t() @ module[0].lora_B.t()
    seen.clear()
    torch.testing.assert_close(module(x), truth, **CLOSE)
    assert seen == [1]


def test_hooks_of_adapted_layers_are_called(model):
    """Attention and MLP would else compute several layers at once."""
    randomize(lk.attach(model, CONFIG))
    before = model(IDS)
    block, seen = model.model.layers[0], []
    for layer in (block.self_attn.q_proj, block.mlp.gate_proj):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(layer))
    # products one by one instead of side by side: fp32 sums in another order
    assert torch.allclose(model(IDS), before, rtol=1e-4, atol=1e-5)
    assert seen == [block.self_attn.q_proj, block.mlp.gate_proj]


def test_a_forward_of_its_own():
    module = nn.Sequential(nn.Linear(8, 8))
    forward = module[0].forward
    module[0].forward = lambda x: 100 * forward(x)
    x = torch.randn(3, 8)
    truth = module(x)
    torch.testing.assert_close(lk.attach(module, lk.LoraConfig(r=2))(x), truth, **CLOSE)


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("kind", ["pruned", "weight_norm"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_a_weight_that_is_computed(kind, rows):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8))
    if kind == "pruned":
        prune.l1_unstructured(plain[0], "weight", 0.5)
    else:
        nn.utils.weight_norm(plain[0])
    x = torch.randn(rows, 8)
    module = lk.attach(plain, lk.LoraConfig(r=2, lora_alpha=8, target_modules=["0"]))
    filled(module)
    truth = module[0].original(x) + 4 * x @ module[0].lora_A.t() @ module[0].lora_B.t()
    torch.testing.assert_close(module(x), truth, **CLOSE)
    torch.testing.assert_close(lk.merge_and_unload(module)(x), truth, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
@pytest.mark.parametrize("features", [8, 12])
def test_hooks_on_a_transposed_layer(options, features, tmp_path):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    plain = nn.Sequential(Conv1D(features, 8))
    nn.init.normal_(plain[0].weight)
    plain[0].register_forward_hook(lambda *_: None)
    options = {"r": 2, "target_modules": ["0"], "fan_in_fan_out": True, **options}
    theirs = filled(peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**options)))
    theirs.save_pretrained(tmp_path)
    ours, x = lk.load_adapter(plain, tmp_path), torch.randn(3, 8)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    lk.merge(ours)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
