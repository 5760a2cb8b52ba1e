"""Adapters on disk, against peft in both directions."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers
from tests.adapters.common import IDS, randomize

CONFIG = lk.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])


@pytest.fixture
def model(tiny_dir):
    return lk.load_model(tiny_dir, dtype="float32")


@pytest.fixture
def saved(model, tmp_path):
    randomize(lk.attach(model, CONFIG))
    lk.save_adapter(model, tmp_path / "adapter", base_model="someone/tiny")
    return tmp_path / "adapter"


def hugging_face(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.1\..*up_proj"])
def test_peft_loads_ours(model, tiny_dir, tmp_path, targets, rslora):
    from peft import PeftModel

    config = lk.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora)
    base = model(IDS)
    randomize(lk.attach(model, config))
    lk.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(hugging_face(tiny_dir), tmp_path).eval()
    assert (theirs(IDS).logits - model(IDS)).abs().max() <= 1e-4
    assert (model(IDS) - base).abs().max() > 0.1


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
    assert (theirs(IDS).logits - model(IDS)).abs().max() <= 1e-4


def test_same_files_as_peft(model, tiny_dir, tmp_path):
    import peft

    randomize(lk.attach(model, CONFIG))
    lk.save_adapter(model, tmp_path / "ours")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    peft.get_peft_model(hugging_face(tiny_dir), config).save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs")
    )
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.items()
    }
    known = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert set(written) <= set(known)


def test_round_trip(model, saved, tiny_dir):
    other = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), saved)
    assert torch.equal(other(IDS), model(IDS))
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"
    lk.save_adapter(other, saved.parent / "again", base_model="someone/tiny")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (saved / file).read_bytes() == (saved.parent / "again" / file).read_bytes()


def edit_config(path, **change):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def edit_tensors(path, change):
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


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
        (lambda p: edit_config(p, target_parameters=5), "target_parameters=5: only experts"),
        (lambda p: edit_config(p, target_parameters=[5]), r"target_parameters=\[5\]: only experts"),
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


def nested():
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    return torch.nn.Sequential(torch.nn.Linear(8, 8), inner)


@pytest.mark.parametrize(
    "config",
    [
        lk.LoraConfig(r=2, target_modules="0"),
        lk.LoraConfig(r=2, target_modules=["0", "1.1"], exclude_modules=["1.0"]),
        # of all three, with other ranks in the order in which the first match counts
        lk.LoraConfig(r=2, target_modules=["0", "1"], rank_pattern={"1.0": 3, "0": 4}),
        lk.LoraConfig(r=2, target_modules=["0", "1"], alpha_pattern={"1.0": 3, "0": 4}),
    ],
    ids=["regex", "exclude", "ranks", "alphas"],
)
def test_a_name_in_which_another_one_ends(tmp_path, config):
    """`0` is also how `1.0` ends: what is read is the same all the same, here and in PEFT."""
    from peft import PeftModel

    module, x = nested(), torch.randn(3, 8)
    randomize(lk.attach(module, config))
    lk.save_adapter(module, tmp_path)
    again = lk.load_adapter(nested(), tmp_path)
    assert lora_layers(again).keys() == lora_layers(module).keys()
    assert torch.equal(again(x), module(x))
    edit_config(tmp_path, task_type=None)  # a PeftModelForCausalLM asks for methods of such a model
    theirs = PeftModel.from_pretrained(nested(), tmp_path).eval()
    # fp32 sums of 8 products in another order, through three layers
    assert (theirs(x) - module(x)).abs().max() < 1e-5
    lk.save_adapter(again, tmp_path / "again")
    assert torch.equal(lk.load_adapter(nested(), tmp_path / "again")(x), module(x))


@pytest.mark.parametrize("kind", [lk.IA3Config, lk.VeraConfig, lk.AdaLoraConfig])
def test_a_name_in_which_another_one_ends_of_another_method(tmp_path, kind):
    steps = {"total_step": 9} if kind is lk.AdaLoraConfig else {}
    module, x = nested(), torch.randn(3, 8)
    lk.attach(module, kind(target_modules=["0", "1.1"], exclude_modules=["1.0"], **steps))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    lk.save_adapter(module, tmp_path)
    assert torch.equal(lk.load_adapter(nested(), tmp_path)(x), module(x))


def test_a_tied_head_of_any_name_has_no_rank_of_its_own(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.fc = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 8)
            self.output = torch.nn.Linear(8, 20, bias=False)
            self.output.weight = self.embed.weight

        def forward(self, ids):
            return self.output(self.fc(self.embed(ids)))

    config = lk.LoraConfig(
        r=4, target_modules=["embed", "fc"], rank_pattern={"embed": 2}, ensure_weight_tying=True
    )
    module, ids = randomize(lk.attach(Model(), config)), torch.arange(20)[None]
    lk.save_adapter(module, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["rank_pattern"] == {"embed": 2, "output": 2}  # PEFT adapts it as one of its own
    again = lk.load_adapter(Model(), tmp_path)
    assert torch.equal(again(ids), module(ids))
    twice = lk.load_adapter(module, tmp_path, name="twice")  # where the head is one of ours by now
    assert torch.equal(again(ids), twice(ids))


def test_nothing_to_save(model, tmp_path):
    with pytest.raises(lk.LorakitError, match="no adapter is attached"):
        lk.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


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
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lk.load_adapter(mine().eval(), tmp_path / "theirs")
    assert (logits(ours) - theirs(IDS).logits).abs().max() <= 1e-4
    assert (logits(ours) - base()(IDS).logits).abs().max() > 0.1

    lk.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert (logits(ours) - again(IDS).logits).abs().max() <= 1e-4

    def drift(tensors):
        head = next(key for key in tensors if "lm_head" in key and "base_layer" not in key)
        tensors[head] += 1

    edit_tensors(tmp_path / "theirs", drift)
    with pytest.raises(lk.LorakitError, match="in this model they are tied"):
        lk.load_adapter(mine(), tmp_path / "theirs")


def test_modules_to_save_by_any_end_of_their_names(model, tiny_dir, tmp_path):
    """PEFT takes "norm" for the layernorms too, lorakit for the last norm alone; each reads what
    the other wrote.
    """
    import peft

    options = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    theirs = peft.get_peft_model(hugging_face(tiny_dir), peft.LoraConfig(**options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    lk.load_adapter(model, tmp_path / "theirs", name="theirs")
    assert (model(IDS) - theirs(IDS).logits).abs().max() <= 1e-4

    lk.attach(model, lk.LoraConfig(**options), name="ours")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    lk.save_adapter(model, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["model.norm"]
    again = peft.PeftModel.from_pretrained(hugging_face(tiny_dir), tmp_path / "ours").eval()
    assert (model(IDS) - again(IDS).logits).abs().max() <= 1e-4


def test_a_random_start_cannot_be_read_again(model, saved):
    """Another draw would take another part out of the weight."""
    edit_config(saved, init_lora_weights="pissa_niter_4")
    with pytest.raises(lk.LorakitError, match="convert the adapter to plain LoRA first"):
        lk.load_adapter(lk.detach(model), saved)
