"""The gated delta rule and its convolution: against the recurrence in fp64, and transformers'."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_5 import modeling_qwen3_5 as published

from lorakit import kernels
from tests.allocations import counted
from tests.exact import value_and_grads
from tests.instruction_sets import ISAS, on_cpu


@contextlib.contextmanager
def on(backend):
    """Ops run the reference, or the C++ kernels for an instruction set."""
    with kernels.use_backend("reference") if backend == "reference" else on_cpu(backend):
        yield


@pytest.fixture(params=["reference", *ISAS])
def backend(request):
    with on(request.param):
        yield request.param


def inputs(B=2, T=70, nk=2, nv=4, dk=16, dv=24, dtype=torch.float32, gates="random"):
    """q, k, v, g and beta as a layer makes them; `gates` is how the decays are."""
    torch.manual_seed(T)
    q, k = torch.randn(2, B, T, nk, dk).to(dtype)
    v, beta = torch.randn(B, T, nv, dv).to(dtype), torch.rand(B, T, nv).to(dtype)
    g = -torch.rand(B, T, nv) * 2
    if gates == "open":  # nothing is forgotten
        g = g * 1e-6
    elif gates == "mixed":  # all is forgotten now and then
        g = torch.where(torch.rand(B, T, nv) < 0.1, torch.tensor(-60.0), g * 1e-2)
    return q, k, v, g, beta


def recurrence(q, k, v, g, beta, state=None):
    """The rule token by token, in the dtype of the inputs: o and the last state."""

    def unit(x):
        return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()

    group = v.shape[2] // q.shape[2]
    q, k = unit(q).repeat_interleave(group, 2) * q.shape[-1] ** -0.5, unit(k)
    k = k.repeat_interleave(group, 2)
    S = v.new_zeros(*v.shape[:1], v.shape[2], q.shape[-1], v.shape[-1])
    S = S if state is None else state.to(v.dtype)
    out = []
    for t in range(q.shape[1]):
        S = S * g[:, t, :, None, None].exp()
        read = torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        d = beta[:, t, :, None] * (v[:, t] - read)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], d)
        out.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(out, 1), S


def as_double(given):
    return [x.double() for x in given]


def by_transformers(q, k, v, g, beta):
    return published.torch_chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]


@functools.cache
def known(dtype, gates):
    """Inputs, what transformers makes of them, and the truth: values and all gradients."""
    given = inputs(dtype=dtype, gates=gates)
    grad = torch.randn_like(given[2])
    theirs = value_and_grads(by_transformers, given, grad)
    truth = value_and_grads(lambda *x: recurrence(*x)[0], as_double(given), grad.double())
    return given, grad, theirs, truth


def within_budget(ours, theirs, truth):
    """Twice the error of others in the same dtype, and 4 roundings of the largest value, since the
    scalar code rounds products before it adds them.
    """
    for y, same, exact in zip(ours, theirs, truth, strict=True):
        rounding = 4 * torch.finfo(y.dtype).eps * exact.abs().max()
        assert (y.double() - exact).abs().max() <= 2 * (same - exact).abs().max() + rounding


@pytest.mark.parametrize("gates", ["random", "open", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_no_larger_than_that_of_transformers(backend, dtype, gates):
    """transformers computes in fp32 inside too."""
    given, grad, theirs, truth = known(dtype, gates)
    within_budget(value_and_grads(kernels.gated_delta_net, given, grad), theirs, truth)


def test_gates_of_all_sizes_in_a_chunk_lose_no_digits(backend):
    """Sums of gates in fp32, as transformers has them, would carry -60 into all that follows."""
    given, grad, _, truth = known(torch.float32, "mixed")
    o, *grads = value_and_grads(kernels.gated_delta_net, given, grad)
    for y, exact in zip((o, *grads), truth, strict=True):
        assert (y.double() - exact).abs().max() <= 2e-6 * exact.abs().max()  # 16 roundings


@settings(max_examples=15)
@given(
    T=st.integers(1, 140),
    heads=st.sampled_from([(1, 1), (2, 2), (1, 3), (2, 4)]),
    sizes=st.sampled_from([(8, 8), (8, 24), (20, 4)]),
    gates=st.sampled_from(["random", "open", "mixed"]),
)
def test_any_sizes(T, heads, sizes, gates):
    """The chunks are the recurrence, but for roundings in sums of 140 terms below 1."""
    given = inputs(1, T, *heads, *sizes, gates=gates)
    truth, state = recurrence(*as_double(given))
    with kernels.use_backend("reference"):
        wide, wide_state = kernels.gated_delta_net(*as_double(given), with_state=True)
    torch.testing.assert_close(wide, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(wide_state, state, rtol=0, atol=1e-12)
    with on(ISAS[-1] if ISAS else "reference"):
        o, last = kernels.gated_delta_net(*given, with_state=True)
    torch.testing.assert_close(o.double(), truth, rtol=0, atol=5e-6)
    torch.testing.assert_close(last.double(), state, rtol=0, atol=5e-6)


def test_finite_differences():
    """The reference in fp64, through two chunks, for the gradients of everything."""
    given = [x.requires_grad_() for x in as_double(inputs(1, 66, 1, 2, 2, 3))]
    with kernels.use_backend("reference"):
        assert torch.autograd.gradcheck(kernels.gated_delta_net, given, fast_mode=True)


def test_a_state_is_carried_from_call_to_call(backend):
    """A row in three calls, the last of one token, is the row in one."""
    given = inputs()
    whole, last = kernels.gated_delta_net(*given, with_state=True)
    state, parts = None, []
    for part in zip(*(x.split([10, 59, 1], dim=1) for x in given), strict=True):
        o, state = kernels.gated_delta_net(*part, state=state, with_state=True)
        parts.append(o)
    # other chunks: sums of 16 and 70 terms near 1 in another order
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-6)
    torch.testing.assert_close(state, last, rtol=0, atol=2e-6)
    truth, _ = recurrence(*as_double(given))
    torch.testing.assert_close(torch.cat(parts, 1).double(), truth, rtol=0, atol=2e-6)


def test_no_bit_of_a_document_depends_on_its_neighbours(backend):
    lengths = [3, 0, 65, 1, 40]
    given = inputs(1, sum(lengths))
    grad = torch.randn_like(given[2])
    packed = value_and_grads(
        lambda *x: kernels.gated_delta_net(*x, lengths=kernels.Documents(lengths)), given, grad
    )
    parts = [x.split(lengths, dim=1) for x in (*given, grad)]
    for i, length in enumerate(lengths):
        if not length:
            continue
        *alone, dy = (x[i] for x in parts)
        found = value_and_grads(kernels.gated_delta_net, alone, dy)
        start = sum(lengths[:i])
        for whole, part in zip(packed, found, strict=True):
            assert torch.equal(whole[:, start : start + length], part)


def parts(both, g, beta):
    """q, k and v are parts of one projection."""
    q, k, v = both.split([16, 16, 24], dim=2)
    return q.unflatten(2, (1, 16)), k.unflatten(2, (1, 16)), v.unflatten(2, (2, 12)), g, beta


@functools.cache
def known_after_a_state():
    """Inputs, what the reference makes of them, and the truth."""
    torch.manual_seed(0)
    both, state = torch.randn(2, 270, 16 + 16 + 24), torch.randn(2, 2, 16, 12)
    given = both, -torch.rand(2, 270, 2), torch.rand(2, 270, 2)
    grad = torch.randn(2, 270, 2, 12)
    with kernels.use_backend("reference"):
        same = value_and_grads(lambda *x: after_a_state(state, *x), given, grad)
    truth = value_and_grads(
        lambda *x: recurrence(*parts(*x), state)[0], as_double(given), grad.double()
    )
    return given, state, grad, same, truth


def after_a_state(state, *x):
    return kernels.gated_delta_net(*parts(*x), state=state)


def test_the_gradients_after_a_state(backend):
    """Two spans of the C++ kernels' chunks, of which the second begins with a kept state."""
    given, state, grad, same, truth = known_after_a_state()
    found = value_and_grads(lambda *x: after_a_state(state, *x), given, grad)
    within_budget(found, same, truth)


@pytest.mark.parametrize("T", [1, 5, 33])
def test_what_memory_held_before_is_read_nowhere(backend, T):
    """New memory is NaN here, as it may be at any time."""
    given = inputs(B=1, T=T)
    grad = torch.randn_like(given[2])
    expected = value_and_grads(kernels.gated_delta_net, given, grad)
    torch.use_deterministic_algorithms(True)
    try:
        found = value_and_grads(kernels.gated_delta_net, given, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_padding_on_the_left_leaves_the_state_zero(backend):
    """The convolution of zeros is zero, and a key and value of zero write nothing."""
    q, k, v, g, beta = inputs(1, 20)
    padded = [F.pad(x, (0,) * (2 * x.dim() - 4) + (70, 0)) for x in (q, k, v, g, beta)]
    padded[3][:, :70], padded[4][:, :70] = -0.5, 0.5
    o, last = kernels.gated_delta_net(*padded, with_state=True)
    alone, state = kernels.gated_delta_net(q, k, v, g, beta, with_state=True)
    assert not o[:, :70].any()
    torch.testing.assert_close(o[:, 70:], alone, rtol=0, atol=2e-6)  # other chunks
    torch.testing.assert_close(last, state, rtol=0, atol=2e-6)


@pytest.mark.parametrize("gate", [-60.0, -1e-9])
def test_a_long_row_overflows_nowhere(gate):
    q, k, v, _, beta = inputs(1, 4096, 1, 1, 8, 8)
    given = q, k, v, torch.full(beta.shape, gate), beta
    for x in value_and_grads(kernels.gated_delta_net, given, torch.ones_like(v)):
        assert x.isfinite().all()


def test_memory_grows_with_the_tokens_alone(backend):
    """Twice the tokens take twice the memory, forward and backward: no T x T, and few states."""

    def peak(T):
        given = inputs(1, T, 1, 2, 64, 64)
        ones = torch.ones_like(given[2])
        return counted(lambda: value_and_grads(kernels.gated_delta_net, given, ones))[0]

    peak(64)  # workspaces, once
    assert peak(1024) <= 2.02 * peak(512)  # some small tensors do not grow
    states_of_tokens = 1024 * 2 * 64 * 64 * 4
    assert peak(1024) < states_of_tokens / 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lengths": [3, 3]}, "do not add up to one row"),
        ({"lengths": [6, -1]}, "do not add up to one row"),
        ({"lengths": [5], "state": torch.zeros(1, 4, 16, 24)}, "give lengths or a state"),
        ({"lengths": [5], "with_state": True}, "have no common state"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        kernels.gated_delta_net(*inputs(1, 5), **options)


def test_shapes_that_do_not_go_together_are_refused():
    q, k, v, g, beta = inputs(1, 5)
    for wrong in [(q, k[:, :4], v, g, beta), (q, k, v[:, :, :3], g, beta), (q, k, v, g, beta[0])]:
        with pytest.raises(ValueError, match="do not go together"):
            kernels.gated_delta_net(*wrong)


# ---- the convolution ----


ULPS = 2e-6  # of values up to 4: torch's SiLU takes the last values of a tensor another way


def convolved(x, weight, state=None):
    """torch's own convolution, over zeros or a state and the row."""
    K = weight.shape[1]
    before = x.new_zeros(len(x), K - 1, x.shape[2]) if state is None else state.to(x.dtype)
    rows = torch.cat([before, x], 1).transpose(1, 2)
    return F.silu(F.conv1d(rows, weight[:, None], groups=len(weight)).transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "C", "K"), [(1, 5, 4), (2, 33, 4), (70, 96, 4), (9, 16, 2)])
def test_the_convolution(backend, dtype, T, C, K):
    """The error is within that of torch's, which rounds the sum and its SiLU."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, T, C).to(dtype), torch.randn(C, K).to(dtype)
    grad = torch.randn(2, T, C).to(dtype)
    ours = value_and_grads(kernels.causal_conv, (x, weight), grad)
    theirs = value_and_grads(convolved, (x, weight), grad)
    truth = value_and_grads(convolved, (x.double(), weight.double()), grad.double())
    within_budget(ours, theirs, truth)
    frozen = value_and_grads(lambda x: kernels.causal_conv(x, weight), [x], grad)
    within_budget(frozen, theirs[:2], truth[:2])


def test_the_convolution_goes_on_where_it_stopped(backend):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 12, 6), torch.randn(6, 4)
    whole, state = kernels.causal_conv(x, weight), torch.zeros(2, 3, 6)
    for t, length in [(0, 2), (2, 1), (3, 9)]:
        part = x[:, t : t + length]
        y = kernels.causal_conv(part, weight, state=state)
        torch.testing.assert_close(y, whole[:, t : t + length], rtol=0, atol=ULPS)
        state = torch.cat([state, part], 1)[:, -3:]


def test_the_convolution_of_documents(backend):
    """Each has what it has alone, in both directions."""
    torch.manual_seed(0)
    lengths = [3, 0, 1, 40, 2]
    x, weight, grad = torch.randn(1, 46, 20), torch.randn(20, 4), torch.randn(1, 46, 20)
    packed = value_and_grads(lambda x: kernels.causal_conv(x, weight, lengths=lengths), [x], grad)
    parts = [
        value_and_grads(lambda x: kernels.causal_conv(x, weight), [part], dy)
        for part, dy in zip(x.split(lengths, 1), grad.split(lengths, 1), strict=True)
    ]
    for whole, alone in zip(packed, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(alone, 1), rtol=0, atol=ULPS)


def test_the_convolution_refuses_a_state_of_documents():
    with pytest.raises(ValueError, match="give lengths or a state"):
        kernels.causal_conv(
            torch.zeros(1, 2, 6), torch.zeros(6, 4), state=torch.zeros(1, 3, 6), lengths=[2]
        )
