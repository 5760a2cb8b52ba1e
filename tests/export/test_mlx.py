"""Adapters for mlx_lm and from it; tests/adapters/peft_files/test_mlx_files.py holds the reading to
mlx_lm's formula."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.adapters.peft_files.mlx_files import WEIGHTS_OF_MLX
from tests.conftest import FAMILY_VARIANTS, tiny
from tests.export.models import train_adapter, write_model
from tests.models.wrappers import wrapped

IDS = torch.arange(4, 24)[None]
TOLERANCE = 1e-5  # fp32 sums of the same terms, some after one rounding of b

CASES = {
    "rsLoRA": ("llama", {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}, 0),
    "patterns": ("qwen2", {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}}, 0),
    "head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}, 0),
    "DoRA": ("qwen3", {"use_dora": True, "layers_to_transform": [1]}, 0),
    "a hole": ("gemma3", {"layers_to_transform": [2, 5], "target_modules": ["q_proj"]}, 3),
    "Mixtral": ("mixtral", {"r": 3}, 0),
    "one expert": ("qwen3_moe", {"target_modules": ["layers.1.mlp.experts.2.up_proj"]}, 0),
    "first layer": ("mixtral", {"target_modules": ["layers.0.block_sparse_moe.experts.2.w2"]}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_computes_the_same(tmp_path, case):
    variant, config, holes = CASES[case]
    directory = write_model(tmp_path / "model", variant)
    model = train_adapter(directory, tmp_path / "adapter", **config)
    written = lk.export_mlx(tmp_path / "adapter", tmp_path / "mlx", base_model=directory)
    assert written.filled == holes
    again = lk.load_adapter(lk.load_model(directory, dtype="float32"), tmp_path / "mlx")
    assert (again(IDS) - model(IDS)).abs().max() <= TOLERANCE
    base = lk.load_model(directory, dtype="float32")
    assert (base(IDS) - model(IDS)).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_the_file_has_every_module_that_its_keys_select(tmp_path, case):
    """That is what mlx_lm checks when it loads one."""
    variant, config, _ = CASES[case]
    directory = write_model(tmp_path / "model", variant)
    train_adapter(directory, tmp_path / "adapter", **config)
    written = lk.export_mlx(tmp_path / "adapter", tmp_path / "mlx", base_model=directory)
    values = json.loads((written.path / "adapter_config.json").read_text())
    found = {name.rpartition(".")[0] for name in load_file(written.path / "adapters.safetensors")}
    layers = lk.load_model(directory).config.num_hidden_layers
    selected = {
        f"model.layers.{number}.{key}"
        for number in range(layers - values["num_layers"], layers)
        for key in values["lora_parameters"]["keys"]
        if key not in ("lm_head", "model.embed_tokens")
    }
    selected |= {"lm_head", "model.embed_tokens"}.intersection(values["lora_parameters"]["keys"])
    assert found == selected
    assert len(found) == written.modules


@settings(deadline=None, max_examples=10)
@given(
    rank=st.integers(1, 7),
    scale=st.floats(0.01, 100),
    keys=st.sets(st.sampled_from(["self_attn.q_proj", "mlp.down_proj", "lm_head"]), min_size=1),
    count=st.integers(1, 2),
    seed=st.integers(0, 9),
)
def test_there_and_back_changes_no_bit(model, tmp_path_factory, rank, scale, keys, count, seed):
    """import, then export: the same names, shapes and values, and the scale up to an ulp."""
    tmp_path = tmp_path_factory.mktemp("back")
    torch.manual_seed(seed)
    shapes = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (48, 32), "lm_head": (32, 300)}
    tensors = {}
    for key in keys:
        columns, rows = shapes[key]
        layers = range(2 - count, 2)
        for name in [key] if key == "lm_head" else [f"model.layers.{i}.{key}" for i in layers]:
            tensors[f"{name}.lora_a"] = torch.randn(columns, rank)
            tensors[f"{name}.lora_b"] = torch.randn(rank, rows)
    (tmp_path / "mlx").mkdir()
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(keys)}
    values = {
        "fine_tune_type": "lora",
        "num_layers": 1 if keys == {"lm_head"} else count,
        "lora_parameters": parameters,
    }
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps({**values, "model": "x/y"}))
    peft = lk.import_mlx(tmp_path / "mlx", tmp_path / "peft")
    lk.export_mlx(peft, tmp_path / "again", base_model=model)
    again = load_file(tmp_path / "again" / "adapters.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor), name
    found = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert found["lora_parameters"].pop("scale") == pytest.approx(scale, rel=1e-15)
    del parameters["scale"]
    assert found == {**values, "model": "x/y"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("mlx") / "model", "llama")


@pytest.mark.parametrize("dora", [False, True])
def test_peft_computes_what_mlx_trained(model, tmp_path, dora):
    import peft
    from transformers import AutoModelForCausalLM

    adapted = train_adapter(model, tmp_path / "adapter", use_dora=dora)
    lk.export_mlx(tmp_path / "adapter", tmp_path / "mlx", base_model=model)
    lk.import_mlx(tmp_path / "mlx", tmp_path / "peft")
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    with torch.no_grad():
        gap = (theirs(IDS).logits - adapted(IDS)).abs().max()
    assert gap <= 1e-4  # two fp32 implementations


def variant(name):
    family, options = FAMILY_VARIANTS[name]
    return tiny(family, **options)


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (lambda: variant("gpt_oss"), "model.layers.0.mlp.experts.gate_proj"),
        (
            lambda: variant("gemma4_text experts"),
            "model.layers.1.experts.switch_glu.down_proj",
        ),
        (lambda: wrapped("gemma4"), "language_model.model.layers.2.mlp.up_proj"),
    ],
    ids=["gpt_oss", "gemma4 experts", "gemma4 with a tower"],
)
def test_modules_have_the_names_that_mlx_has_for_the_family(tmp_path, made, name):
    """They were read in its models/gpt_oss.py, gemma4.py and gemma4_text.py, 0.32.2."""
    made().save_pretrained(tmp_path / "model")
    model = train_adapter(tmp_path / "model", tmp_path / "adapter")
    lk.export_mlx(tmp_path / "adapter", tmp_path / "mlx", base_model=tmp_path / "model")
    found = {each.rpartition(".")[0] for each in load_file(tmp_path / "mlx" / WEIGHTS_OF_MLX)}
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert name in found
    keys = {re.sub(r".*layers\.\d+\.", "", each) for each in found}
    assert keys == set(config["lora_parameters"]["keys"])
    again = lk.load_adapter(lk.load_model(tmp_path / "model", dtype="float32"), tmp_path / "mlx")
    assert (again(IDS) - model(IDS)).abs().max() <= 4 * TOLERANCE  # of more layers


def test_refusals(model, tmp_path):
    train_adapter(model, tmp_path / "saved", modules_to_save=["lm_head"])
    with pytest.raises(lk.LorakitError, match="modules_to_save"):
        lk.export_mlx(tmp_path / "saved", tmp_path / "mlx", base_model=model)
    holes = {"use_dora": True, "layers_to_transform": [0], "target_modules": ["q_proj"]}
    train_adapter(model, tmp_path / "holes", **holes)
    with pytest.raises(lk.LorakitError, match=r"layers\.1\.self_attn\.q_proj is not adapted"):
        lk.export_mlx(tmp_path / "holes", tmp_path / "mlx", base_model=model)
    experts = write_model(tmp_path / "experts", "mixtral")
    train_adapter(experts, tmp_path / "dora", use_dora=True)
    with pytest.raises(lk.LorakitError, match="DoRA in all modules or in none, and none for exp"):
        lk.export_mlx(tmp_path / "dora", tmp_path / "mlx", base_model=experts)
    with pytest.raises(lk.LorakitError, match="is no adapter of mlx_lm, but one of PEFT"):
        lk.import_mlx(tmp_path / "saved", tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()
    with pytest.raises(lk.LorakitError, match="holds another adapter already"):
        lk.export_mlx(tmp_path / "saved", tmp_path / "holes", base_model=model)
