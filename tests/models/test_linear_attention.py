"""Models with linear attention: long rows, what is stored in which form, and what adapters do."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.models.packed_layers import NF4Linear
from tests.conftest import FAMILY_VARIANTS, LOGITS, QWEN_LINEAR, tiny
from tests.models.damage import fails
from tests.models.variants import load

FAMILIES = ["qwen3_5_text", "qwen3_next"]
families = pytest.mark.parametrize("name", FAMILIES)
IN_FP32 = ("A_log", "dt_bias", "conv1d.weight", "linear_attn.norm.weight")


def ids(*shape):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(1))


@families
def test_rows_of_several_chunks(tmp_path, name):
    """150 tokens are two chunks of the delta rule and a part: alone, padded, packed, and cached."""
    family, options = FAMILY_VARIANTS[name]
    options = {**options, "max_position_embeddings": 256}
    theirs = tiny(family, **options)
    ours = load(tmp_path, family, options)
    rows = ids(2, 150)
    logits, expected = ours(rows), theirs(rows).logits
    assert (logits - expected).abs().max() <= LOGITS
    logits[:, -1].logsumexp(-1).sum().backward()
    expected[:, -1].logsumexp(-1).sum().backward()
    for mine, truth in zip(
        (ours.model.embed_tokens, ours.model.layers[0].linear_attn.out_proj),
        (theirs.model.embed_tokens, theirs.model.layers[0].linear_attn.out_proj),
        strict=True,
    ):
        # what 149 tokens ago still counts: a sum over the chunks, in another order than theirs
        assert (
            mine.weight.grad - truth.weight.grad
        ).abs().max() <= 1e-4 * truth.weight.grad.abs().max()
    with torch.no_grad():
        mask = torch.ones(2, 170, dtype=torch.bool)
        mask[:, :20] = False
        padded = torch.cat([ids(2, 20), rows], dim=1)
        assert (ours(padded, attention_mask=mask)[:, 20:] - logits).abs().max() <= LOGITS
        bounds = torch.tensor([0, 70, 220, 370])
        packed = ours(torch.cat([ids(1, 70), rows[:1], rows[1:]], dim=1), cu_seqlens=bounds)
        assert (packed[0, 70:].view_as(logits) - logits).abs().max() <= LOGITS
        tok = theirs.generate(rows[:1], max_new_tokens=5, do_sample=False, eos_token_id=None)
    from tests.models.test_parity_hf import greedy

    assert greedy(ours, [rows[0].tolist()], 5) == [tok[0, 150:].tolist()]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_decays_stays_in_fp32(tmp_path, dtype):
    tiny("qwen3_5_text", **QWEN_LINEAR).save_pretrained(tmp_path)
    exact = load_file(tmp_path / "model.safetensors")
    model = lk.load_model(tmp_path, dtype=dtype)
    again = lk.load_model(tmp_path, dtype="float32").to(getattr(torch, dtype))
    for each in (model, again):
        wide = {n for n, p in each.named_parameters() if p.dtype == torch.float32}
        assert wide == {n for n, _ in each.named_parameters() if n.endswith(IN_FP32)}
        assert all(torch.equal(each.get_parameter(n), exact[n]) for n in wide)
    rows = ids(2, 40)
    assert torch.equal(model(rows), again(rows))
    assert model(rows).dtype == getattr(torch, dtype)
    lk.save_model(model, tmp_path / "b")
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert {n for n, tensor in found.items() if tensor.dtype == torch.float32} == wide


def test_logits_in_bf16_are_as_near_as_those_of_transformers(tmp_path):
    """The truth is what transformers computes in fp32 with the same weights."""
    theirs = tiny("qwen3_5_text", **QWEN_LINEAR)
    theirs.to(torch.bfloat16).float().save_pretrained(tmp_path)
    rows = ids(4, 40)
    with torch.no_grad():
        truth = theirs(rows).logits
        error = (lk.load_model(tmp_path)(rows) - truth).square().mean().sqrt()
        usual = (theirs.to(torch.bfloat16)(rows).logits - truth).square().mean().sqrt()
    # other roundings of the same kind; a rounding more or less in each layer moves it by a tenth
    assert error <= 1.3 * usual


@families
def test_gradient_checkpointing_changes_no_gradient(tmp_path, name):
    model = load(tmp_path, *FAMILY_VARIANTS[name])
    row, bounds = ids(1, 90), torch.tensor([0, 20, 90])
    found = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model.loss(row, row, cu_seqlens=bounds)[0].backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][n]) for n, grad in found[0].items())


@pytest.mark.parametrize(
    ("name", "adapted", "small"),
    [
        ("qwen3_5_text", {"in_proj_qkv", "in_proj_z", "out_proj"}, {"in_proj_a", "in_proj_b"}),
        ("qwen3_next", {"in_proj_qkvz", "out_proj"}, {"in_proj_ba"}),
    ],
)
def test_the_small_layers_are_packed_and_adapted_by_name_alone(tmp_path, name, adapted, small):
    model = load(tmp_path, *FAMILY_VARIANTS[name], quantize="nf4")
    layer = model.model.layers[0].linear_attn
    kinds = {n: type(child) for n, child in layer.named_children() if "proj" in n}
    assert {n for n, kind in kinds.items() if kind is NF4Linear} == adapted
    assert {n for n, kind in kinds.items() if kind is torch.nn.Linear} == small
    lk.attach(model, lk.LoraConfig(r=2, target_modules="all-linear"), name="all")
    names = {n for n, _ in layer.named_parameters() if "lora_A" in n}
    assert {n.partition(".")[0] for n in names} == adapted
    lk.detach(model)
    lk.attach(model, lk.LoraConfig(r=2, target_modules=sorted(small)), name="small")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * len(small)  # A and B, in two layers
    model.loss(ids(2, 20), ids(2, 20))[0].backward()
    layers = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert all(p.grad.abs().max() > 0 for p in layers)


@families
def test_an_adapter_of_peft_computes_the_same_and_merges(tmp_path, name):
    from peft import LoraConfig, get_peft_model

    family, options = FAMILY_VARIANTS[name]
    theirs = tiny(family, **options)
    theirs.save_pretrained(tmp_path / "base")
    targets = ["in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj", "q_proj"]
    if name == "qwen3_next":
        targets = ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"]
    wrapped = get_peft_model(theirs, LoraConfig(r=3, target_modules=targets)).eval()
    with torch.no_grad():
        for n, parameter in wrapped.named_parameters():
            if "lora_B" in n:
                parameter.normal_(0, 0.05)  # larger ones make the rounding of a row's decay count
    wrapped.save_pretrained(tmp_path / "adapter")
    model = lk.load_model(tmp_path / "base", dtype="float32")
    lk.load_adapter(model, tmp_path / "adapter")
    rows = ids(2, 40)
    with torch.no_grad():
        truth = wrapped(rows).logits
        assert (model(rows) - truth).abs().max() <= LOGITS
        with wrapped.disable_adapter():
            assert (wrapped(rows).logits - truth).abs().max() > 0.1
        lk.merge(model)
        assert (model(rows) - truth).abs().max() <= LOGITS


# ---- files ----


def fused(tensors):
    """The tensors of transformers' files with a layer's experts in two, as others store them."""
    found, experts = {}, {}
    for name, tensor in tensors.items():
        prefix, is_expert, rest = name.partition(".experts.")
        if not is_expert:
            found[name] = tensor
            continue
        number, leaf, _ = rest.split(".")
        experts.setdefault(prefix, {}).setdefault(leaf, {})[int(number)] = tensor
    for prefix, leaves in experts.items():
        gate, up, down = (
            torch.stack([leaves[leaf][i] for i in sorted(leaves[leaf])])
            for leaf in ("gate_proj", "up_proj", "down_proj")
        )
        found[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        found[f"{prefix}.experts.down_proj"] = down
    return found


def test_fused_experts_are_read_as_layers(tmp_path):
    family, options = FAMILY_VARIANTS["qwen3_5_moe_text"]
    model = load(tmp_path, family, options)
    file = tmp_path / "model.safetensors"
    before = load_file(file)
    together = fused(before)
    assert len(together) < len(before)
    save_file(together, file, metadata={"format": "pt"})
    again = lk.load_model(tmp_path, dtype="float32")
    assert torch.equal(again(ids(2, 20)), model(ids(2, 20)))
    packed = lk.load_model(tmp_path, dtype="float32", quantize="nf4")
    assert type(packed.model.layers[0].mlp.experts[1].up_proj) is NF4Linear
    lk.save_model(again, tmp_path / "b")
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert written.keys() == before.keys()
    assert all(torch.equal(tensor, before[n]) for n, tensor in written.items())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for wrong in (together[name][:-1], together[name][:, :-1], together[name][0]):
        save_file({**together, name: wrong.contiguous()}, file, metadata={"format": "pt"})
        fails(tmp_path, rf"tensor {name} is .*, the config asks for \(5, 40, 32\)")


def test_learned_prompts_are_refused(tmp_path):
    model = load(tmp_path, "qwen3_5_text", QWEN_LINEAR)
    with pytest.raises(lk.LorakitError, match="layers of linear attention have none"):
        lk.attach(model, lk.PrefixTuningConfig(num_virtual_tokens=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["linear_attention"] * 3}, "must name a layer of full_attention"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types must list full_attention or"),
        ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval must be"),
        ({"linear_num_value_heads": 3}, "must be a multiple of linear_num_key_heads"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim must be positive"),
    ],
)
def test_bad_configs(change, message):
    values = tiny("qwen3_5_text", **QWEN_LINEAR).config.to_dict()
    assert lk.ModelConfig.from_hf(values).linear_layers == [True, False, True]
    with pytest.raises(lk.LorakitError, match=message):
        lk.ModelConfig.from_hf(values | change)
