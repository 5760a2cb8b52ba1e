"""What load_adapter reads, of PEFT and of lorakit, and what it refuses."""

import json
import shutil

import pytest
import torch

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers
from tests.adapters.common import IDS, edit_config, edit_tensors, filled, hugging_face, randomize
from tests.adapters.peft_files.adapters_of_peft import LOGITS

CONFIG = lk.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])


@pytest.fixture
def saved(model, tmp_path):
    randomize(lk.attach(model, CONFIG))
    lk.save_adapter(model, tmp_path / "adapter", base_model="someone/tiny")
    return tmp_path / "adapter"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.1\..*up_proj"])
def test_we_load_pefts(model, tiny_dir, tmp_path, targets, rslora):
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(hugging_face(tiny_dir), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    theirs.save_pretrained(tmp_path)
    lk.load_adapter(model, tmp_path)
    assert (theirs(IDS).logits - model(IDS)).abs().max() <= LOGITS


def test_round_trip(model, saved, tiny_dir):
    other = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), saved)
    assert torch.equal(other(IDS), model(IDS))
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"
    lk.save_adapter(other, saved.parent / "again", base_model="someone/tiny")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (saved / file).read_bytes() == (saved.parent / "again" / file).read_bytes()


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: shutil.rmtree(p), r"adapter_config\.json does not exist"),
        (lambda p: (p / "adapter_model.safetensors").unlink(), "does not exist"),
        (lambda p: (p / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda p: edit_config(p, peft_type="POLY"), "peft_type is 'POLY'"),
        (lambda p: edit_config(p, peft_type=["LORA"]), r"peft_type is \['LORA'\]"),
        (lambda p: edit_config(p, modules_to_save=[3]), r"modules_to_save must be list"),
        (lambda p: edit_config(p, target_modules=[3]), r"target_modules must be str or list"),
        (lambda p: edit_config(p, target_modules=None), "target_modules must be str or list"),
        (
            lambda p: edit_config(p, rank_pattern=5, ensure_weight_tying=True),
            "rank_pattern must be dict",
        ),
        (
            lambda p: edit_config(p, target_parameters=5),
            "target_parameters=5: only weights of linear layers",
        ),
        (
            lambda p: edit_config(p, target_parameters=[5]),
            r"target_parameters=\[5\]: only weights of linear layers",
        ),
        (lambda p: edit_config(p, r=10**9), "r must be positive, and 65536 at most"),
        (
            lambda p: edit_config(p, layers_to_transform=[0], layers_pattern="("),
            "layers_pattern: '\\(' is no valid regex",
        ),
        (lambda p: edit_config(p, use_dora=True), "lora_magnitude_vector is missing"),
        (lambda p: edit_config(p, modules_to_save=["lm_head"]), "lm_head.weight is missing"),
        (lambda p: edit_config(p, init_lora_weights="corda"), 'init_lora_weights="corda" changes'),
        (lambda p: edit_config(p, use_qalora=True), "use_qalora=true is not supported"),
        (lambda p: edit_config(p, r="4"), "r must be int, not '4'"),
        (lambda p: edit_config(p, r=5), r"is \(4, \d+\), the model needs \(5, \d+\)"),
        (lambda p: edit_config(p, target_modules=["w_proj"]), "'w_proj' matches no layer"),
        (lambda p: edit_config(p, target_modules=["q_proj"]), "belongs to no adapted layer"),
        (lambda p: edit_tensors(p, lambda t: t.pop(KEY)), "q_proj.lora_A.weight is missing"),
        (lambda p: edit_tensors(p, lambda t: t.update(x=torch.zeros(1))), "tensor x belongs to no"),
        (
            lambda p: (p / "adapter_model.safetensors").write_bytes(
                (p / "adapter_model.safetensors").read_bytes()[:-9]
            ),
            "damaged or cut off",
        ),
    ],
)
def test_a_bad_adapter_leaves_the_model_as_it_was(saved, tiny_dir, damage, message):
    model = lk.load_model(tiny_dir, dtype="float32")
    before = model(IDS)
    damage(saved)
    with pytest.raises(lk.LorakitError, match=message):
        lk.load_adapter(model, saved)
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("kind", ["transformers", "decoder"])
@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["embed_tokens"]}],
)
def test_tied_embeddings_both_ways(tmp_path, kind, options):
    """PEFT writes what embedding and head share under both names."""
    import peft

    from tests.conftest import tiny_llama

    def base():
        return tiny_llama(tie_word_embeddings=True)

    def mine():
        return base() if kind == "transformers" else lk.load_model(tmp_path / "m", dtype="float32")

    def logits(model):
        found = model(IDS)
        return found if isinstance(found, torch.Tensor) else found.logits

    base().save_pretrained(tmp_path / "m")
    options = {"r": 4, "target_modules": ["q_proj"], "ensure_weight_tying": True, **options}
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**options)).eval()
    torch.manual_seed(0)
    filled(theirs).save_pretrained(tmp_path / "theirs")
    ours = lk.load_adapter(mine().eval(), tmp_path / "theirs")
    assert (logits(ours) - theirs(IDS).logits).abs().max() <= LOGITS
    assert (logits(ours) - base()(IDS).logits).abs().max() > 0.1

    lk.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert (logits(ours) - again(IDS).logits).abs().max() <= LOGITS

    def drift(tensors):
        head = next(key for key in tensors if "lm_head" in key and "base_layer" not in key)
        tensors[head] += 1

    edit_tensors(tmp_path / "theirs", drift)
    with pytest.raises(lk.LorakitError, match="in this model they are tied"):
        lk.load_adapter(mine(), tmp_path / "theirs")


def test_a_random_start_cannot_be_read_again(model, saved):
    """Another draw would take another part out of the weight."""
    edit_config(saved, init_lora_weights="pissa_niter_4")
    with pytest.raises(lk.LorakitError, match="convert the adapter to plain LoRA first"):
        lk.load_adapter(lk.detach(model), saved)


@pytest.mark.parametrize("peft_type", ["IA3", "VERA", "ADALORA"])
@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": [3]},
        {"feedforward_modules": [3], "rank_pattern": [3], "r": [3]},
        {"target_modules": 3},
    ],
)
def test_odd_types_in_the_config_of_another_method(saved, tiny_dir, peft_type, change):
    edit_config(saved, peft_type=peft_type, **change)
    with pytest.raises(lk.LorakitError, match=r"adapter_config\.json: .* must be"):
        lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), saved)
