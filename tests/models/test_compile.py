"""A decoder with NF4 weights and LoRA, traced: compiled, exported, with fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lorakit as lk
from tests.conftest import FAMILY_VARIANTS, GEMMA4, TINY_VARIANTS
from tests.models.variants import load

LLAMA = "llama", {**TINY_VARIANTS["gqa"], "num_hidden_layers": 2}
SHALLOW = "llama", {**TINY_VARIANTS["gqa"], "num_hidden_layers": 1}
IDS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def forgets():
    yield
    torch._dynamo.reset()


def adapted(tmp_path, family, options, dropout=0.0):
    model = load(tmp_path, family, options, quantize="nf4")
    lk.attach(model, lk.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def step(model, loss, ids=IDS, **how):
    """The loss, the count and the gradients; dropout draws from the same state each time."""
    torch.manual_seed(0)
    total, count = loss(ids, ids, **how)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [total.detach(), count, *torch.autograd.grad(total, trained)]


def assert_same_bits(found, expected):
    """aot_eager runs the operators of the graph as they are: the same ones in the same order."""
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        pytest.param(torch.float32, LLAMA, id="fp32", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, SHALLOW, id="bf16"),
    ],
)
def test_the_loss_is_one_graph_for_every_length(tmp_path, dtype, shape):
    model = adapted(tmp_path, *shape, dropout=0.1).to(dtype)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = step(model, model.loss)
    assert_same_bits(step(model, compiled), expected)
    longer = torch.cat([IDS, IDS[:, :5]], dim=1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = step(model, compiled, longer)
    assert_same_bits(found, step(model, model.loss, longer))


def test_layers_that_see_others_keys_are_in_the_graph(tmp_path):
    """The checkpointed blocks are, too; heads of two sizes make the compiler take one for a symbol.

    A compiler refuses a recomputed block that changes what lies outside of it, so that the block
    whose keys are seen runs once.
    """
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    options = {**GEMMA4, "num_hidden_layers": 3, "layer_types": kinds, "num_kv_shared_layers": 1}
    model = load(tmp_path, "gemma4_text", options).train()
    model.gradient_checkpointing = True
    compiled = torch.compile(model.loss, fullgraph=True, backend="eager", dynamic=True)
    assert_same_bits(step(model, compiled), step(model, model.loss))


def test_gradient_checkpointing_is_part_of_the_graph(tmp_path):
    model = adapted(tmp_path, *SHALLOW)
    expected = step(model, model.loss)
    model.gradient_checkpointing = True
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    assert_same_bits(step(model, compiled), expected)


def test_packed_documents_break_the_graph(tmp_path):
    """Their lengths are numbers of the host; what is compiled is right all the same."""
    model = adapted(tmp_path, *SHALLOW)
    row, cu_seqlens = IDS.view(1, -1), torch.tensor([0, 5, 12, 24])
    with pytest.raises(RuntimeError, match="data-dependent"):
        torch.compile(model.loss, fullgraph=True, backend="aot_eager")(
            row, row, cu_seqlens=cu_seqlens
        )
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, backend="aot_eager")
    found = step(model, compiled, row, cu_seqlens=cu_seqlens)
    assert_same_bits(found, step(model, model.loss, row, cu_seqlens=cu_seqlens))


def test_experts_are_no_part_of_one_graph(tmp_path):
    """How many tokens an expert gets is read on the host."""
    model = adapted(tmp_path, *FAMILY_VARIANTS["mixtral"])
    with pytest.raises(RuntimeError, match="experts"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(IDS)


def test_an_exported_graph_takes_every_length(tmp_path):
    model = adapted(tmp_path, *LLAMA).eval()
    length = {1: torch.export.Dim("length", min=2, max=512)}
    program = torch.export.export(model, (IDS,), dynamic_shapes=(length,), strict=False)
    longer = torch.cat([IDS, IDS], dim=1)
    assert torch.equal(program.module()(longer), model(longer))


def test_fake_tensors_show_what_a_step_makes(tmp_path):
    model = adapted(tmp_path, *LLAMA)
    trained = [p.shape for p in model.parameters() if p.requires_grad]
    with FakeTensorMode() as mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = mode.from_tensor(parameter)
        ids = mode.from_tensor(IDS)
        logits = model(ids)
        total, count = model.loss(ids, ids)
        total.backward()
    assert (logits.shape, logits.dtype) == ((2, 12, 97), torch.float32)
    assert (total.shape, total.dtype) == (count.shape, torch.float32) == ((), torch.float32)
    assert [p.grad.shape for p in model.parameters() if p.requires_grad] == trained


def test_a_trace_leaves_nothing_in_caches(tmp_path):
    """Tables that are made once must not be those of a trace."""
    model = adapted(tmp_path, "llama", TINY_VARIANTS["gqa"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.loss(IDS, IDS)
    total, _ = model.loss(IDS, IDS)
    assert type(total) is torch.Tensor
    assert total.isfinite()
