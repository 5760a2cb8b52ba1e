"""The ops as operators that can be traced: schemas, shapes, gradients, and who calls them."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lorakit import kernels
from lorakit.kernels import LoraWeights, dispatch
from lorakit.kernels.traced.packed import Frozen, parts, whole

BACKENDS = ["reference", *["cpu"] * (dispatch.library() is not None)]


# ---- public calls, and the tensors that they are differentiable in ----


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lora(stored, A, B, *, bias=None, magnitude=None, dropout=0.0):
    return LoraWeights(Frozen(stored, bias), A, B, 0.5, dropout, magnitude)


def mlp(*given, dropout=0.0, keep=False):
    x, *pairs = given
    A, B = pairs[0::2], pairs[1::2]
    gate, up = (lora(Q, A[i], B[i], dropout=dropout) for i in range(2))
    return kernels.lora_mlp(x, gate, up, lora(DOWN, A[2], B[2]), "silu", keep=keep)


def qkv(x, *tensors):
    A_q, B_q, bias, A_k, B_k, A_v, B_v = tensors
    layers = lora(Q, A_q, B_q, bias=bias), lora(Q, A_k, B_k), lora(INT8, A_v, B_v)
    return kernels.lora_qkv(x, layers)


def delta_net(q, k, v, g, beta, **options):
    return kernels.gated_delta_net(q, k, v, -g.square(), beta, **options)


Q, INT8 = kernels.quantize_nf4(values(6, 64)), kernels.quantize_int8(values(4, 64))
WITHOUT_DOUBLE_QUANT = kernels.quantize_nf4(values(6, 64), double_quant=False)
DOWN = values(4, 6)
ANGLES = values(1, 5, 4)
TABLES = ANGLES.cos(), ANGLES.sin()
MASK = torch.ones(5, 5, dtype=torch.bool).tril()
LABELS = torch.tensor([[1, -100, 3], [4, 0, -100]])
ROWS = torch.tensor([[1, 5], [0, 1]])
LABEL_ROWS, DENSE_HEAD = torch.tensor([4, 0, 2]), values(11, 64)
LOSS = {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-3, "dft": True}
X, HEADS = (2, 3, 64), [(2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)]
ONE_ROW = [(1, *shape[1:]) for shape in HEADS]
DELTA = [(2, 5, 1, 8), (2, 5, 1, 8), (2, 5, 2, 4), (2, 5, 2), (2, 5, 2)]
PAIR = [(2, 64), (6, 2)]
MLP = [X, *PAIR, *PAIR, (2, 6), (4, 2)]

CALLS = {
    "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-5), [(2, 3, 16), (16,)]),
    "add_rms_norm": (
        lambda x, r, w: kernels.add_rms_norm(
            x, r, w, 1e-5, weight_offset=1.0, casting_mode="gemma"
        ),
        [(2, 3, 16), (2, 3, 16), (16,)],
    ),
    "rope": (lambda q, k: kernels.rope(q, k, *TABLES), HEADS[:2]),
    "norm_rope": (
        lambda q, k, *weights: kernels.norm_rope(q, k, *weights, 1e-5, *TABLES),
        [*HEADS[:2], (8,), (8,)],
    ),
    "swiglu": (kernels.swiglu, [(2, 3, 16), (2, 3, 16)]),
    "geglu": (kernels.geglu, [(2, 3, 16), (2, 3, 16)]),
    "attention": (lambda *qkv: kernels.attention(*qkv, softcap=30.0, window=3), HEADS),
    "attention, mask": (lambda *qkv: kernels.attention(*qkv, mask=MASK), HEADS),
    "attention, sinks": (
        lambda q, k, v, sinks: kernels.attention(q, k, v, sinks=sinks),
        [*HEADS, HEADS[0][2:3]],
    ),
    "attention, documents": (
        lambda *qkv: kernels.attention(*qkv, lengths=kernels.Documents([3, 2])),
        ONE_ROW,
    ),
    "causal_conv": (kernels.causal_conv, [(2, 5, 6), (6, 4)]),
    "gated_delta_net": (delta_net, DELTA),
    "gated_delta_net, documents": (
        lambda *given: delta_net(*given, lengths=kernels.Documents([3, 2])),
        [(1, *shape[1:]) for shape in DELTA],
    ),
    "gated_delta_net, state": (lambda *given: delta_net(*given, with_state=True), DELTA),
    "dequantize_nf4": (lambda: kernels.dequantize_nf4(Q, torch.bfloat16), []),
    "dequantize_rows": (lambda: kernels.dequantize_rows(WITHOUT_DOUBLE_QUANT, ROWS), []),
    "frozen_linear": (lambda x, bias: kernels.frozen_linear(x, Q, bias), [X, (6,)]),
    "frozen_linear, int8": (lambda x: kernels.frozen_linear(x, INT8), [X]),
    "lora_linear, DoRA": (
        lambda x, A, B, m: kernels.lora_linear(x, lora(Q, A, B, magnitude=m)),
        [X, *PAIR, (6,)],
    ),
    "lora_qkv": (qkv, [X, *PAIR, (6,), *PAIR, (2, 64), (4, 2)]),
    "lora_mlp": (mlp, MLP),
    "lora_mlp, kept": (lambda *given: mlp(*given, keep=True), MLP),
    "lora_mlp, dropout": (lambda *given: mlp(*given, keep=True, dropout=0.5), MLP),
    "cross_entropy": (lambda z: kernels.cross_entropy(z, LABELS, **LOSS), [(2, 3, 11)]),
    "linear_cross_entropy": (
        lambda h, w, A, B: kernels.linear_cross_entropy(h, w, LABELS, lora=(A, B, 0.5), **LOSS),
        [X, (11, 64), (2, 64), (11, 2)],
    ),
    "linear_cross_entropy, rows": (
        lambda h: kernels.linear_cross_entropy(h, DENSE_HEAD, LABELS[0], rows=LABEL_ROWS),
        [X],
    ),
    "linear_cross_entropy, packed": (lambda h: kernels.linear_cross_entropy(h, Q, LABELS), [X]),
}
calls = pytest.mark.parametrize("name", CALLS)


def prepared(name):
    """A call that returns results and gradients, and the tensors to call it with."""
    call, shapes = CALLS[name]
    given = [values(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]

    def results(*given):
        out = call(*given)
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        return out, [t for t in out if t.requires_grad]

    grads = [values(*t.shape) for t in results(*given)[1]]  # here: a graph would draw others

    def both(*given):
        out, outs = results(*given)
        return [*out, *(torch.autograd.grad(outs, given, grads) if outs else ())]

    return both, given


def ours(graph):
    """The names of lorakit's operators in a graph."""
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return [
        t.name()
        for t in targets
        if isinstance(t, torch._ops.OpOverload) and t.namespace == "lorakit"
    ]


# ---- the operators ----


class Checked(torch.fx.Interpreter):
    """Runs a graph, and asks torch whether lorakit's operators in it are as they should be."""

    def call_function(self, target, args, kwargs):
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "lorakit":
            backward = target.name().endswith("_backward")  # it has no derivative
            given = tree_map_only(torch.Tensor, torch.Tensor.detach, args) if backward else args
            torch.library.opcheck(target, given, kwargs)
        return super().call_function(target, args, kwargs)


@calls
def test_operators_are_what_torch_asks_for(name):
    """Schema, shapes and strides of the fake results, gradients, and AOT with dynamic sizes."""
    both, given = prepared(name)
    graph = make_fx(both)(*given)
    assert ours(graph)
    Checked(graph).run(*given)


@pytest.mark.parametrize("backend", BACKENDS)
@calls
def test_a_traced_call_computes_the_bits_of_the_op(name, backend):
    """Results and gradients; the seeds of masks come from the same generator.

    An MLP that keeps nothing keeps x A^T of its hidden state all the same. Traced it is made of the
    hidden state of backward, which is another product: sums of 64 in another order.
    """
    again = name == "lora_mlp"
    both, given = prepared(name)
    with kernels.use_backend(backend):
        torch.manual_seed(0)
        expected = both(*given)
        graph = make_fx(both)(*given)
        torch.manual_seed(0)
        found = graph(*(t.detach() for t in given))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        tolerance = 64 * torch.finfo(one.dtype).eps * other.detach().abs().max() if again else 0
        torch.testing.assert_close(one, other, rtol=0, atol=float(tolerance))


@calls
def test_fake_tensors_have_shapes_and_dtypes_of_the_real_ones(name):
    both, given = prepared(name)
    expected = both(*given)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = both(*[mode.from_tensor(t) for t in given])
    for fake, real in zip(found, expected, strict=True):
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_layers_that_share_an_input_have_one_dropout():
    pair = values(2, 64), values(6, 2)
    layers = lora(Q, *pair, dropout=0.5), lora(Q, *pair)
    with pytest.raises(ValueError, match="the same dropout"):
        make_fx(lambda x: kernels.lora_qkv(x, layers))(values(3, 64))


def test_without_gradients_a_loss_computes_none():
    hidden = values(*X).requires_grad_()

    def loss(hidden):
        with torch.no_grad():
            return kernels.linear_cross_entropy(hidden, Q, LABELS)[0]

    graph = make_fx(loss)(hidden)
    [node] = [n for n in graph.graph.nodes if "linear_cross_entropy" in str(n.target)]
    assert node.args[-1] == [False] * 4


@pytest.mark.parametrize(
    "w",
    [
        Q,
        WITHOUT_DOUBLE_QUANT,
        kernels.quantize_fp4(values(3, 5, 7).half(), block_size=128),
        INT8,
        DOWN,
    ],
    ids=["nf4", "without double quantization", "fp4", "int8", "dense"],
)
def test_a_weight_comes_together_as_it_was_taken_apart(w):
    again = whole(*parts(w))
    if isinstance(w, torch.Tensor):
        assert again is w
    else:
        assert vars(again) == vars(w)  # the same tensors


def test_a_weight_that_has_no_schema_is_named():
    with pytest.raises(TypeError, match="stored as LoraWeights cannot be part of a traced graph"):
        parts(lora(DOWN, values(2, 6), values(4, 2)))


def test_what_belongs_to_a_cuda_graph_cannot_be_traced():
    documents = kernels.PaddedDocuments(5, 1)
    q, k, v = (values(*shape) for shape in ONE_ROW)
    with pytest.raises(TypeError, match="PaddedDocuments change"):
        make_fx(lambda q: kernels.attention(q, k, v, lengths=documents))(q)
    with pytest.raises(TypeError, match="PaddedDocuments change"):
        make_fx(lambda x: kernels.causal_conv(x, values(6, 4), lengths=documents))(values(1, 5, 6))
    layer = lora(DOWN, values(2, 6), values(4, 2), dropout=0.5)
    layer = dataclasses.replace(layer, counter=torch.tensor(1))
    with pytest.raises(TypeError, match="counter"):
        make_fx(lambda x: kernels.lora_linear(x, layer))(values(3, 6))


# ---- when they are used ----


def test_only_tracing_modes_change_what_an_op_calls():
    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert not dispatch.traces()
    with Looks():
        assert not dispatch.traces()
        with FakeTensorMode():
            assert dispatch.traces()
    assert not dispatch.traces()


def test_an_eager_step_imports_none_of_it():
    code = (
        "import sys, torch; from lorakit import kernels;"
        "x = torch.randn(2, 8, requires_grad=True);"
        "kernels.rms_norm(x, torch.ones(8), 1e-5).sum().backward();"
        "print('lorakit.kernels.traced' in sys.modules);"
        "kernels.dispatch.traced();"
        "print({'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["False", "set()"]
