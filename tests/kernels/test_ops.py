"""The small ops against fp64: |op - fp64| <= 2 |torch in the same dtype - fp64| + one rounding."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit import kernels
from lorakit.kernels.ops.cross_entropy import linear


def within_budget(ours, same_dtype, truth):
    """The error budget of an op that should be as good as torch in the same dtype."""
    eps = torch.finfo(ours.dtype).eps
    allowed = 2 * (same_dtype.double() - truth).abs().max() + eps * truth.abs().max()
    assert (ours.double() - truth).abs().max() <= allowed


def value_and_grads(f, inputs, grad):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = f(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 33, 576])
@pytest.mark.parametrize(("offset", "casting_mode"), [(0.0, "llama"), (1.0, "gemma")])
def test_rms_norm(dtype, width, offset, casting_mode):
    torch.manual_seed(0)
    x, w = torch.randn(4, 5, width).to(dtype), torch.randn(width).to(dtype)
    grad = torch.randn(4, 5, width).to(dtype)
    options = {"weight_offset": offset, "casting_mode": casting_mode}
    ours = value_and_grads(lambda x, w: kernels.rms_norm(x, w, 1e-5, **options), (x, w), grad)

    def by_torch(x, w):
        return F.rms_norm(x, (width,), offset + w, 1e-5)

    same = value_and_grads(by_torch, (x, w), grad)
    truth = value_and_grads(by_torch, (x.double(), w.double()), grad.double())
    for triple in zip(ours, same, truth, strict=True):
        within_budget(*triple)
    if casting_mode == "gemma" and dtype == torch.bfloat16:
        # fp32 inside and one rounding: only a tie may fall the other way
        assert (ours[0] != truth[0].to(dtype)).float().mean() <= 0.01


def test_rope_turns_each_pair_by_its_angle():
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    angles = torch.randn(2, 5, 4)
    for x, out in zip((q, k), kernels.rope(q, k, angles.cos(), angles.sin()), strict=True):
        # a rotation in the plane of (x_j, x_{j+D/2}) is a product with e^{i angle}
        pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, :, None]
        truth = torch.cat([turned.real, turned.imag], -1)
        assert (out - truth).abs().max() < 1e-6  # a few roundings of values near 1


def test_rope_keeps_scores_relative():
    """The score of q at s and k at t depends on s - t only."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 16).double()
    freqs = torch.rand(8).double()

    def score(s, t):
        tables = lambda p: ((p * freqs).cos()[None, None], (p * freqs).sin()[None, None])  # noqa: E731
        a, _ = kernels.rope(q, k, *tables(s))
        _, b = kernels.rope(q, k, *tables(t))
        return (a * b).sum()

    assert abs(score(9, 4) - score(25, 20)) < 1e-5  # rotated in fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype):
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(7, 33).to(dtype) for _ in range(3))
    ours = value_and_grads(kernels.swiglu, (gate, up), grad)

    def by_torch(gate, up):
        return gate * torch.sigmoid(gate) * up

    same = value_and_grads(by_torch, (gate, up), grad)
    wide = value_and_grads(by_torch, (gate.double(), up.double()), grad.double())
    for triple in zip(ours, same, wide, strict=True):
        within_budget(*triple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_geglu(dtype, approximate):
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(7, 33).to(dtype) for _ in range(3))
    ours = value_and_grads(
        lambda gate, up: kernels.geglu(gate, up, approximate=approximate), (gate, up), grad
    )

    def spelled_out(gate, up):
        if approximate == "none":
            return gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up
        inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + torch.tanh(inner)) * up

    same = value_and_grads(spelled_out, (gate, up), grad)
    wide = value_and_grads(spelled_out, (gate.double(), up.double()), grad.double())
    for triple in zip(ours, same, wide, strict=True):
        within_budget(*triple)


def attention_in_double(q, k, v, mask, scale, softcap):
    """The formula, with every score."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    group=st.sampled_from([1, 3]),
    window=st.none() | st.integers(1, 14),
    softcap=st.none() | st.floats(0.3, 5),
    kind=st.sampled_from(["causal", "masked", "packed"]),
)
def test_attention(lengths, group, window, softcap, kind):
    """Position i sees position j of its own document with i - window < j <= i, and no other; values
    and gradients are those of the formula in fp64.
    """
    torch.manual_seed(sum(lengths))
    T, scale = sum(lengths), 0.4
    packed = kind == "packed"
    B = 1 if packed else 2
    q = torch.randn(B, T, 2 * group, 8)
    k, v = torch.randn(B, T, 2, 8), torch.randn(B, T, 2, 8)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    i, j = torch.arange(T)[:, None], torch.arange(T)
    mask = j <= i
    options = {"scale": scale, "softcap": softcap}
    if kind != "causal" and window is not None:
        mask = mask & (j > i - window)
    if packed:
        mask = mask & (document[:, None] == document)
        options |= {"lengths": lengths, "window": window}
    elif kind == "masked":
        options["mask"] = mask
    grad = torch.randn_like(q)
    ours = value_and_grads(lambda *x: kernels.attention(*x, **options), (q, k, v), grad)

    def truth(*x):
        return attention_in_double(*x, mask, scale, softcap)

    wide = value_and_grads(truth, (q.double(), k.double(), v.double()), grad.double())
    for a, b in zip(ours, wide, strict=True):
        assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())  # fp32 sums of at most 48 terms


def test_soft_capped_attention_in_chunks(monkeypatch):
    """Chunks of query rows, computed again for backward, change nothing but the order of sums."""
    from lorakit.kernels.ops.attention import reference

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 40, 4, 8), torch.randn(2, 40, 2, 8), torch.randn(2, 40, 2, 8)
    grad = torch.randn_like(q)
    found = []
    for chunk in (512, 7):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        found.append(
            value_and_grads(lambda *x: kernels.attention(*x, softcap=2.0), (q, k, v), grad)
        )
    for whole, pieces in zip(*found, strict=True):  # gradients near 1, sums of 40 terms in fp32
        assert (whole - pieces).abs().max() <= 1e-5


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
