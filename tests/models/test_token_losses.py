"""The losses of single tokens, against the logits, and in the memory of a chunk."""

from dataclasses import replace

import pytest
import torch

import lorakit as lk

IDS = torch.tensor([[5, 9, 30, 4, 7, 11], [8, 3, 2, 60, 0, 0]])
LABELS = torch.tensor([[-100, -100, 30, 4, 7, 11], [-100, 3, 2, 60, -100, -100]])


@pytest.fixture(params=["dense", "nf4", "tied"])
def model(request, tiny_dir):
    quantize = "nf4" if request.param == "nf4" else None
    model = lk.load_model(tiny_dir, dtype="float32", quantize=quantize)
    if request.param == "tied":
        model.lm_head = None
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8, target_modules=r".*(q_proj|lm_head)"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_losses_are_those_of_the_logits(model, temperature, monkeypatch):
    """Values and gradients, with a chunk for every two positions. Sums of fp32 in another order."""
    monkeypatch.setattr("lorakit.models.head.chunk_rows", lambda *_: 2)
    found = model.token_losses(IDS, LABELS, temperature=temperature)
    targets = torch.cat([LABELS[:, 1:], torch.full((2, 1), -100)], 1)
    logits = model(IDS)[targets != -100].double() / temperature
    truth = -logits.log_softmax(-1).gather(-1, targets[targets != -100][:, None])[:, 0]
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 2, len(found))  # other gradients for each token
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad((found * weights).sum(), trained)
    theirs = torch.autograd.grad((truth * weights).sum(), trained)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_packed_documents_have_the_losses_of_rows(model):
    packed = torch.cat([IDS[0], IDS[1, :4]])[None], torch.cat([LABELS[0], LABELS[1, :4]])[None]
    found = model.token_losses(*packed, cu_seqlens=torch.tensor([0, 6, 10], dtype=torch.int32))
    torch.testing.assert_close(found, model.token_losses(IDS, LABELS), rtol=1e-5, atol=1e-5)


def test_a_soft_cap_comes_before_the_temperature(tiny_dir):
    model = lk.load_model(tiny_dir, dtype="float32")
    model.config = replace(model.config, final_logit_softcapping=2.0)
    found = model.token_losses(IDS[:1], LABELS[:1], temperature=0.5)
    logits = model(IDS[:1])[0, 1:5].double() / 0.5  # capped by the model
    truth = -logits.log_softmax(-1).gather(-1, LABELS[0, 2:, None])[:, 0]
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
