"""The head's logits and loss, whichever layer it is, against cross-entropy in fp64."""

import pytest
import torch
import torch.nn.functional as F

import lorakit as lk
from tests.conftest import tiny

IDS = torch.randint(97, (2, 14), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(14) < 3, -100)


def dense(model):
    pass


def packed(model):
    head = {"lm_head": "nf4"} if model.lm_head is not None else {"embed_tokens": "nf4"}
    lk.quantize(model, lk.QuantConfig(**head))


def adapted(model, **settings):
    if model.lm_head is None:
        settings |= {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    else:
        settings |= {"target_modules": ["q_proj", "lm_head"]}
    lk.attach(model, lk.LoraConfig(r=2, **settings))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, 0.1)


def with_dora(model):
    adapted(model, use_dora=True)


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)


def trained_whole(model):
    lk.attach(model, lk.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad).mul_(1.5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("tied", "change"),
    [
        *((tied, change) for tied in (False, True) for change in (dense, packed, adapted)),
        (False, with_dora),
        (False, hooked),
        (False, trained_whole),
    ],
)
def test_the_loss_is_the_cross_entropy_of_the_logits(tmp_path, tied, change, softcap):
    family, settings = "gemma2", {"head_dim": 8, "tie_word_embeddings": tied}
    tiny(family, **settings, final_logit_softcapping=softcap).save_pretrained(tmp_path)
    model = lk.load_model(tmp_path, dtype="float32")
    change(model)
    logits = model(IDS).double()[:, :-1]
    if softcap is not None:
        assert logits.abs().max() <= softcap
    targets = LABELS[:, 1:]
    expected = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="sum")
    loss, count = model.loss(IDS, LABELS)
    assert count == (targets != -100).sum()
    # the logits are rounded to fp32 once, their sums in another order
    assert abs(loss - expected) <= 2e-6 * expected


def test_an_adapter_for_each_row(tiny_dir):
    model = lk.load_model(tiny_dir, dtype="float32")
    adapted(model)
    lk.attach(model, lk.LoraConfig(r=2, target_modules=["lm_head"]), name="other")
    with lk.adapter_rows(model, ["default", "other"]):
        loss, _ = model.loss(IDS, LABELS)
    alone = []
    for row, name in enumerate(["default", "other"]):
        lk.set_adapter(model, name)
        alone.append(model.loss(IDS[row : row + 1], LABELS[row : row + 1])[0])
    # fp32 sums in another order
    assert abs(loss - sum(alone)) <= 2e-6 * loss


def test_a_tied_head_has_one_adapter_for_all_rows(tmp_path):
    tiny("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    model = lk.load_model(tmp_path, dtype="float32")
    adapted(model)
    with (
        lk.adapter_rows(model, ["default", None]),
        pytest.raises(lk.LorakitError, match="a head that is tied has one adapter for all rows"),
    ):
        model.loss(IDS, LABELS)
