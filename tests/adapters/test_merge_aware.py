"""Merge-aware training: what a layer computes is what its merge will store, bit for bit."""

import pytest
import torch

import lorakit as lk
from lorakit import kernels
from lorakit.adapters.layers.lora import lora_layers
from lorakit.adapters.manage import check_spans
from lorakit.adapters.merge import rounding_drift
from lorakit.adapters.merge_aware import without_rounding
from tests.adapters.common import IDS, randomize
from tests.export.models import write_model

WIDE = {"hidden_size": 256, "intermediate_size": 256}  # rows of whole blocks of 256 values


def each(model):
    return lora_layers(model).values()


def aware(path, kind="nf4", dtype="float32", quantize=None, **options):
    model = lk.load_model(path, dtype=dtype, quantize=quantize)
    torch.manual_seed(0)
    config = lk.LoraConfig(r=4, lora_alpha=8, quantize_aware=kind, **options)
    return randomize(lk.attach(model, config))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "quantize", [None, "nf4", lk.QuantConfig(double_quant=False, search_scales=True)]
)
def test_the_packed_merge_computes_what_was_trained(tiny_dir, tmp_path, dtype, quantize):
    model = aware(tiny_dir, dtype=dtype, quantize=quantize)
    with torch.no_grad():
        trained = model.train()(IDS)
        assert torch.equal(model.eval()(IDS), trained)
        drift = lk.merge(model, "nf4", input_ids=IDS)
        assert (drift.largest, drift.divergence, drift.same_first) == (0, 0, IDS.numel())
        assert torch.equal(model(IDS), trained)
        lk.save_model(model, tmp_path, packed=True)
        assert torch.equal(lk.load_model(tmp_path, dtype=dtype)(IDS), trained)


def test_an_adapter_in_files_is_merged_to_the_same_bits(tiny_dir, tmp_path):
    model = aware(tiny_dir, quantize="nf4", init_lora_weights="olora")
    lk.save_adapter(model, tmp_path)
    loaded = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32", quantize="nf4"), tmp_path)
    lk.merge(loaded, "nf4")
    # A and A0 are joined in the file, so the sum's terms are in one product there
    assert torch.equal(loaded(IDS), model(IDS))


@pytest.mark.parametrize(
    ("variant", "kind", "quantize", "dtype"),
    [
        ("llama", "q4_k", None, "float32"),
        ("llama", "q4_k_m", None, "bfloat16"),
        ("llama", "q4_0", "nf4", "float32"),
        ("qwen2", "q4_k_s", "nf4", "bfloat16"),
        ("mixtral", "iq4_nl", None, "float32"),
        ("qwen3_5", "q5_k", None, "float32"),
    ],
)
def test_a_gguf_file_computes_what_was_trained(tmp_path, variant, kind, quantize, dtype):
    """The file's embedding and head are quantized too, and small layers of linear attention, which
    training leaves out. So these are compared by their weights.
    """
    more = (
        {"linear_value_head_dim": 16, "linear_key_head_dim": 16} if variant == "qwen3_5" else {}
    )  # its columns are tiled
    path = write_model(tmp_path, variant, **WIDE, **more)
    model = aware(path, kind, dtype, quantize)
    with torch.no_grad():
        trained = model(IDS)
        lk.export_gguf(
            model, tmp_path / "m.gguf", quantization=kind, tokenizer=lk.load_tokenizer(path)
        )
        served = lk.load_model(tmp_path / "m.gguf", dtype=dtype)
        for name, layer in lora_layers(model).items():
            own = layer.quantized_sum(layer.part)(served.dtype)
            assert torch.equal(served.get_submodule(name).weight, own), name
        served.model.embed_tokens, served.lm_head = model.model.embed_tokens, model.lm_head
        assert any(model.config.linear_layers) or torch.equal(served(IDS), trained)


def test_a_weight_is_quantized_once_for_the_same_values(tiny_dir, monkeypatch):
    model = aware(tiny_dir, quantize="nf4")
    count, real = [], kernels.quantize_nf4

    def counted(*args, **options):
        count.append(1)
        return real(*args, **options)

    monkeypatch.setattr(kernels, "quantize_nf4", counted)
    layers = len(lora_layers(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in (1, 2):
        model.gradient_checkpointing = True
        for _ in range(2):
            model.train().loss(IDS, IDS)[0].backward()
        model.eval()(IDS)
        assert len(count) == step * layers
        optimizer.step()
    changed = model(IDS)
    assert len(count) == 3 * layers
    fresh = aware(tiny_dir, quantize="nf4")
    fresh(IDS)
    for mine, theirs in zip(each(fresh), each(model), strict=True):
        mine.restore("default", theirs.tensors_to_save("default"))
    assert torch.equal(fresh(IDS), changed)
    for layer in each(model):  # as the reference of a preference run is set
        layer.lora_B.data = torch.zeros_like(layer.lora_B)
    assert not torch.equal(model(IDS), changed)


def test_the_drift_is_of_the_quantization_alone(tiny_dir):
    model = aware(tiny_dir)
    drift = rounding_drift(model)
    plain = lk.load_model(tiny_dir, dtype="float32")
    torch.manual_seed(0)
    randomize(lk.attach(plain, lk.LoraConfig(r=4, lora_alpha=8)))
    with torch.no_grad():
        with without_rounding(model):
            # one product and two
            torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-4, atol=1e-4)
        assert (model(IDS) - plain(IDS)).abs().mean() > 0.01
    assert drift.base == "nf4"
    assert drift.largest > 0
    assert rounding_drift(plain) is None


def test_completions_are_those_of_the_merged_model(tiny_dir):
    model, tok = aware(tiny_dir, quantize="nf4"), lk.load_tokenizer(tiny_dir)
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    found = lk.generate_batch(model, tok, ["one", "two two"], **options)
    lk.merge(model, "nf4")
    assert lk.generate_batch(model, tok, ["one", "two two"], **options) == found


def test_a_row_of_an_adapter_goes_through_its_quantized_sum(tiny_dir):
    model = aware(tiny_dir, quantize="nf4")
    with torch.no_grad():
        own = model(IDS)
        with lk.disable_adapters(model):
            base = model(IDS)
        with lk.adapter_rows(model, ["default", None]):
            rows = model(IDS)
    # a product of one row and of two sums in another order
    torch.testing.assert_close(rows[0], own[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows[1], base[1], rtol=1e-4, atol=1e-4)


def test_it_takes_no_part_in_a_pass_of_several_adapters(tiny_dir):
    model = aware(tiny_dir, quantize="nf4")
    with pytest.raises(lk.LorakitError, match="leave out DoRA, .* quantize_aware"):
        check_spans(model, ["default"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"target_modules": ["lm_head"]}, "the head is not merged"),
        ({"target_modules": ["embed_tokens"]}, "is an embedding"),
        ({"quantize_aware": "q3_k"}, "quantize_aware"),
    ],
)
def test_what_does_not_go_with_it(tiny_dir, options, message):
    model = lk.load_model(tiny_dir, dtype="float32")
    with pytest.raises(lk.LorakitError, match=message):
        lk.attach(model, lk.LoraConfig(**{"quantize_aware": "nf4", **options}))
    assert not lk.adapter_names(model)


@pytest.mark.parametrize(("quantize", "message"), [("int8", "is int8"), ("fp4", "is fp4")])
def test_other_storages_are_refused(tiny_dir, quantize, message):
    model = lk.load_model(tiny_dir, dtype="float32", quantize=quantize)
    with pytest.raises(lk.LorakitError, match=message):
        lk.attach(model, lk.LoraConfig(quantize_aware="nf4"))


def test_gguf_formats_are_for_models_of_files():
    module = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(lk.LorakitError, match="for models that export_gguf writes"):
        lk.attach(module, lk.LoraConfig(quantize_aware="q4_0"))
    lk.attach(module, lk.LoraConfig(quantize_aware="nf4"))
    with torch.no_grad():
        module[0].lora_B.fill_(float("nan"))
    with pytest.raises(lk.LorakitError, match="quantize_aware: cannot quantize .* NaN"):
        module(torch.zeros(1, 64))
