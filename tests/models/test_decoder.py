"""The decoder's losses and its options for training, each against what it is defined by."""

import pytest
import torch
import torch.nn.functional as F

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers
from lorakit.models.views import PackedRow
from tests.models.variants import load, variants

IDS = torch.arange(36).view(3, 12) * 5 % 300


@pytest.fixture
def model(tiny_dir):
    model = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, 0, 0.1)
    return model


def gradients(model, **options):
    loss, _ = model.loss(IDS, IDS, **options)
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


def test_label_smoothing_and_z_loss(model):
    logits = model(IDS)[:, :-1].reshape(-1, 300).double()
    labels = IDS[:, 1:].reshape(-1)
    smoothed = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    truth = smoothed + 1e-3 * logits.logsumexp(-1).square().sum()
    loss, _ = model.loss(IDS, IDS, label_smoothing=0.1, z_loss=1e-3)
    assert abs(loss - truth) <= 1e-5 * truth  # fp32 sums over 300 words


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


@pytest.mark.parametrize("dropped", [False, True])
def test_a_packed_row_on_the_device(model, dropped):
    """Its loss and gradients are those of cu_seqlens, whatever padding lies behind."""
    lengths = [4, 15, 9]
    labels = IDS.view(1, -1)[:, :28].clone()
    labels[:, 5:9] = -100
    model.train()
    if dropped:  # a head that is called
        model.lm_head.register_forward_hook(lambda module, args, y: None)
    loss, _ = model.loss(
        labels.clamp(min=0), labels, cu_seqlens=torch.tensor([0, 4, 19, 28]), z_loss=1e-3
    )
    loss.backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    documents = lk.kernels.PaddedDocuments(40, 4)
    documents.refill(lengths)
    ids = F.pad(labels.clamp(min=0), (0, 12))
    targets = F.pad(labels[0, 1:], (0, 13), value=-100)
    targets[torch.tensor(lengths).cumsum(0) - 1] = -100
    rows = torch.tensor([row for row in range(39, -1, -1) if row not in (5, 33)])
    positions = torch.cat([torch.arange(n) for n in documents])
    row = PackedRow(ids, positions, documents, rows, targets[rows])
    same = model.packed_loss(row, z_loss=1e-3)
    same.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    # the same sums in fp32 in another order
    assert abs(same - loss) <= 1e-6 * loss
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_checkpointing_and_offloading_leave_gradients_unchanged(model):
    """They are the same bits, as the same products run on the same numbers."""
    model.train()
    loss, grads = gradients(model)
    for offload in (False, True):
        model.gradient_checkpointing, model.offload_activations = True, offload
        other_loss, others = gradients(model)
        assert torch.equal(other_loss, loss)
        assert torch.equal(others, grads)


@pytest.mark.parametrize("packed", [False, True])
def test_neftune_noise(model, packed):
    """Uniform, up to alpha / sqrt(T H) of a row or a document, and only while training."""
    model.neftune_noise_alpha = 5.0
    ids, bounds, length = IDS, None, torch.full((3, 12, 1), 12.0)
    if packed:
        ids, bounds = IDS.view(1, -1), torch.tensor([0, 4, 36])
        length = torch.tensor([4.0] * 4 + [32.0] * 32)[None, :, None]
    seen = []
    layer = model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    for training in (False, True, True):
        model.train(training)
        model.hidden_states(ids, cu_seqlens=bounds)
    hook.remove()
    plain, *noisy = seen
    assert torch.equal(plain, model.embed(ids))
    shares = [(x - plain) / (5 / (length * 32).sqrt()) for x in noisy]
    assert not torch.equal(*shares)
    for share in shares:
        assert share.abs().max() <= 1 + 1e-4
        assert share.std() == pytest.approx(3**-0.5, rel=0.1)  # of U(-1, 1)


@pytest.mark.parametrize("packed", [False, True])
def test_row_losses_are_the_losses_of_the_rows_alone(model, packed):
    labels = IDS.clone()
    labels[1, 5:] = -100
    alone = torch.stack([model.loss(IDS[i : i + 1], labels[i : i + 1])[0] for i in range(3)])
    if packed:
        bounds = torch.tensor([0, 12, 24, 36])
        losses, counts = model.row_losses(IDS.view(1, -1), labels.view(1, -1), cu_seqlens=bounds)
    else:
        losses, counts = model.row_losses(IDS, labels)
    assert counts.tolist() == [11, 4, 11]
    # fp32; products over more rows may sum in another order
    assert torch.allclose(losses, alone, rtol=1e-5)
    loss, count = model.loss(IDS, labels)
    assert count == 26
    assert losses.sum().item() == pytest.approx(loss.item(), rel=1e-5)
