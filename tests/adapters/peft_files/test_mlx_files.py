"""Adapters of mlx_lm, against transformers with mlx_lm's own formula put into the weights."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.adapters.peft_files.mlx_files import open_mlx
from tests.adapters.common import hugging_face
from tests.adapters.peft_files.adapters_of_peft import IDS, LOGITS, MOE, SIZES, peft_logits
from tests.conftest import tiny

SCALE, R = 3.0, 4


def randn(*shape):
    return torch.randn(*shape) * 0.2


def write(path, tensors, **change):
    """An adapter as mlx_lm writes it."""
    path.mkdir(exist_ok=True)
    config = {
        "fine_tune_type": "lora",
        "model": "base",
        "num_layers": 16,
        "lora_parameters": {"rank": R, "scale": SCALE, "dropout": 0.0},
    }
    (path / "adapter_config.json").write_text(json.dumps(config | change))
    save_file(tensors, path / "adapters.safetensors", metadata={"format": "mlx"})


def logits_with(base, path, change):
    """The logits of transformers with other weights, which `change` makes of the published ones."""
    tensors = load_file(base / "model.safetensors")
    (path / "changed").mkdir()
    (path / "changed" / "config.json").write_text((base / "config.json").read_text())
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    changed = {name: tensor.float() for name, tensor in change(wide).items()}
    save_file(changed, path / "changed" / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        return hugging_face(path / "changed").eval()(IDS).logits


def loaded(base, path):
    with torch.no_grad():
        return lk.load_adapter(lk.load_model(base, dtype="float32"), path)(IDS)


def adapted(base, places, dora):
    """a, b and m of some layers, by mlx_lm's names, and the weights with mlx_lm's formula."""
    torch.manual_seed(0)
    weights = load_file(base / "model.safetensors")
    tensors, sums = {}, {}
    for place in places:
        weight = weights[f"{place}.weight"].double()
        rows, columns = weight.shape
        if place.endswith("embed_tokens"):  # mlx_lm: lora_a [V, r], W + scale a b
            a, b = randn(rows, R), randn(R, columns)
            weight = weight + SCALE * a.double() @ b.double()
        else:
            a, b = randn(columns, R), randn(R, rows)
            weight = weight + SCALE * b.double().t() @ a.double().t()
        tensors |= {f"{place}.lora_a": a, f"{place}.lora_b": b}
        if dora:
            tensors[f"{place}.m"] = torch.rand(rows) + 0.5
            weight = weight / weight.norm(dim=1, keepdim=True) * tensors[f"{place}.m"][:, None]
        sums[f"{place}.weight"] = weight
    return tensors, sums


KINDS = {
    "lora": (["self_attn.q_proj", "mlp.down_proj"], False),
    "dora": (["self_attn.v_proj", "mlp.up_proj"], True),
}


@pytest.mark.parametrize(("keys", "dora"), KINDS.values(), ids=KINDS)
def test_linear_layers(tiny_dir, tmp_path, keys, dora):
    tensors, sums = adapted(tiny_dir, [f"model.layers.1.{key}" for key in keys], dora)
    write(tmp_path / "mlx", tensors, fine_tune_type="dora" if dora else "lora")
    truth = logits_with(tiny_dir, tmp_path, lambda weights: weights | sums)
    torch.testing.assert_close(loaded(tiny_dir, tmp_path / "mlx"), truth, rtol=0, atol=LOGITS)


def test_embedding_and_head(tiny_dir, tmp_path):
    tensors, sums = adapted(tiny_dir, ["model.embed_tokens", "lm_head"], False)
    write(tmp_path / "mlx", tensors)
    truth = logits_with(tiny_dir, tmp_path, lambda weights: weights | sums)
    torch.testing.assert_close(loaded(tiny_dir, tmp_path / "mlx"), truth, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("kind", MOE)
def test_experts(tmp_path, kind):
    base = tmp_path / "base"
    tiny(kind, **SIZES[kind]).save_pretrained(base)
    published = load_file(base / "model.safetensors")
    block, *leaves = MOE[kind]
    torch.manual_seed(0)
    tensors, sums = {}, {}
    for leaf, own in zip(("gate_proj", "up_proj", "down_proj"), leaves, strict=True):
        names = [n for n in published if re.fullmatch(rf"model\.layers\.0\..*\.{own}\.weight", n)]
        rows, columns = published[names[0]].shape
        a, b = randn(len(names), R, columns), randn(len(names), rows, R)
        place = f"model.layers.0.{block}.switch_mlp.{leaf}"
        tensors |= {f"{place}.lora_a": a, f"{place}.lora_b": b}
        for name in names:
            i = int(re.search(r"experts\.(\d+)", name)[1])
            sums[name] = published[name].double() + SCALE * b[i].double() @ a[i].double()
    write(tmp_path / "mlx", tensors)
    truth = logits_with(base, tmp_path, lambda weights: weights | sums)
    torch.testing.assert_close(loaded(base, tmp_path / "mlx"), truth, rtol=0, atol=LOGITS)


def test_show_says_what_it_is_and_convert_writes_pefts_files(tiny_dir, tmp_path):
    tensors, _ = adapted(tiny_dir, ["model.layers.0.mlp.gate_proj"], False)
    write(tmp_path / "mlx", tensors, lora_parameters={"rank": R, "scale": 1 / 3, "dropout": 0.1})
    report = lk.describe_adapter(tmp_path / "mlx")
    assert str(report).endswith("in files of MLX")
    assert report.layers[0].scaling == pytest.approx(1 / 3, rel=1e-15)
    lk.convert_adapter(tmp_path / "mlx", tmp_path / "peft")
    truth = peft_logits(hugging_face(tiny_dir), tmp_path / "peft")
    found = loaded(tiny_dir, tmp_path / "mlx")
    torch.testing.assert_close(found, truth, rtol=0, atol=LOGITS)
    assert lk.describe_adapter(tmp_path / "peft").written_by == "PEFT"


PLACE = "model.layers.0.mlp.gate_proj"
BAD = {
    "full": ({}, {"fine_tune_type": "full"}, "whole weights of MLX and no adapter"),
    "no parameters": ({}, {"lora_parameters": None}, "lora_parameters is missing"),
    "no rank": ({}, {"lora_parameters": {"scale": 1.0}}, "rank must be a positive whole number"),
    "no scale": ({}, {"lora_parameters": {"rank": 4, "alpha": 8}}, "scale must be a number"),
    "another rank": ({}, {"lora_parameters": {"rank": 2, "scale": 1.0}}, "the model needs"),
    "old": (
        {},
        {"lora_layers": 4, "lora_parameters": {"rank": 4, "scale": 10.0, "alpha": 16.0}},
        "before 0.19, some versions of which multiplied scale by alpha / rank",
    ),
    "other tensors": ({f"{PLACE}.weight": torch.ones(2, 2)}, {}, "is none of lora_a, lora_b and m"),
    "DoRA of an embedding": ({"model.embed_tokens.m": torch.ones(3)}, {}, "is none of lora_a"),
    "no b": ({f"{PLACE}.lora_b": None}, {}, r"lora_B.weight is missing"),
    "three sides": ({f"{PLACE}.lora_a": torch.ones(2, 3, 4)}, {}, "not of two dimensions"),
    "experts in two": (
        {"model.layers.0.mlp.switch_mlp.up_proj.lora_b": torch.ones(2, 3)},
        {},
        "not of .experts, rows, columns.",
    ),
}


@pytest.mark.parametrize(("more", "config", "message"), BAD.values(), ids=BAD)
def test_what_is_no_adapter_of_mlx(tiny_dir, tmp_path, more, config, message):
    tensors, _ = adapted(tiny_dir, [PLACE], False)
    given_ = {name: tensor for name, tensor in (tensors | more).items() if tensor is not None}
    write(tmp_path, given_, **config)
    model = lk.load_model(tiny_dir, dtype="float32")
    with pytest.raises(lk.LorakitError, match=message):
        lk.load_adapter(model, tmp_path)
    assert not lk.adapter_names(model)


def test_an_adapter_of_npz(tiny_dir, tmp_path):
    write(tmp_path, {})
    (tmp_path / "adapters.safetensors").rename(tmp_path / "adapters.npz")
    with pytest.raises(lk.LorakitError, match="adapters.npz is of an old mlx_lm"):
        lk.load_adapter(lk.load_model(tiny_dir), tmp_path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**308, 10**400)
    | st.floats()
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(values=st.fixed_dictionaries({}, optional={"rank": JSON, "scale": JSON, "dropout": JSON}))
def test_any_parameters_are_numbers_or_refused(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "any"
    write(path, {f"{PLACE}.lora_a": torch.ones(2, 3)})
    try:
        found = open_mlx(path, {"lora_parameters": values}).values
    except lk.LorakitError as error:
        assert "lora_parameters: " in str(error)
        return
    assert found["r"] == values["rank"] > 0
    assert found["lora_alpha"] == values["scale"] * values["rank"]
