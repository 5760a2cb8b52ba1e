"""What the decoder promises beyond parity: packing, padding, caches in pieces, experts."""

import pytest
import torch

import lorakit as lk
from lorakit.inference.kv_cache import KVCache
from tests.conftest import FAMILY_VARIANTS, LOGITS, TINY_VARIANTS, tiny

VARIANTS = {"llama": ("llama", TINY_VARIANTS["gqa"])} | FAMILY_VARIANTS
BY_LENGTH = {name: ("llama", TINY_VARIANTS[name]) for name in ("dynamic_rope", "longrope")}
packed_variants = pytest.mark.parametrize(
    ("family", "options"),
    (VARIANTS | BY_LENGTH).values(),
    ids=(VARIANTS | BY_LENGTH).keys(),
)
variants = pytest.mark.parametrize(("family", "options"), VARIANTS.values(), ids=VARIANTS.keys())


def load(tmp_path, family, options, **how):
    tiny(family, **options).save_pretrained(tmp_path)
    return lk.load_model(tmp_path, dtype="float32", **how)


@packed_variants
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(tmp_path, family, options):
    model = load(tmp_path, family, options)
    torch.manual_seed(0)
    documents = [torch.randint(97, (1, n)) for n in (3, 27, 1, 12)]
    cu_seqlens = torch.tensor([0, 3, 30, 31, 43], dtype=torch.int32)
    packed = model(torch.cat(documents, 1), cu_seqlens=cu_seqlens)
    for document, logits in zip(documents, packed.split([3, 27, 1, 12], dim=1), strict=True):
        # each document's own logits, up to 7; products over more rows may sum in another order
        assert (logits - model(document)).abs().max() <= 2e-5
    documents[1] = torch.randint(97, (1, 27))
    changed = model(torch.cat(documents, 1), cu_seqlens=cu_seqlens)
    assert not torch.equal(changed[:, 3:30], packed[:, 3:30])
    for part in (slice(0, 3), slice(30, 43)):
        assert torch.equal(changed[:, part], packed[:, part])


@variants
def test_packed_loss_and_gradients_are_the_sum_over_documents(tmp_path, family, options):
    model = load(tmp_path, family, options)
    torch.manual_seed(0)
    documents = [torch.randint(97, (1, n)) for n in (4, 15, 9)]
    packed = torch.cat(documents, 1)
    loss, count = model.loss(packed, packed, cu_seqlens=torch.tensor([0, 4, 19, 28]))
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    losses, counts = zip(*(model.loss(ids, ids) for ids in documents), strict=True)
    sum(losses).backward()
    assert count == sum(counts) == 28 - 3
    # the same sums in fp32 in another order: some units of 2^-24, through two layers and back
    assert abs(loss - sum(losses)) <= 1e-5 * loss
    for name, parameter in model.named_parameters():
        truth = parameter.grad
        if truth is None:
            assert grads[name] is None, name
        else:
            assert (grads[name] - truth).abs().max() <= 1e-4 * truth.abs().max(), name


@pytest.mark.parametrize(
    "bounds", [[0, 5], [1, 10], [0, 4, 4, 10], [0, 11], [0], [], [0, 6, 3, 10]]
)
def test_bad_cu_seqlens(tmp_path, bounds):
    model = load(tmp_path, "llama", {})
    with pytest.raises(lk.LorakitError, match="cu_seqlens must rise from 0"):
        model(
            torch.zeros(1, 10, dtype=torch.long), cu_seqlens=torch.tensor(bounds, dtype=torch.long)
        )


@pytest.mark.parametrize("wrong", [[0, 10], torch.tensor(3), torch.tensor([0.0, 10.0]), None])
def test_cu_seqlens_of_the_wrong_type(tmp_path, wrong):
    model = load(tmp_path, "llama", {})
    ids = torch.zeros(1, 10, dtype=torch.long)
    if wrong is None:
        assert torch.equal(model(ids, cu_seqlens=wrong), model(ids))
    else:
        with pytest.raises(lk.LorakitError, match="cu_seqlens must be a tensor of whole numbers"):
            model(ids, cu_seqlens=wrong)


def test_packing_takes_one_row_and_no_padding(tmp_path):
    model = load(tmp_path, "llama", {})
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(lk.LorakitError, match="for 2 rows"):
        model(ids, cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(lk.LorakitError, match="neither a padding mask nor a cache"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 4]), attention_mask=torch.ones(1, 4))


@variants
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit_and_no_loss(tmp_path, family, options, side):
    model = load(tmp_path, family, options)
    torch.manual_seed(0)
    rows = [torch.randint(97, (n,)) for n in (5, 9, 20)]
    ids = torch.zeros(3, 20, dtype=torch.long)
    mask = torch.zeros(3, 20, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(20 - len(row), 20) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, True
    logits = model(ids, attention_mask=mask)
    for i, row in enumerate(rows):
        # another order of sums in fp32; padding itself contributes exact zeros
        assert (logits[i][mask[i]] - model(row[None])[0]).abs().max() <= LOGITS
    labels = ids.masked_fill(~mask, -100)
    if side == "left":  # the first token of a row has nothing before it that could predict it
        labels[torch.arange(3), mask.int().argmax(1)] = -100
    loss, count = model.loss(ids, labels, attention_mask=mask)
    alone = [model.loss(row[None], row[None]) for row in rows]
    assert count == sum(n for _, n in alone)
    assert abs(loss - sum(value for value, _ in alone)) <= 1e-5 * loss


@variants
@torch.no_grad()
def test_cache_in_pieces_equals_the_whole(tmp_path, family, options):
    """Any cut of a sequence gives the same logits, and a sliding layer holds its window only."""
    model = load(tmp_path, family, options)
    ids = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    whole = model(ids)
    for cut in ([30], [4, 1, 6, 1, 3, 15], [1] * 30, [20, 2, 1, 7], [3, 3, 3, 3, 3, 3, 3, 9]):
        cache = KVCache(model.config, 2, 30, torch.float32, torch.device("cpu"))
        pieces = [model(part, cache=cache) for part in ids.split(cut, dim=1)]
        # fp32 in another order of sums; logits reach 7
        assert (torch.cat(pieces, 1) - whole).abs().max() <= LOGITS, cut
        assert cache.length == 30
    for layer, keys in enumerate(cache.keys):
        assert keys.shape[1] == (model.config.window(layer) or 30)


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
