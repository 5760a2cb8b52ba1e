"""The Triton kernels of the gated delta rule against the recurrence in fp64.

Rows are a few chunks of 32 tokens, so that they meet whole chunks, short ones and single tokens.
"""

import functools
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from lorakit import kernels
from lorakit.kernels import dispatch
from lorakit.kernels.ops import delta_net
from lorakit.kernels.ops.attention.documents import PaddedDocuments
from lorakit.kernels.ops.delta_net import passes
from tests.exact import value_and_grads
from tests.kernels.test_delta_net import as_double, convolved, inputs, parts, recurrence
from tests.triton_budget import guarded, random, run
from tests.triton_interpreter import DEVICE, on_triton

HALF = [torch.bfloat16, torch.float16]
TF32 = 2.0**-10  # products on a GPU round their operands so


def given_on_device(*shape, dtype=torch.bfloat16, **options):
    return [x.to(DEVICE) for x in inputs(*shape, dtype=dtype, **options)]


def packed(lengths):
    return lambda *x: kernels.gated_delta_net(*x, lengths=lengths)


def within_budget(f, exactly, given):
    """No further from fp64 than twice the reference and 4 roundings of the largest value.

    The gradient of g is in fp32 whatever the inputs are. Its roundings are tf32's on a GPU, and 8
    in the interpreter: it adds up terms of both signs that are as large as it is.
    """
    ours, reference = run(f, given, "triton"), run(f, given)
    grad = random(0, *given[2].shape).to(given[2].dtype).double()
    truth = value_and_grads(exactly, as_double(given), grad)
    for y, same, exact in zip(ours, reference, truth, strict=True):
        assert (y.dtype, y.shape) == (same.dtype, same.shape)
        eps = torch.finfo(y.dtype).eps
        if y.dtype == torch.float32:
            eps = TF32 if DEVICE.type == "cuda" else 2 * eps
        allowed = 2 * (same - exact).abs().max() + 4 * eps * exact.abs().max()
        assert (y.double() - exact).abs().max() <= allowed


def one_row(*given):
    return recurrence(*given)[0]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("gates", ["random", "open", "mixed"])
def test_values_and_gradients(dtype, gates):
    """Gates of about -1, of about 0, and of about 0 with one in ten at -60."""
    given = given_on_device(1, 40, 1, 2, 16, 24, dtype=dtype, gates=gates)
    within_budget(kernels.gated_delta_net, one_row, given)


@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 1, 16, 16), (2, 31, 2, 2, 8, 8), (1, 65, 1, 1, 24, 20), (1, 33, 2, 4, 8, 8)]
)
def test_sizes(shape):
    """B, T, heads of keys and of values, and their widths, which need not fill a tile."""
    within_budget(kernels.gated_delta_net, one_row, given_on_device(*shape))


def test_documents():
    lengths = [33, 0, 1, 6]
    given = given_on_device(1, 40, 1, 2, 8, 8, gates="mixed")

    def alone(*row):
        each = zip(*(x.split(lengths, dim=1) for x in row), strict=True)
        return torch.cat([one_row(*x) for x in each if x[0].shape[1]], dim=1)

    within_budget(packed(lengths), alone, given)


def found_in(row, lengths):
    """Output and gradients of documents side by side, between guard zones, each cut into them."""
    *row, grad = (torch.cat(x, dim=1) for x in zip(*row, strict=True))
    with on_triton(), guarded(*row, grad) as (*row, grad):
        found = value_and_grads(packed(lengths), row, grad)
    return list(zip(*(x.split(lengths, dim=1) for x in found), strict=True))


def test_the_bits_of_a_document_are_its_own():
    """They are those of the document alone, wherever it lies and whatever lies beside it."""

    def document(T):
        given = given_on_device(1, T, 1, 1, 8, 8)
        return [*given, random(T, 1, T, 1, 8).bfloat16()]

    a, b, c = document(35), document(33), document(3)
    (alone,) = found_in([a], [35])
    for row in ([b, a, c], [[x * float("inf") for x in c], a]):
        lengths = [each[0].shape[1] for each in row]
        found = found_in(row, lengths)[[each is a for each in row].index(True)]
        assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))


def test_documents_of_a_row_that_is_refilled():
    """They have the bits that they have without padding, in a table that stays where it is."""
    documents = PaddedDocuments(40, 4)
    with on_triton():
        for lengths in ([], [33, 2]):
            documents.refill(lengths)
            (*tables,) = documents._tables.values()
            given, n = given_on_device(1, 40, 1, 1, 8, 8), sum(lengths)
            grad = random(1, *given[2].shape)
            found = value_and_grads(packed(documents), given, grad)
            assert all(x.isfinite().all() for x in found)
            alone = [x[:, :n] for x in given]
            if lengths:
                expected = value_and_grads(packed(lengths), alone, grad[:, :n])
                pairs = zip(found, expected, strict=True)
                assert all(torch.equal(whole[:, :n], part) for whole, part in pairs)
                assert list(map(id, documents._tables.values())) == list(map(id, tables))


def test_a_state_is_carried_from_call_to_call():
    """A row in three calls, the last of one token, is the row in one but for roundings of bf16."""
    given = given_on_device(2, 40, 1, 2, 8, 8)
    state, found = None, []
    with on_triton():
        for part in zip(*(x.split([5, 34, 1], dim=1) for x in given), strict=True):
            o, state = kernels.gated_delta_net(*part, state=state, with_state=True)
            found.append(o)
    truth, last = recurrence(*as_double(given))
    torch.testing.assert_close(torch.cat(found, 1).double(), truth, rtol=2**-8, atol=4 * TF32)
    assert state.dtype == torch.float32
    atol = 4 * TF32 if DEVICE.type == "cuda" else 2e-6  # sums of 40 terms below 1
    torch.testing.assert_close(state.double(), last, rtol=0, atol=atol)


def test_the_gradients_after_a_state_of_parts_of_one_projection():
    """The kernels read strides; the state itself has no gradient."""
    both, state = random(0, 1, 40, 56).bfloat16(), random(1, 1, 2, 16, 12)
    given = both, -random(2, 1, 40, 2).abs(), random(3, 1, 40, 2).sigmoid().bfloat16()
    grad = random(4, 1, 40, 2, 12).bfloat16()

    def after(*x):
        return kernels.gated_delta_net(*parts(*x), state=state)

    with on_triton():
        found = value_and_grads(after, given, grad)
    with kernels.use_backend("reference"):
        same = value_and_grads(after, given, grad)
    for y, expected in zip(found, [x.detach() for x in same], strict=True):
        # both round at most once to the same 16 bits, of which values may be neighbours
        eps = TF32 if y.dtype == torch.float32 and DEVICE.type == "cuda" else 2**-8
        torch.testing.assert_close(y, expected, rtol=eps, atol=eps * expected.abs().max().item())


def test_heads_one_after_the_other_have_the_same_bits():
    """Backward takes as many as have memory for their states."""
    given = given_on_device(1, 12, 2, 4, 8, 8)
    grad = torch.ones((), device=DEVICE, dtype=torch.bfloat16).expand(given[2].shape)
    with on_triton():
        together = value_and_grads(kernels.gated_delta_net, given, grad)
        with mock.patch.object(passes, "MOST_STATES", 1):
            apart = value_and_grads(kernels.gated_delta_net, given, grad)
    assert all(torch.equal(*pair) for pair in zip(together, apart, strict=True))


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "kernel"),
    [
        (torch.bfloat16, 128, (8, 0), "triton"),
        (torch.float16, 64, (12, 0), "triton"),
        (torch.bfloat16, 128, (7, 5), "reference"),
        (torch.float32, 128, (9, 0), "reference"),
        (torch.bfloat16, 136, (9, 0), "reference"),
    ],
)
def test_what_the_kernels_take(dtype, width, capability, kernel):
    """Products need sm_80; registers hold no fp32 operands, and no wider states."""
    x = torch.empty(1, 1, 1, width, dtype=dtype, device=DEVICE)
    with on_triton(), mock.patch.object(dispatch, "capability", return_value=capability):
        assert delta_net.kernel(x, x, x) == kernel


# ---- the convolution ----


def convolved_within_budget(f, exactly, given):
    """Twice the reference's error, and 4 roundings of the largest value."""
    ours, reference = run(f, given, "triton"), run(f, given)
    grad = random(0, *given[0].shape).to(given[0].dtype).double()
    truth = value_and_grads(exactly, as_double(given), grad)
    for y, same, exact in zip(ours, reference, truth, strict=True):
        assert (y.dtype, y.shape) == (same.dtype, same.shape)
        allowed = 2 * (same - exact).abs().max() + 4 * torch.finfo(y.dtype).eps * exact.abs().max()
        assert (y.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("T", "C", "K"), [(1, 5, 4), (17, 130, 4), (20, 16, 2)])
def test_the_convolution(dtype, T, C, K):
    """The gradient of the weight too, which in a model has fp32."""
    given = random(0, 2, T, C).to(dtype), random(1, C, K)
    convolved_within_budget(kernels.causal_conv, convolved, given)


def test_the_convolution_after_a_state():
    state, given = random(2, 2, 3, 5).bfloat16(), (random(0, 2, 18, 5).bfloat16(), random(1, 5, 4))
    convolved_within_budget(
        lambda *x: kernels.causal_conv(*x, state=state), lambda *x: convolved(*x, state), given
    )


def test_the_convolution_of_documents():
    """The bits of each are its own, beside others that are infinite and in padded rows."""
    lengths, weight = [3, 0, 1, 20, 2], random(1, 6, 4)
    x, grad = random(0, 1, 26, 6), random(2, 1, 26, 6)
    for bad in (0, 4):
        x.split(lengths, 1)[bad].fill_(float("inf"))
    padded = PaddedDocuments(26, 9)
    padded.refill([26])
    with on_triton():
        kernels.causal_conv(x, weight, lengths=padded)
        padded.refill(lengths)
        part = x[:, 4:24].contiguous()
        alone = value_and_grads(lambda x: kernels.causal_conv(x, weight), [part], grad[:, 4:24])
        for each in (kernels.Documents(lengths), padded):
            of = functools.partial(kernels.causal_conv, weight=weight, lengths=each)
            found = value_and_grads(of, [x], grad)
            assert all(torch.equal(y[:, 4:24], z) for y, z in zip(found, alone, strict=True))
