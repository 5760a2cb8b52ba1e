"""Experts: which run, how they are stored, and adapters on them."""

import pytest
import torch

import lorakit as lk
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
    "all linear layers": ("all-linear", 2 * (4 + 1 + 4 * 3)),
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
