"""Experts: which run, how they are stored, and adapters on them."""

import contextlib
from unittest import mock

import pytest
import torch

import lorakit as lk
from lorakit.models.expert_layers import expert_layers
from lorakit.models.mlp import Experts
from lorakit.training.float8 import end_float8, start_float8
from tests.conftest import FAMILY_VARIANTS
from tests.models.variants import load

MOE = [name for name, (family, _) in FAMILY_VARIANTS.items() if family in ("mixtral", "qwen3_moe")]


@pytest.mark.parametrize("name", MOE)
def test_only_visited_experts_run_and_each_once(tmp_path, name):
    model = load(tmp_path, *FAMILY_VARIANTS[name])
    runs = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[0].endswith("experts"):
            module.register_forward_hook(
                lambda _, args, __, path=path: runs.setdefault(path, []).append(len(args[0]))
            )
    config = model.config
    model(torch.tensor([[5]]))
    layers = sum(config.moe_layers)
    assert len(runs) == layers * config.num_experts_per_tok
    assert all(rows == [1] for rows in runs.values())
    runs.clear()
    model(torch.randint(97, (2, 10)))
    assert all(len(rows) == 1 for rows in runs.values())  # grouped: one product, not one a token
    assert sum(sum(rows) for rows in runs.values()) == layers * 20 * config.num_experts_per_tok


@pytest.mark.parametrize("name", MOE)
def test_experts_are_quantized_and_the_router_is_not(tmp_path, name):
    model = load(tmp_path, *FAMILY_VARIANTS[name], quantize="nf4")
    kinds = {path: type(m).__name__ for path, m in model.named_modules()}
    experts = [path for path in kinds if ".experts." in path and path.count(".") == 6]
    assert len(experts) == 3 * model.config.num_experts * sum(model.config.moe_layers)
    assert {kinds[path] for path in experts} == {"NF4Linear"}
    assert {kind for path, kind in kinds.items() if path.endswith(".gate")} == {"Linear"}


TARGETS = {
    "every expert": (["w1", "w2", "w3"], 2 * 4 * 3),
    "two by index": (["experts.0.w1", "experts.3.w1"], 2 * 2),
    "one of one layer": (["model.layers.1.block_sparse_moe.experts.2.w2"], 1),
    "by a regex": (r".*experts\.(1|2)\.w[12]", 2 * 2 * 2),
    "the router": (["gate"], 2),
    "all linear layers but the router": ("all-linear", 2 * (4 + 4 * 3)),
}


@pytest.mark.parametrize(("targets", "count"), TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_lora_on_experts(tmp_path, targets, count, quantize):
    model = load(tmp_path, *FAMILY_VARIANTS["mixtral"], quantize=quantize)
    ids = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids)
    lk.attach(model, lk.LoraConfig(r=2, target_modules=targets))
    adapted = [p for p in model.parameters() if p.requires_grad]
    assert len(adapted) == 2 * count
    with torch.no_grad():
        assert torch.equal(model(ids), before)  # B is zero
    loss, _ = model.loss(ids, ids)
    loss.backward()
    step = lk.optim.AdamW(adapted, lr=1e-2)
    step.step()
    after, _ = model.loss(ids, ids)
    assert after < loss
    lk.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        trained = model(ids)
        lk.detach(model)
        lk.load_adapter(model, tmp_path / "adapter")
        assert torch.equal(model(ids), trained)


# ---- on a GPU: all experts together -------------------------------------------------------------


def step(model, ids, **options):
    """The loss, and the gradients by name; zeros for None."""
    model.zero_grad(set_to_none=True)
    loss, count = model.loss(ids, ids, **options)
    (loss / count).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()
    }


def randomized(model):
    """The model with A and B of its adapters away from their start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize(
    ("name", "quantize", "checkpointing"),
    [
        ("mixtral", None, True),
        ("mixtral sliding", "nf4", False),
        ("qwen3_moe", "nf4", False),
        ("qwen3_moe sparse step", None, True),
    ],
)
def test_experts_together_are_those_one_by_one(tmp_path, name, quantize, checkpointing):
    """Loss and gradients in fp32: sums of the same products in another order."""
    pytest.importorskip("triton")
    from tests.triton_interpreter import on_triton

    model = load(tmp_path, *FAMILY_VARIANTS[name], quantize=quantize)
    randomized(lk.attach(model, lk.LoraConfig(r=2, target_modules="all-linear")))
    model.gradient_checkpointing = checkpointing
    ids = torch.randint(97, (1, 12), generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, 5, 12])
    loss, grads = step(model, ids, cu_seqlens=bounds)
    with on_triton(), forbidden(Experts, "_one_by_one"):
        ours, found = step(model, ids, cu_seqlens=bounds)
    assert torch.allclose(ours, loss, rtol=1e-5)
    for key, expected in grads.items():
        # single gradients are sums that cancel
        assert torch.allclose(found[key], expected, rtol=1e-3, atol=1e-5), key


@contextlib.contextmanager
def forbidden(cls, method):
    with mock.patch.object(cls, method, side_effect=AssertionError(method)):
        yield


NOT_TOGETHER = {
    "DoRA": lk.LoraConfig(r=2, target_modules=["w1", "w2"], use_dora=True),
    "dropout": lk.LoraConfig(r=2, target_modules=["w1"], lora_dropout=0.1),
    "an adapter on one of them": lk.LoraConfig(r=2, target_modules=["experts.1.w1"]),
    "another scaling for one": lk.LoraConfig(
        r=2, target_modules=["w1"], alpha_pattern={"experts.1.w1": 7}
    ),
    "IA3": lk.IA3Config(target_modules=["w2"], feedforward_modules=["w2"]),
}


@pytest.mark.parametrize("config", NOT_TOGETHER.values(), ids=NOT_TOGETHER.keys())
def test_what_runs_one_by_one(tmp_path, config):
    model = lk.attach(load(tmp_path, *FAMILY_VARIANTS["mixtral"]), config).train()
    assert layers_of(model) is None
    lk.detach(model)
    assert layers_of(model) is not None


def layers_of(model):
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    found = expert_layers(experts, experts.names)
    if found is not None and not all(each.uniform for each in found):
        return None
    return found


def test_a_hook_or_a_trained_expert_runs_one_by_one(tmp_path):
    model = load(tmp_path, *FAMILY_VARIANTS["mixtral"]).requires_grad_(False)
    expert = next(m for m in model.modules() if isinstance(m, Experts))[1]
    for module in (expert, expert.w2):
        handle = module.register_forward_hook(lambda *_: None)
        assert layers_of(model) is None
        handle.remove()
        assert layers_of(model) is not None
    expert.w3.weight.requires_grad_()
    assert layers_of(model) is None
    with torch.no_grad():
        assert layers_of(model) is not None


def test_frozen_biases_go_along_and_a_trained_one_runs_one_by_one(tmp_path):
    model = load(tmp_path, *FAMILY_VARIANTS["gpt_oss"], quantize="nf4").requires_grad_(False)
    lk.attach(model, lk.LoraConfig(r=2, target_modules=["gate_proj"]))
    gate, up, _ = layers_of(model)
    expert = next(m for m in model.modules() if isinstance(m, Experts))[1]
    for each, layer in ((gate, expert.gate_proj.original), (up, expert.up_proj)):
        assert torch.equal(each.bias[1], layer.bias)
    expert.up_proj.bias.requires_grad_()
    assert layers_of(model) is None


def test_merged_adapters_and_a_switched_off_one_are_plain_layers(tmp_path):
    model = load(tmp_path, *FAMILY_VARIANTS["mixtral"], quantize="nf4")
    randomized(lk.attach(model, lk.LoraConfig(r=2, target_modules=["w1"])))
    gate, up, _ = layers_of(model)
    assert (len(gate.lora_A), len(up.lora_A)) == (4, 0)
    with lk.disable_adapters(model):
        gate, _, _ = layers_of(model)
        assert not gate.lora_A
    lk.merge(model)
    gate, _, _ = layers_of(model)
    assert not gate.lora_A
    assert isinstance(gate.stored[0], torch.Tensor)


def test_experts_in_float8_run_one_by_one(tmp_path):
    model = load(tmp_path, *FAMILY_VARIANTS["mixtral"])
    model = lk.attach(model.to(torch.bfloat16), lk.LoraConfig(r=2, target_modules=["w1"])).train()
    start_float8(model, 0.0)
    assert layers_of(model) is None
    end_float8(model)
    assert layers_of(model) is not None
