"""How an adapter starts, against PEFT's own functions and the definitions in fp64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from lorakit.adapters.initialize import from_weight, initial, needs_weight, subspace_svd
from lorakit.config.adapters import INITIALIZATIONS, check_initialization
from lorakit.config.errors import LorakitError


def matrix(rows, columns, seed=0, decay=0.9):
    """Random, with singular values decay^i: apart from each other, so that vectors are unique."""
    g = torch.Generator().manual_seed(seed)
    k = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, k, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(columns, k, generator=g, dtype=torch.float64)).Q
    return ((U * decay ** torch.arange(k, dtype=torch.float64)) @ V.t()).float()


def peft_layer(W, r, alpha):
    """PEFT's layer around W with a default adapter, whose *_init methods can be called."""
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    linear.weight.data = W.clone()
    model = get_peft_model(
        nn.Sequential(linear), LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"])
    )
    return model.base_model.model[0]


def peft_start(W, r, alpha, start):
    """A, B and what is left of W after `start(layer)` with torch's generator at seed 5."""
    layer = peft_layer(W, r, alpha)
    torch.manual_seed(5)
    start(layer)
    A, B = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    return A, B, layer.base_layer.weight.data


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def assert_equal_up_to_signs(A, B, A2, B2):
    """Each row of A with its column of B may be negated. 1e-5: a singular vector moves by fp32's
    6e-8 over the gap between neighbours, here a tenth of the value or more."""
    signs = (A * A2).sum(1).sign()
    assert relative(signs[:, None] * A, A2) < 1e-5
    assert relative(B * signs, B2) < 1e-5


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_0", "pissa_niter_4", "olora"])
def test_from_the_weight_equals_peft(kind, shape):
    W, r, alpha = matrix(*shape), 6, 15

    def start(layer):
        if kind == "olora":
            layer.olora_init("default")
        else:
            layer.pissa_init("default", kind)

    A2, B2, left = peft_start(W, r, alpha, start)
    torch.manual_seed(5)
    A, B = from_weight(kind, W, r, alpha / r)
    assert A.dtype == B.dtype == torch.float32
    assert A.shape == (r, shape[1])
    assert B.shape == (shape[0], r)
    assert_equal_up_to_signs(A, B, A2, B2)
    assert relative(alpha / r * B @ A, alpha / r * B2 @ A2) < 1e-5
    # what PEFT leaves in the layer is W less this product; 1e-6 of W is some fp32 roundings
    assert (W - alpha / r * B @ A - left).norm() < 1e-6 * W.norm()


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_3", "olora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_dtype_is_computed_in_fp32(kind, dtype):
    W = matrix(20, 30).to(dtype)
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    A, B = from_weight(kind, W, 4, 2.0, generator=draws[0])
    A2, B2 = from_weight(kind, W.float(), 4, 2.0, generator=draws[1])
    assert torch.equal(A, A2)
    assert torch.equal(B, B2)


def test_the_weight_stays_as_it_was():
    W = nn.Parameter(matrix(12, 10))
    before = W.detach().clone()
    for kind in ("pissa", "pissa_niter_2", "olora"):
        A, B = from_weight(kind, W, 3, 1.0)
        assert not A.requires_grad
        assert not B.requires_grad
        A.fill_(7), B.fill_(7)
    assert torch.equal(W, before)


sizes = st.integers(1, 24)


@given(sizes, sizes, st.data(), st.floats(0.05, 20))
def test_pissa_takes_out_the_best_approximation(rows, columns, data, scaling):
    """What is left has the singular values that were not taken (Eckart and Young), in fp64."""
    r = data.draw(st.integers(1, min(rows, columns)))
    W = matrix(rows, columns, seed=rows * 25 + columns)
    A, B = from_weight("pissa", W, r, scaling)
    left = W.double() - scaling * B.double() @ A.double()
    tail = torch.linalg.svdvals(W.double())[r:]
    # 1e-5 of the largest value, 1: fp32 in the decomposition of at most 24 columns
    assert torch.linalg.matrix_norm(left).item() == pytest.approx(tail.norm().item(), abs=1e-5)
    # both sides share the size: training moves both by the same
    assert torch.allclose(A.norm(dim=1), B.norm(dim=0), rtol=1e-4, atol=1e-6)


@given(sizes, sizes, st.data())
def test_olora_is_the_start_of_qr(rows, columns, data):
    r = data.draw(st.integers(1, min(rows, columns)))
    W = matrix(rows, columns, seed=rows * 25 + columns)
    A, B = (t.double() for t in from_weight("olora", W, r, 3.0))
    # orthonormal, upper triangular, and exact on the first r columns, to fp32's roundings
    assert torch.allclose(B.t() @ B, torch.eye(r, dtype=torch.float64), atol=1e-5)
    assert torch.equal(A[:, :r], A[:, :r].triu())
    assert torch.allclose((B @ A)[:, :r], W[:, :r].double(), atol=1e-5)


@given(st.integers(2, 40), st.integers(2, 40), st.data(), st.sampled_from([0, 3, 60]))
def test_subspace_iteration(rows, columns, data, iterations):
    """A projection of W whatever the start; the best one after enough iterations."""
    k = data.draw(st.integers(1, min(rows, columns)))
    width = data.draw(st.integers(k, 2 * k))
    g = torch.Generator().manual_seed(0)
    W = matrix(rows, columns, decay=0.7).double()
    U, S, Vt = subspace_svd(W, k, width=width, iterations=iterations, generator=g)
    values, eye = torch.linalg.svdvals(W), torch.eye(k, dtype=torch.float64)
    low = (U * S) @ Vt
    assert U.shape == (rows, k)
    assert Vt.shape == (k, columns)
    # 1e-12: fp64's roundings in matrices of at most 40 columns
    assert torch.allclose(U.t() @ U, eye, atol=1e-12)
    assert torch.allclose(Vt @ Vt.t(), eye, atol=1e-12)
    assert (values[:k] + 1e-12 >= S).all()
    left = (W - low).norm()
    assert left**2 == pytest.approx((W.norm() ** 2 - S.square().sum()).item(), abs=1e-12)
    if iterations == 60:
        # 0.7^(2 * 60) = 3e-19 is left of a wrong direction, a start a millionth right or more
        assert left <= (1 + 1e-6) * values[k:].norm() + 1e-12
    # a matrix of rank k is in the span of k random products with it, whatever the iterations: the
    # smallest direction is 0.7^40 = 6e-7 of the largest, ten thousand times above the tolerance
    U, S, Vt = subspace_svd(low, k, width=width, iterations=iterations, generator=g)
    assert (low - (U * S) @ Vt).norm() < 1e-10


def test_more_iterations_come_closer_to_pissa():
    W = matrix(64, 48, decay=0.97)
    best = torch.linalg.svdvals(W.double())[8:].norm()
    errors = []
    for kind in ("pissa_niter_0", "pissa_niter_2", "pissa_niter_16"):
        A, B = from_weight(kind, W, 8, 1.0, generator=torch.Generator().manual_seed(0))
        errors.append(((W - B @ A).double().norm() / best).item())
    assert errors[0] > errors[1] > errors[2] > 1 - 1e-5  # fp32
    assert errors[2] < 1.01  # 0.25 percent measured: neighbours are 3 percent apart


# ---- without a weight ----


def test_true_is_peft_default():
    """PEFT draws by kaiming_uniform_(a=sqrt(5)), whose bound is 1/sqrt(in) up to fp64 rounding."""
    W = torch.zeros(12, 20)
    A2, B2, _ = peft_start(W, 6, 6, lambda layer: layer.reset_lora_parameters("default", True))
    A, B = initial(True, 20, 12, 6, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(A, A2, rtol=1e-6, atol=1e-9)  # one rounding of the bound
    assert torch.equal(B, B2)
    assert not B.any()


def test_gaussian_is_peft_gaussian():
    W = torch.zeros(12, 20)
    A2, B2, _ = peft_start(
        W, 6, 6, lambda layer: layer.reset_lora_parameters("default", "gaussian")
    )
    torch.manual_seed(5)
    A, B = initial("gaussian", 20, 12, 6)
    assert torch.equal(A, A2)
    assert torch.equal(B, B2)


def test_orthogonal_is_peft_orthogonal():
    W = torch.zeros(12, 20)
    A2, B2, _ = peft_start(W, 6, 6, lambda layer: layer.orthogonal_init("default"))
    torch.manual_seed(5)
    A, B = initial("orthogonal", 20, 12, 6)
    # the same draws and products: only their order of summation may differ
    torch.testing.assert_close(A, A2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(B, B2, rtol=1e-5, atol=1e-6)


def test_false_is_two_linear_layers():
    """PEFT leaves both as nn.Linear made them: A of `in` inputs, B of r."""
    torch.manual_seed(5)
    A2, B2 = nn.Linear(20, 6, bias=False).weight, nn.Linear(6, 12, bias=False).weight
    torch.manual_seed(5)
    A, B = initial(False, 20, 12, 6)
    torch.testing.assert_close(A, A2.data, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(B, B2.data, rtol=1e-6, atol=1e-9)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 16))
def test_orthogonal_starts_at_zero(fan_in, fan_out, half):
    A, B = initial("orthogonal", fan_in, fan_out, 2 * half)
    # sums of r products of size |A_row| |B_column|, of which fp32 keeps 6e-8
    assert (B @ A).abs().max() <= 1e-5 * A.norm() * B.norm()
    assert A.any()
    assert B.any()


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 16))
def test_every_kind_that_changes_nothing(fan_in, fan_out, r):
    for kind in (True, "gaussian", "loftq", "eva"):
        A, B = initial(kind, fan_in, fan_out, r)
        assert A.shape == (r, fan_in)
        assert A.dtype == B.dtype == torch.float32
        assert torch.equal(B, torch.zeros(fan_out, r))
        if kind != "gaussian":
            assert A.abs().max() <= 1 / math.sqrt(fan_in) * (1 + 1e-6)  # fp32 of the bound


def test_the_deviation_of_gaussian():
    A, _ = initial("gaussian", 10000, 1, 8, generator=torch.Generator().manual_seed(0))
    # 80,000 draws: their deviation is known to 1/sqrt(160,000) = 0.25 percent, here four times
    assert A.std().item() == pytest.approx(1 / 8, rel=0.01)


def test_a_generator_is_all_that_moves():
    state = torch.get_rng_state()
    for kind in (True, False, "gaussian", "orthogonal"):
        pairs = [
            initial(kind, 9, 7, 4, generator=torch.Generator().manual_seed(3)) for _ in range(2)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
    from_weight("pissa_niter_2", matrix(9, 7), 3, 1.0, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_fp32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        for kind in (True, False, "gaussian", "orthogonal"):
            assert {t.dtype for t in initial(kind, 9, 7, 4)} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


# ---- names and refusals ----


def test_names():
    valid = [kind for kind in INITIALIZATIONS if kind != "pissa_niter_N"]
    for kind in (True, False, *valid, "pissa_niter_0", "pissa_niter_16"):
        check_initialization(kind)
    weights = [kind for kind in INITIALIZATIONS if needs_weight(kind)]
    assert weights == ["pissa", "pissa_niter_N", "olora"]
    assert not needs_weight(True)
    for wrong, hint in [
        ("gausian", "(did you mean 'gaussian'?)"),
        ("pisa", "(did you mean 'pissa'?)"),
        ("pissa_niter_N", ""),
        ("pissa_niter_x", "(did you mean 'pissa_niter_N'?)"),
        ("pissa_niter_-1", "(did you mean 'pissa_niter_N'?)"),
        ("pissa_niter_4\n", ""),
        ("OLoRA", ""),
        (None, ""),
        (1, ""),
    ]:
        with pytest.raises(LorakitError) as error:
            check_initialization(wrong)
        assert f"init_lora_weights is {wrong!r}" in str(error.value)
        assert hint in str(error.value)
        with pytest.raises(LorakitError, match="it must be true, false or one of gaussian"):
            initial(wrong, 4, 4, 2)


def test_refusals():
    W = matrix(6, 4)
    with pytest.raises(LorakitError, match="r is 5, and a weight of \\(6, 4\\) has rank 4 at most"):
        from_weight("pissa", W, 5, 1.0)
    with pytest.raises(LorakitError, match="r is 0"):
        from_weight("olora", W, 0, 1.0)
    for scaling in (0.0, -1.0, math.nan):
        with pytest.raises(LorakitError, match="scaling must be positive"):
            from_weight("pissa", W, 2, scaling)
    with pytest.raises(LorakitError, match="must be a matrix, not \\(3,\\)"):
        from_weight("pissa", torch.ones(3), 1, 1.0)
    with pytest.raises(LorakitError, match="NaN or infinite"):
        from_weight("olora", W / 0, 1, 1.0)
    with pytest.raises(LorakitError, match="'gaussian' does not start from the weight"):
        from_weight("gaussian", W, 1, 1.0)
    with pytest.raises(LorakitError, match="'pissa' starts from the weight"):
        initial("pissa", 4, 6, 2)
    with pytest.raises(LorakitError, match="needs an even r, not 3"):
        initial("orthogonal", 4, 6, 3)
    with pytest.raises(ValueError, match="even"):  # as PEFT
        peft_layer(W, 3, 3).orthogonal_init("default")
