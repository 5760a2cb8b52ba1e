"""Cross-entropy with and without its head, against fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit import kernels
from lorakit.kernels.ops.cross_entropy import linear


@settings(max_examples=25)
@given(
    st.integers(1, 40),
    st.integers(2, 300),
    st.floats(0, 1),
    st.integers(0, 1000),
    st.booleans(),
    st.none() | st.floats(0.5, 30),
)
def test_linear_cross_entropy(rows, vocab, ignored, seed, small_chunks, softcap):
    """sum over labels of logsumexp(z) - z[label], and its gradients, against fp64; z = h W^T, or
    c tanh(h W^T / c).
    """
    torch.manual_seed(seed)
    hidden, weight = torch.randn(rows, 16), torch.randn(vocab, 16)
    labels = torch.randint(vocab, (rows,)).masked_fill(torch.rand(rows) < ignored, -100)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        if small_chunks:  # several chunks
            patch.setattr(linear, "CHUNK_BYTES", 4 * 3 * vocab)
            patch.setattr(linear, "FEWEST", 1)
        total, count = kernels.linear_cross_entropy(h, w, labels, softcap=softcap)
        (total * 0.5).backward()

    H, W = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = H @ W.t() if softcap is None else softcap * torch.tanh(H @ W.t() / softcap)
    truth = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    (truth * 0.5).backward()
    assert count == (labels != -100).sum()
    # fp32 sums of at most 300 terms: 1e-5 relative to the largest
    for ours, theirs in ((total, truth), (h.grad, H.grad), (w.grad, W.grad)):
        assert (ours - theirs).abs().max() <= 1e-5 * (1 + theirs.abs().max())
    plain, same_count = kernels.cross_entropy(hidden @ weight.t(), labels, softcap=softcap)
    assert same_count == count
    assert abs(plain - truth) <= 1e-5 * (1 + truth.abs())


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(2, 50), st.booleans(), st.booleans(), st.integers(0, 99))
def test_linear_cross_entropy_of_an_adapted_head(rows, vocab, small_chunks, packed, seed):
    """z = h (W + s B A)^T: the loss and all gradients against fp64."""
    torch.manual_seed(seed)
    hidden, dense = torch.randn(rows, 64), torch.randn(vocab, 64)
    weight = kernels.quantize_nf4(dense) if packed else dense
    dense = kernels.dequantize_nf4(weight) if packed else dense
    A, B = torch.randn(3, 64), torch.randn(vocab, 3)
    labels = torch.randint(vocab, (rows,)).masked_fill(torch.rand(rows) < 0.3, -100)
    ours = [t.clone().requires_grad_() for t in (hidden, A, B)]
    with pytest.MonkeyPatch.context() as patch:
        if small_chunks:
            patch.setattr(linear, "CHUNK_BYTES", 4 * 3 * vocab)
            patch.setattr(linear, "FEWEST", 1)
        total, _ = kernels.linear_cross_entropy(ours[0], weight, labels, lora=(*ours[1:], 0.7))
        (total * 0.5).backward()
        with torch.no_grad():
            again, _ = kernels.linear_cross_entropy(ours[0], weight, labels, lora=(*ours[1:], 0.7))
    exact = [t.double().requires_grad_() for t in (hidden, A, B)]
    logits = exact[0] @ (dense.double() + 0.7 * exact[2] @ exact[1]).t()
    truth = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    (truth * 0.5).backward()
    assert torch.equal(again, total)
    # fp32 sums of at most 64 terms: 1e-5 relative to the largest
    for mine, theirs in (
        (total, truth),
        *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True)),
    ):
        assert (mine - theirs).abs().max() <= 1e-5 * (1 + theirs.abs().max())


def test_linear_cross_entropy_divided_by_the_labels():
    """1 / n is not rounded to the dtype of the hidden states: in bf16 1 / 3 is off by 0.2 %."""
    torch.manual_seed(0)
    hidden = torch.randn(3, 64).bfloat16().requires_grad_()
    weight, labels = torch.randn(50, 64).bfloat16(), torch.tensor([1, 2, 3])
    total, n = kernels.linear_cross_entropy(hidden, weight, labels)
    (summed,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (mean,) = torch.autograd.grad(total / n, hidden)
    # the roundings of 192 values to bf16 average out, to some 1e-4
    assert abs(3 * mean.double().norm() / summed.double().norm() - 1) < 5e-4


def test_linear_cross_entropy_leaves_a_frozen_head_alone():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8)
    total, _ = kernels.linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3, 4]))
    total.backward()
    assert weight.grad is None
    with torch.no_grad():
        again, _ = kernels.linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3, 4]))
    assert torch.equal(again, total)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_token_cross_entropy(backend, softcap):
    """Each token has its loss, and a gradient of its own size, against fp64."""
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 300) * 3, torch.randint(300, (7,))
    weights = torch.linspace(-1, 2, 7)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with kernels.use_backend(backend):
        found = kernels.token_cross_entropy(ours, labels, softcap=softcap)
        (found * weights).sum().backward()
    capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    truth = torch.nn.functional.cross_entropy(capped, labels, reduction="none")
    (truth * weights).sum().backward()
    # fp32 exponentials and a sum of 300 of them
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def told_of(logits, labels):
    """What the op tells, by its definition in fp64."""
    counted = labels != -100
    logits = logits[counted].double()
    right = (logits.argmax(-1) == labels[counted]).sum()  # the first of equals
    return right.item(), torch.distributions.Categorical(logits=logits).entropy().sum().item()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("V", "scale"), [(1, 1), (7, 3), (300, 0.1), (9001, 5), (9001, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_and_entropy(backend, V, scale, dtype):
    """They are added to what is there, and change no bit of the loss or the gradient."""
    torch.manual_seed(V)
    logits = (torch.randn(40, V) * scale).to(dtype)
    labels = torch.where(torch.rand(40) < 0.5, logits.argmax(-1), torch.randint(V, (40,)))
    labels[::7] = -100
    if V > 9:  # equals: at some places the first is the label, at others a later one
        first = torch.randint(V // 2, (40,))
        logits[torch.arange(40), first] = logits[torch.arange(40), first + V // 2] = 50
        labels[1::7], labels[2::7] = first[1::7], first[2::7] + V // 2
    found = []
    for told in (None, torch.tensor([1.0, 2.0])):
        leaf = logits.clone().requires_grad_()
        with kernels.use_backend(backend):
            loss, _ = kernels.cross_entropy(leaf, labels, statistics=told)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    right, entropy = told_of(logits, labels)
    assert told[0] == 1 + right
    # 34 entropies of at most log V, each of some units of fp32
    assert told[1].item() == pytest.approx(2 + entropy, rel=2e-6, abs=2e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_accuracy_and_entropy_of_a_head_in_chunks(backend, monkeypatch):
    """A soft cap, words that are ruled out, and what has gradients or none."""
    monkeypatch.setattr(linear, "FEWEST", 2)
    monkeypatch.setattr(linear, "CHUNK_BYTES", 2 * 33 * 4)
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 4), torch.randn(33, 4)
    labels = torch.tensor([3, -100, 5, 1, 2, -100, 32, 0, 8])
    truth = told_of(5 * torch.tanh(hidden @ weight.t() / 5), labels)
    for needs in (True, False):
        told = torch.zeros(2)
        with kernels.use_backend(backend):
            kernels.linear_cross_entropy(
                hidden.requires_grad_(needs), weight, labels, softcap=5.0, statistics=told
            )
        assert told.tolist() == pytest.approx(truth, rel=1e-6)
    ruled_out = torch.tensor([[0.0, float("-inf"), 0.0]])
    told = torch.zeros(2)
    with kernels.use_backend(backend):
        kernels.cross_entropy(ruled_out, torch.tensor([2]), statistics=told)
    assert told.tolist() == pytest.approx([0, torch.tensor(2.0).log().item()])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_accuracy_and_entropy_are_trls(softcap):
    """TRL's SFTTrainer computes its metrics with this function; some words are equals."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    torch.manual_seed(1)
    hidden, weight = torch.randn(50, 8), torch.randn(77, 8)
    weight[40:60] = weight[20:40]
    labels = (hidden @ weight.t()).argmax(-1)
    labels[:10], labels[10:15] = torch.randint(77, (10,)), labels[10:15] + 20
    labels.clamp_(max=76)
    _, entropy, _, _, right = ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, 32, softcap
    )
    told = torch.zeros(2)
    kernels.linear_cross_entropy(hidden, weight, labels, softcap=softcap, statistics=told)
    assert told[0] == right.sum()
    # both in fp32, sums of 50 entropies
    assert told[1].item() == pytest.approx(entropy.sum().item(), rel=1e-6)
