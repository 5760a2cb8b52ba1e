"""Adapters of experts, of all or of some, in the files of transformers 5 and of other tools."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers
from lorakit.adapters.manage import adapter_config
from lorakit.adapters.peft_files.experts import experts_place
from tests.conftest import FAMILY_VARIANTS, tiny
from tests.models.wrappers import wrapped

IDS = torch.arange(40).view(2, 20) % 97
OPTIONS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = ["mixtral", "qwen3_moe", "gemma4_text"]


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    options = OPTIONS
    if request.param == "gemma4_text":
        options = FAMILY_VARIANTS["gemma4_text experts"][1]
    tiny(request.param, **options).save_pretrained(path)
    return path


def hugging_face(path):
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def load(path, **options):
    return lk.load_model(path, dtype="float32", **options)


def leaves(model):
    return list(model.config.moe_names[1:])


def randomize(model):
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, 0, 0.1)


# lorakit sums the experts of a token in another order, in fp32
TOLERANCE = 1e-5


def same(a, b, tolerance=TOLERANCE):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_ours(directory, tmp_path, fused, rslora):
    model = load(directory)
    base = model(IDS)
    targets = [*leaves(model), "q_proj"]
    lk.attach(model, lk.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=rslora))
    randomize(model)
    assert not same(model(IDS), base)
    lk.save_adapter(model, tmp_path, fused_experts=fused)
    if not fused and model.config.fused_experts:  # of which PEFT knows no single ones
        return
    if rslora and not fused:  # PEFT doubles both r and alpha of such a file: a factor of sqrt(2)
        return
    theirs = peft.PeftModel.from_pretrained(hugging_face(directory), tmp_path).eval()
    assert same(model(IDS), theirs(IDS).logits)


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"]])
def test_we_load_pefts(directory, tmp_path, parameters):
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["v_proj"],
        target_parameters=[f"experts.{p}" for p in parameters],
        rank_pattern={"experts.down_proj": 2},
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(hugging_face(directory), config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = lk.load_adapter(load(directory), tmp_path / "theirs")
    assert same(model(IDS), theirs(IDS).logits)
    lk.save_adapter(model, tmp_path / "ours")
    again = lk.load_adapter(load(directory), tmp_path / "ours")
    assert torch.equal(again(IDS), model(IDS))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt_oss")
    tiny("gpt_oss", **FAMILY_VARIANTS["gpt_oss"][1]).save_pretrained(path)
    return path


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["gate_up_proj"]])
def test_gate_and_up_in_turns(gpt_oss, tmp_path, parameters):
    """gpt-oss has transposed experts, in which columns of gate and up take turns."""
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=[f"experts.{p}" for p in parameters],
    )
    theirs = peft.get_peft_model(hugging_face(gpt_oss), config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lk.load_adapter(load(gpt_oss), tmp_path / "theirs")
    assert same(ours(IDS), theirs(IDS).logits)
    lk.save_adapter(ours, tmp_path / "fused", fused_experts=True)
    back = peft.PeftModel.from_pretrained(hugging_face(gpt_oss), tmp_path / "fused").eval()
    assert same(ours(IDS), back(IDS).logits)
    plain = lk.convert_adapter(tmp_path / "theirs", tmp_path / "plain", base_model=gpt_oss)
    assert plain is not None
    assert same(lk.load_adapter(load(gpt_oss), tmp_path / "plain")(IDS), ours(IDS))


@pytest.fixture(scope="module")
def next_80b(tmp_path_factory):
    """A mixture with shared experts, and a layer without experts."""
    path = tmp_path_factory.mktemp("next")
    tiny("qwen3_next", **FAMILY_VARIANTS["qwen3_next"][1]).save_pretrained(path)
    return path


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "targets", ["all-linear", r".*(shared_expert|layers\.1\.mlp)\.(gate|up|down)_proj"]
)
def test_layers_that_peft_takes_for_experts(next_80b, tmp_path, targets, rslora):
    """PEFT takes gate_proj in target_modules for the experts' alone in these families."""
    model = load(next_80b)
    config = lk.LoraConfig(
        r=2, lora_alpha=5, target_modules=targets, use_rslora=rslora, lora_dropout=0.1,
        rank_pattern={"shared_expert.down_proj": 3}, alpha_pattern={"1.mlp.up_proj": 7},
    )  # fmt: skip
    lk.attach(model, config).eval()
    randomize(model)
    lk.save_adapter(model, tmp_path, fused_experts=True)
    theirs = peft.PeftModel.from_pretrained(hugging_face(next_80b), tmp_path).eval()
    # linear attention in fp32 is 1.7e-5 from fp64 on AVX2
    assert same(model(IDS), theirs(IDS).logits, 2e-5)
    assert same(lk.load_adapter(load(next_80b), tmp_path)(IDS), model(IDS))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A mixture with a shared expert and a vision tower, as its files."""
    path = tmp_path_factory.mktemp("qwen")
    wrapped("qwen3_5_moe").save_pretrained(path)
    return path


@pytest.mark.parametrize("experts", [False, True])
def test_a_mixture_with_a_vision_tower(qwen, tmp_path, experts):
    """target_modules means the shared expert alone there: the others are parameters."""
    parameters = ["experts.gate_up_proj", "experts.down_proj"] if experts else None
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=["q_proj", "gate_proj", "down_proj"],
        target_parameters=parameters,
    )
    whole = AutoModelForImageTextToText.from_pretrained(
        qwen, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.get_peft_model(whole, config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = lk.load_adapter(load(qwen), tmp_path)
    assert same(ours(IDS), theirs(IDS).logits)
    names = [name for name in lora_layers(ours) if ".experts." in name]
    assert bool(names) == experts
    # an entry for each of many experts would be compared with each of their names
    config = adapter_config(ours, "default")
    assert not config.rank_pattern
    assert not config.alpha_pattern
    if experts:
        lk.save_adapter(ours, tmp_path / "fused", fused_experts=True)
        whole = AutoModelForImageTextToText.from_pretrained(
            qwen, dtype=torch.float32, attn_implementation="eager"
        )
        back = peft.PeftModel.from_pretrained(whole, tmp_path / "fused").eval()
        assert same(ours(IDS), back(IDS).logits)


def test_some_experts_alone(directory, tmp_path):
    model = load(directory, quantize="nf4")
    gate = leaves(model)[0]
    place = experts_place(model.config.moe_names[0])
    targets = [f"experts.1.{gate}", f"layers.0{place}.3.{gate}"]
    lk.attach(model, lk.LoraConfig(r=2, target_modules=targets))
    assert len(lora_layers(model)) == len(model.model.layers) + 1
    loss, _ = model.loss(IDS, IDS)
    loss.backward()
    # an expert that no token chose has no gradient
    grads = [layer.lora_B.grad for layer in lora_layers(model).values()]
    reached = [grad for grad in grads if grad is not None]
    assert reached
    assert all(grad.abs().max() > 0 for grad in reached)
    randomize(model)
    lk.save_adapter(model, tmp_path)
    again = lk.load_adapter(load(directory, quantize="nf4"), tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    with pytest.raises(lk.LorakitError, match="join_experts: .* can only be joined together"):
        lk.save_adapter(model, tmp_path / "fused", fused_experts=True)
    assert not (tmp_path / "fused").exists()


def test_no_update_of_a_weights_size_is_formed(directory):
    """The largest tensor that a step saves for backward or makes is one of activations."""
    model = load(directory)
    lk.attach(model, lk.LoraConfig(r=2, target_modules=leaves(model)))
    sizes = []
    weight = lora_layers(model)[next(iter(lora_layers(model)))].base.dequantize()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape in (weight.shape, weight.t().shape):
                sizes.append(str(func))
            return out

    with Watch():
        loss, _ = model.loss(IDS[:, :5], IDS[:, :5])
        loss.backward()
    assert not [name for name in sizes if "mm" in name]


def test_what_cannot_be_fused_or_split(directory, tiny_dir, tmp_path):
    dense = lk.attach(lk.load_model(tiny_dir, dtype="float32"))
    with pytest.raises(lk.LorakitError, match="the model has no experts"):
        lk.save_adapter(dense, tmp_path / "a", fused_experts=True)
    model = load(directory)
    lk.attach(model, lk.LoraConfig(r=2, target_modules=leaves(model)))
    lk.save_adapter(model, tmp_path / "b", fused_experts=True)
    plain = lk.load_model(tiny_dir, dtype="float32")
    with pytest.raises(lk.LorakitError, match="and experts of lorakit's own decoder, are adapted"):
        lk.load_adapter(plain, tmp_path / "b")
    assert not lora_layers(plain)


@pytest.mark.parametrize("decoder", [True, False])
def test_weights_of_layers_as_parameters(tiny_dir, tmp_path, decoder):
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["v_proj"],
        target_parameters=["mlp.down_proj.weight", "1.self_attn.q_proj.weight"],
        rank_pattern={"down_proj.weight": 2, "q_proj": 4},  # the second is no name of a weight
        alpha_pattern={r"layers\.0\.mlp\.down_proj\.weight": 7},
    )
    theirs = peft.get_peft_model(hugging_face(tiny_dir), config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    plain = lk.load_model(tiny_dir, dtype="float32") if decoder else hugging_face(tiny_dir)
    found = lk.load_adapter(plain, tmp_path)(IDS)
    assert same(found if decoder else found.logits, theirs(IDS).logits)
