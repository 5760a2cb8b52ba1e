"""attach, merge, detach: what they change, what they leave, and what they refuse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lorakit as lk
from lorakit.adapters.layers.lora import LoraLinear, lora_layers
from lorakit.adapters.targets import match_targets

IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def model(tiny_dir):
    return lk.load_model(tiny_dir, dtype="float32")


@pytest.fixture(params=["dense", "nf4"])
def either(tiny_dir, request):
    quantize = None if request.param == "dense" else "nf4"
    return lk.load_model(tiny_dir, dtype="float32", quantize=quantize)


def randomize(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(module).values():
            layer.lora_B.normal_(0, 0.1)
    return module


CONFIG = lk.LoraConfig(r=4, lora_alpha=8)


def test_attach_changes_no_output_and_freezes_the_rest(either):
    before = either(IDS)
    lk.attach(either, CONFIG)
    assert torch.equal(either(IDS), before)
    trainable = {n.rpartition(".")[2] for n, p in either.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}
    assert len(lora_layers(either)) == 14
    assert "lm_head" not in lora_layers(either)
    for layer in lora_layers(either).values():
        assert layer.lora_A.abs().max() <= layer.base.in_features**-0.5
        assert layer.lora_A.std() > 0
        assert layer.lora_A.dtype == torch.float32


def test_forward_is_base_plus_scaled_low_rank(either):
    layer = randomize(lk.attach(either, CONFIG)).model.layers[0].mlp.up_proj
    x = torch.randn(5, layer.base.in_features)
    low = x.double() @ layer.lora_A.double().t() @ layer.lora_B.double().t()
    truth = x.double() @ layer.base.dequantize().double().t() + 2 * low
    assert (layer(x) - truth).abs().max() < 1e-5  # fp32 sums of 32 terms


def test_merge_and_unmerge(either):
    base_bits = [p.clone() for p in either.parameters()]
    base = either(IDS)
    randomize(lk.attach(either, CONFIG))
    adapted = either(IDS)
    assert (adapted - base).abs().max() > 0.1
    lk.merge(either)
    # one fp32 rounding per weight instead of two products
    assert (either(IDS) - adapted).abs().max() < 1e-4 * adapted.abs().max()
    lk.unmerge(either)
    assert torch.equal(either(IDS), adapted)
    lk.detach(either)
    assert torch.equal(either(IDS), base)
    for a, b in zip(either.parameters(), base_bits, strict=True):
        assert torch.equal(a, b)


def test_detached_dense_layers_are_plain_again(model):
    lk.detach(lk.attach(model, CONFIG))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    lk.quantize(model)  # finds them


def test_merged_model_is_saved_as_it_computes(either, tmp_path):
    lk.merge(randomize(lk.attach(either, CONFIG)))
    lk.save_model(either, tmp_path)
    assert torch.equal(lk.load_model(tmp_path, dtype="float32")(IDS), either(IDS))


def test_merged_directory_loads_in_transformers(either, tmp_path):
    from transformers import AutoModelForCausalLM

    lk.merge(randomize(lk.attach(either, CONFIG)))
    lk.save_model(either, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    # the same weights, as fp32; transformers' sums differ in order
    difference = (theirs(IDS).logits - either(IDS)).abs().max()
    assert difference <= 1e-5 * either(IDS).abs().max()


def test_an_unmerged_adapter_is_not_saved_silently(model, tmp_path):
    lk.attach(model, CONFIG)
    with pytest.raises(lk.LorakitError, match="merge it into the weights, or detach it"):
        lk.save_model(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_merge_refuses_what_is_not_finite(model):
    randomize(lk.attach(model, CONFIG))
    last = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        last.lora_B[0, 0] = float("inf")
    with pytest.raises(lk.LorakitError, match=r"down_proj holds NaN or infinite"):
        lk.merge(model)
    assert all(layer.merged is None for layer in lora_layers(model).values())


def test_disable_adapters(either):
    base = either(IDS)
    adapted = randomize(lk.attach(either, CONFIG))(IDS)
    with lk.disable_adapters(either):
        assert torch.equal(either(IDS), base)
    assert torch.equal(either(IDS), adapted)
    lk.merge(either)
    with lk.disable_adapters(either):
        assert torch.equal(either(IDS), base)


def test_a_merged_model_moves_as_a_whole(either, tmp_path):
    lk.merge(randomize(lk.attach(either, CONFIG)))
    either.to(torch.bfloat16)
    assert either(IDS).dtype == torch.bfloat16
    lk.merge(either)  # again, from an adapter that .to() has rounded
    lk.save_adapter(either, tmp_path)
    lk.save_model(either, tmp_path)
    assert torch.equal(lk.load_model(tmp_path, dtype="bfloat16")(IDS), either(IDS))


def test_dropout_only_while_training(model):
    randomize(lk.attach(model, lk.LoraConfig(r=4, lora_dropout=0.5)))
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))
    torch.manual_seed(0)
    a = model(IDS)
    torch.manual_seed(0)
    assert torch.equal(model(IDS), a)


def test_a_trainable_base_gets_its_gradient(model):
    randomize(lk.attach(model, CONFIG))
    layer = model.model.layers[0].mlp.up_proj
    layer.base.linear.weight.requires_grad_(True)
    loss, _ = model.loss(IDS, IDS)
    loss.backward()
    assert layer.base.linear.weight.grad.abs().max() > 0
    assert layer.lora_A.grad.abs().max() > 0


def test_works_on_any_module():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    lk.attach(module, lk.LoraConfig(r=2, target_modules=["0"]))
    assert isinstance(module[0], LoraLinear)
    assert type(module[2]) is nn.Linear
    module(torch.randn(4, 6)).sum().backward()
    assert module[0].lora_B.grad is not None


def test_an_adapted_head_is_in_the_loss(model):
    plain, _ = model.loss(IDS, IDS)
    randomize(lk.attach(model, lk.LoraConfig(r=4, target_modules=["lm_head"])))
    loss, count = model.loss(IDS, IDS)
    assert abs(loss - plain) > 0.1
    truth = nn.functional.cross_entropy(
        model(IDS)[:, :-1].reshape(-1, 300), IDS[:, 1:].reshape(-1), reduction="sum"
    )
    assert abs(loss - truth) < 1e-4 * truth
    assert count == 22
    loss.backward()
    assert model.lm_head.lora_A.grad.abs().max() > 0


def test_an_adapted_head_under_autocast(model):
    randomize(lk.attach(model, lk.LoraConfig(r=4, target_modules=["lm_head"])))
    exact, _ = model.loss(IDS, IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model.loss(IDS, IDS)
    loss.backward()
    assert abs(loss - exact) < 0.02 * exact  # a few roundings of bf16


def test_hooks_of_adapted_layers_are_called(model):
    """Although attention and MLP would compute several layers at once."""
    randomize(lk.attach(model, CONFIG))
    before = model(IDS)
    block, seen = model.model.layers[0], []
    for layer in (block.self_attn.q_proj, block.mlp.gate_proj):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(layer))
    # products one by one instead of side by side: fp32 sums in another order
    assert torch.allclose(model(IDS), before, rtol=1e-4, atol=1e-5)
    assert seen == [block.self_attn.q_proj, block.mlp.gate_proj]


def test_one_layer_may_drop_nothing(model):
    randomize(lk.attach(model, lk.LoraConfig(r=4, lora_dropout=0.5)))
    model.train()
    for block in model.model.layers:
        block.mlp.gate_proj.eval()
    loss, _ = model.loss(IDS, IDS)
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.lora_A.grad.abs().max() > 0


def test_an_activation_in_place_behind_an_adapted_layer():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    lk.attach(module, lk.LoraConfig(r=2))
    module(torch.randn(4, 6)).sum().backward()
    assert module[0].lora_B.grad is not None


NAMES = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(12) for p in "qkvo"] + ["lm_head"]


def test_targets():
    assert len(match_targets(NAMES, "all-linear")) == 48
    assert len(match_targets(NAMES, ["q_proj", "v_proj"])) == 24
    assert match_targets(NAMES, ["1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]
    assert match_targets(NAMES, r".*\.(1|2)\.self_attn\.q_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
    ]
    assert match_targets(NAMES, ["lm_head"]) == ["lm_head"]


@given(
    st.lists(
        st.sampled_from([*NAMES, "q_proj", "self_attn.k_proj", "3.self_attn.o_proj"]), min_size=1
    )
)
def test_targets_by_the_rule_of_peft(targets):
    """A name is selected iff it equals an entry or ends with '.' + entry."""
    expected = [n for n in NAMES if any(n == t or n.endswith("." + t) for t in targets)]
    assert match_targets(NAMES, targets) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_prj"], "'v_prj' matches no layer .did you mean 'v_proj'"),
        (["proj"], "'proj' matches no layer"),
        ("q_proj", "regex 'q_proj' matches no layer .did you mean 'q_proj'.*a list"),
        (r"(.*q_proj", "no valid regex"),
        ("", "target_modules is empty"),
        ([], "target_modules is empty"),
    ],
)
def test_a_target_that_matches_nothing(model, targets, message):
    before = dict(model.named_parameters())
    with pytest.raises(lk.LorakitError, match=message):
        lk.attach(model, lk.LoraConfig(target_modules=targets))
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p.requires_grad for p in model.parameters())


def test_refusals(model):
    for action in (lk.merge, lk.unmerge, lk.detach):
        with pytest.raises(lk.LorakitError, match="no adapter is attached"):
            action(model)
    lk.attach(model, CONFIG)
    with pytest.raises(lk.LorakitError, match="attached already"):
        lk.attach(model, CONFIG)

    class Odd(nn.Linear):
        pass

    with pytest.raises(lk.LorakitError, match="is a Odd"):
        lk.attach(nn.Sequential(Odd(3, 3)), CONFIG)


def test_dora_starts_from_products_of_its_rank(either):
    """The lengths of the rows of W + s B A, without any product of the shape of W."""
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "mm" in str(func):
                made.append(tuple(out.shape))
            return out

    with Watch():
        lk.attach(either, lk.LoraConfig(r=2, use_dora=True, init_lora_weights=False))
    for layer in lora_layers(either).values():
        assert (layer.out_features, layer.in_features) not in made
        part = layer.part
        W = layer.base.dequantize().double() + part.scaling * (
            part.lora_B.double() @ part.lora_A.double()
        )
        # a sum of fp32 squares of some 32 numbers
        assert torch.allclose(part.magnitude.double(), W.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "forward", "training", 3])
def test_names_that_no_adapter_can_have(model, name):
    with pytest.raises(lk.LorakitError, match="is no name for an adapter"):
        lk.attach(model, CONFIG, name=name)
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())
