"""A step of packed rows recorded once and replayed: the bits of the step that runs op by op.

`Replays` stands for CUDA graphs here (tests/replay.py); tests/gpu/test_captured.py has the real
ones. All else is the code that runs on a GPU.
"""

import copy
import itertools
import json
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import lorakit as lk
from lorakit import kernels
from lorakit.data.batching import Order
from lorakit.data.encode import Example
from lorakit.evaluation.share import Share
from lorakit.kernels.ops.attention import documents
from lorakit.models.decoder import Decoder
from lorakit.models.expert_layers import expert_layers
from lorakit.models.mlp import Experts
from lorakit.models.rope import RopeConfig
from lorakit.training import run as training_run
from lorakit.training.captured import CapturedStep, Kind, why_eager
from lorakit.training.device_step import DeviceStep, read
from lorakit.training.gradients import OrderedSum
from lorakit.training.step import backward, prepare
from lorakit.training.trainable import trainable_layers
from tests.conftest import ROWS
from tests.replay import Replays
from tests.training.runs import ADAPTER, run

VOCABULARY, BAD = 61, 3


@pytest.fixture(autouse=True)
def _small_padding(monkeypatch):
    """Rows of a few dozen tokens, of which the longest padding is cut into several documents."""
    monkeypatch.setattr(documents, "PADDING", 16)


class Never:
    """A recorder that fails, as one does for lack of memory."""

    def run(self, function):
        return function()

    def record(self, function):
        raise RuntimeError("CUDA out of memory\nand so on")


class Rows(list):
    """Examples, with the length of each, as a run has them."""

    @property
    def lengths(self) -> list[int]:
        return [len(each.input_ids) for each in self]


def some_rows(tokens: int, longest: int = 40) -> Rows:
    """Rows of 3 tokens and more, of which most begin with a prompt that is not learned."""
    generator = torch.Generator().manual_seed(3)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    found = Rows()
    while sum(found.lengths) < tokens:
        ids = torch.randint(VOCABULARY, (3 + below(longest - 2),), generator=generator).tolist()
        prompt = below(len(ids)) if below(3) else 0
        found.append(Example(ids, [-100] * prompt + ids[prompt:]))
    return found


def adapted(dtype=torch.float32, layers=2, fields=None, packed=True, **lora) -> Decoder:
    torch.manual_seed(0)
    config = lk.ModelConfig("llama", VOCABULARY, 64, 96, layers, 4, 2, 16, **(fields or {}))
    model = Decoder(config).to(dtype).requires_grad_(False)
    model = lk.quantize(model) if packed else model
    model = lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8, **lora))
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.02)
    return model.train()


def new_run(recorder, *, dtype=torch.float32, layers=2, budget=80, steps=8, lora=None, bits=32,
            checkpointing=False, state=None, done=0, device="cpu", fields=None, packed=True,
            full=False, **options):  # fmt: skip
    """A run up to its next step: a model, its optimizer, and its `CapturedStep`."""
    model = adapted(dtype, layers, fields, packed, **(lora or {})).to(device)
    if full:
        model = Decoder(model.config).to(dtype).train()
    model.gradient_checkpointing = checkpointing
    config = lk.TrainConfig(
        packing=True, per_device_train_batch_size=1, max_seq_length=budget, max_steps=steps,
        max_grad_norm=0.3, **options,
    )  # fmt: skip
    tokens = steps * config.gradient_accumulation_steps * budget
    rows = some_rows(tokens, min(40, budget))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = lk.optim.AdamW(params, weight_decay=0.1, state_bits=bits)
    if state is not None:
        with torch.no_grad():
            for p, value in zip(params, state[0], strict=True):
                p.copy_(value)
        optimizer.load_state_dict(copy.deepcopy(state[1]))
    rates = [[1e-2 * (0.5 + 0.5 * math.cos(i))] for i in range(done, steps)]
    update = DeviceStep(optimizer, params, rates, config.max_grad_norm)
    order = Order(rows, config)
    said = []
    layers = {} if full else trainable_layers(model)
    step = CapturedStep(model, layers, order, config, update, recorder, said.append)
    return SimpleNamespace(**locals())


def prepared(run, i):
    """The micro-batches of step i, and the number of its labels."""
    batch = [[run.rows[row] for row in part] for part in run.order.step(i)]
    labels = [label for part in batch for row in part for label in row.labels[1:]]
    count = sum(label != -100 for label in labels)
    return run.step.prepare(i, batch, count), count


def take(run, first, last) -> list[torch.Tensor]:
    """Take steps, one of which is not finite. Return what is told and the gradients of each."""
    found = []
    for i in range(first, last + 1):
        if i == BAD:
            run.model.model.norm.weight.data[0] = math.inf
        found.append(run.step(prepared(run, i)[0]).clone())
        found += [p.grad.clone() for p in run.params]
        if i == BAD:
            run.model.model.norm.weight.data[0] = 1.0
    return found


def state_of(run):
    values = [p.detach().clone() for p in run.params]
    return values, copy.deepcopy(run.optimizer.state_dict())


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(ours, theirs, strict=True)
    )


def same_state(ours, theirs) -> bool:
    (values, optimizer), (others, other) = state_of(ours), state_of(theirs)
    assert optimizer["param_groups"] == other["param_groups"]
    tensors, same_tensors = (
        torch.utils._pytree.tree_leaves(each["state"]) for each in (optimizer, other)
    )
    return same([*values, *tensors], [*others, *same_tensors])


CASES = {
    "packed": {},
    "dropout": {"lora": {"lora_dropout": 0.3}},
    "dropout, checkpointing": {"lora": {"lora_dropout": 0.3}, "checkpointing": True},
    "accumulation, DFT": {
        "gradient_accumulation_steps": 2,
        "lora": {"lora_dropout": 0.3},
        "loss_type": "dft",
    },
    "DoRA, 8-bit state, smoothing": {
        "lora": {"use_dora": True},
        "bits": 8,
        "label_smoothing_factor": 0.1,
        "z_loss": 1e-3,
    },
    "the model itself": {"full": True},
    "the model itself, accumulation": {"full": True, "bits": 8, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    list(zip(CASES, itertools.cycle([torch.bfloat16, torch.float32]), strict=False)),
)
def test_replayed_as_run(case, dtype):
    """Eight steps of other documents, labels and rates, one of them not finite."""
    recorder = Replays()
    with kernels.use_backend("reference"):
        ours, theirs = (new_run(each, dtype=dtype, **CASES[case]) for each in (recorder, Never()))
        found, expected = take(ours, 1, 8), take(theirs, 1, 8)
    assert same(found, expected)
    assert same_state(ours, theirs)
    assert recorder.problems == []
    assert theirs.said == [
        "lorakit: no CUDA graph of a step, which goes on op by op: CUDA out of memory"
    ]
    per_step = 1 + len(ours.params)
    told = [read(each.tolist()) for each in found[::per_step]]
    assert [each.taken for each in told] == [i != BAD for i in range(1, 9)]
    parts = CASES[case].get("gradient_accumulation_steps", 1)
    assert recorder.replayed == 7 * parts  # all but the first step
    assert recorder.recorded == len(ours.step.recordings) <= 4 * parts
    assert len({kind.rows for kind in ours.step.recordings}) > 1


@pytest.mark.slow
def test_resumed_and_freed_in_the_middle():
    """A run that goes on from a state, and one whose graphs were freed, end with the same bits."""
    options = {**CASES["dropout, checkpointing"], "gradient_accumulation_steps": 2, "steps": 6}
    with kernels.use_backend("reference"):
        whole, first = (new_run(each, **options) for each in (Never(), Replays()))
        expected = take(whole, 1, 6)
        found = take(first, 1, 4)
        second = new_run(Replays(), state=state_of(first), done=4, **options)
        more = take(second, 5, 6)
        assert same(found + more, expected)
        assert same_state(second, whole)
        first.step.free()
        assert not first.step.recordings
        assert same(found + take(first, 5, 6), expected)
        assert same_state(first, whole)


class OneRank:
    """Ranks that are one process, whose gradients take the way of several all the same."""

    share = Share()

    def exchange(self, received, sent):
        received.copy_(sent)

    def gather(self, received, sent):
        received.view(-1).copy_(sent)

    def any_of(self, flags):
        return flags


def test_replayed_as_one_of_several_ranks():
    """The graph ends with the gradients of a micro-batch, and the rest follows op by op."""
    recorder, options = Replays(), {**CASES["accumulation, DFT"], "steps": 3, "layers": 1}
    with kernels.use_backend("reference"):
        ours, theirs = new_run(recorder, **options), new_run(Never(), **options)
        ours.step.sums = OrderedSum(OneRank(), ours.params, False, ours.params[0].device)
        assert same(take(ours, 1, 3), take(theirs, 1, 3))
        assert same_state(ours, theirs)
    assert recorder.problems == []
    assert recorder.replayed > 0
    assert all(kind.first and not kind.last for kind in ours.step.recordings)


@pytest.mark.slow
def test_triton_replayed_as_run():
    """The kernels themselves, in the interpreter, which is slow."""
    pytest.importorskip("triton")
    from tests.triton_interpreter import on_triton

    options = {"layers": 1, "budget": 48, "steps": 3, **CASES["dropout, checkpointing"]}
    recorder = Replays()
    with on_triton():
        ours, theirs = (new_run(each, **options) for each in (recorder, Never()))
        assert same(take(ours, 1, 3), take(theirs, 1, 3))
        assert same_state(ours, theirs)
    assert recorder.problems == []
    assert recorder.replayed == 2


MIXTURE = {
    "layers": 1,
    "budget": 16,
    "fields": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_layers": [True],
    },
    "lora": {"target_modules": ["gate_proj", "down_proj", "gate"]},
}


@contextmanager
def experts_on_triton():
    """The kernels of experts run, in the interpreter, and all else by its reference."""
    from lorakit.kernels.ops import experts
    from tests.triton_interpreter import interpreted

    def together(module, tokens):
        return expert_layers(module, module.names)

    with (
        kernels.use_backend("reference"),
        interpreted(),
        mock.patch.object(Experts, "together", together),
        mock.patch.object(experts, "takes_experts", return_value=True),
    ):
        yield


@pytest.mark.parametrize(
    "packed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dense", "nf4"]
)
def test_a_mixture_replayed_as_run(packed):
    """Its experts get other tokens in each of eight steps, which the host does not count.

    Dense weights are read where they lie, by a table of their addresses.
    """
    pytest.importorskip("triton")
    kernels.dispatch.address_table.cache_clear()
    recorder = Replays()
    with experts_on_triton():
        ours, theirs = (new_run(each, packed=packed, **MIXTURE) for each in (recorder, Never()))
        assert len(ours.params) == 2 * (2 * 4 + 1)
        assert same(take(ours, 1, 8), take(theirs, 1, 8))
        assert same_state(ours, theirs)
    assert recorder.problems == []
    assert recorder.replayed == 7
    assert (kernels.dispatch.address_table.cache_info().currsize > 0) != packed


LINEAR = {
    "linear_layers": [True, False],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


@contextmanager
def delta_nets_on_triton():
    """The kernels of linear attention run, in the interpreter, and all else by its reference."""
    from lorakit.kernels.ops import causal_conv, delta_net
    from lorakit.kernels.ops.causal_conv import triton as conv_kernels
    from lorakit.kernels.ops.delta_net import passes
    from tests.triton_interpreter import interpreted

    with (
        kernels.use_backend("reference"),
        interpreted(),
        mock.patch.object(causal_conv, "_module", return_value=conv_kernels),
        mock.patch.object(delta_net, "_module", return_value=passes),
    ):
        yield


def test_a_delta_net_replayed_as_run():
    """Its kernels find the documents of the step in tables on the device."""
    pytest.importorskip("triton")
    targets = {"target_modules": ["q_proj", "in_proj_qkv"]}
    fields = {**LINEAR, "linear_num_value_heads": 1}
    options = {"fields": fields, "budget": 16, "steps": 3, "dtype": torch.bfloat16, "lora": targets}
    recorder = Replays()
    with delta_nets_on_triton():
        ours, theirs = (new_run(each, **options) for each in (recorder, Never()))
        assert len(ours.params) == 4
        assert same(take(ours, 1, 3), take(theirs, 1, 3))
        assert same_state(ours, theirs)
    assert recorder.problems == []
    assert recorder.replayed == 2


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [(torch.bfloat16, None), (torch.float32, "linear attention asks the host where documents end")],
)
def test_a_delta_net_may_be_recorded(dtype, reason):
    """It is where its kernels run, which take 16 bits."""
    pytest.importorskip("triton")
    from tests.triton_interpreter import on_triton

    model = adapted(dtype, fields=LINEAR)
    with on_triton():
        found = why_eager(model, trainable_layers(model), lk.TrainConfig(packing=True))
    assert found == reason


def test_a_mixture_may_be_recorded():
    """It is if its experts are computed together, and not if their layers drop a part of x."""
    pytest.importorskip("triton")
    from tests.triton_interpreter import on_triton

    reason = "experts run one by one, being more than frozen layers with low-rank updates"
    for dropout, expected in ((0.0, None), (0.1, reason)):
        model = adapted(layers=1, fields=MIXTURE["fields"], lora_dropout=dropout)
        with on_triton():
            found = why_eager(model, trainable_layers(model), lk.TrainConfig(packing=True))
        assert found == expected


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("parts", [1, 3])
def test_padding_changes_no_gradient(backend, parts):
    """Loss and gradients are those of the rows without padding, as a run op by op has them."""
    with kernels.use_backend(backend) if backend else nullcontext():
        run = new_run(Never(), gradient_accumulation_steps=parts)
        other = adapted()
        params = [p for p in other.parameters() if p.requires_grad]
        for i in range(1, 5):
            numbers = run.order.step(i)
            alone = prepare(other, run.rows, i, numbers, run.config, None)
            losses, count = backward(other, alone, run.config, None)[0], alone.count
            told = read(run.step(prepared(run, i)[0]).tolist())
            # fp32 sums of 80 terms and of 61, in other orders: some units of 2^-24
            assert told.losses[0] / count == pytest.approx(float(sum(losses) / count), rel=1e-6)
            for p, q in zip(run.params, params, strict=True):
                assert (p.grad - q.grad).abs().max() <= 4e-6 * q.grad.abs().max()
                q.grad = None
                q.data.copy_(p)


def test_the_recorder_sees_what_a_graph_would_not_hold():
    """Numbers of Python are baked in, and waits are told; tensors that stay are read again."""
    x, number = torch.ones(3), [2.0]

    def step():
        y = x * number[0]
        return y + float(y.sum())

    recorder = Replays()
    recording = recorder.record(step)
    number[0] = 5.0
    x.fill_(10)
    recording.replay()
    assert recording.result.tolist() == [26.0] * 3  # 2 x + 6, where 6 was read when x was 1
    assert len(recorder.problems) == 1
    counter = torch.zeros(())
    replay, _ = recorder.record(lambda: counter.add_(1))
    assert counter == 0  # recording runs nothing
    replay()
    replay()
    assert counter == 2


def test_kinds_of_labels():
    """The head takes T/4, T/2, 3T/4 or T hidden states: those with a label, and some others."""
    run = new_run(Never(), steps=2)
    T = run.step.inputs.tokens
    assert T == 80
    for labels, rows in [(1, 20), (20, 20), (21, 40), (60, 60), (61, 80)]:
        example = Example([7] * 70, [-100] * (70 - labels) + list(range(labels)))
        prepared_row = run.step.inputs.prepare([example], labels, 5)
        run.step.inputs.write(prepared_row)
        assert prepared_row.rows == rows
        row = run.step.inputs.row(rows)
        assert row.targets.tolist() == list(range(labels)) + [-100] * (rows - labels)
        assert row.label_rows[:labels].tolist() == list(range(69 - labels, 69))
        assert len(set(row.label_rows.tolist())) == rows
        assert row.positions.tolist() == [*range(70), *range(10)]
        assert (int(run.step.inputs.count), int(run.step.inputs.number)) == (labels, 5)
    assert Kind(80, True, True) not in run.step.recordings


SECOND_EMBEDDING = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}


@pytest.mark.parametrize(
    ("reason", "model", "config"),
    [
        ("objective is dpo", {}, {"objective": "dpo"}),
        ("optim is paged_adamw_8bit", {}, {"optim": "paged_adamw_8bit"}),
        ("neftune_noise_alpha is set", {}, {"neftune_noise_alpha": 5.0}),
        ("depends on the length", {"rope": RopeConfig(rope_type="dynamic", factor=2.0)}, {}),
        ("linear attention asks the host", LINEAR, {}),
        ("looked up in host memory", SECOND_EMBEDDING, {}),
        ("Triton's kernels are not what runs", {}, {}),
    ],
)
def test_what_runs_op_by_op(reason, model, config):
    fields = lk.ModelConfig("llama", VOCABULARY, 64, 96, 2, 4, 2, 16, **model)
    adapter = lk.attach(Decoder(fields).requires_grad_(False), lk.LoraConfig(r=2))
    config = lk.TrainConfig(packing=True, **config)
    assert reason in why_eager(adapter, trainable_layers(adapter), config)


def test_a_trained_parameter_with_strides_runs_op_by_op():
    """Its gradient is copied in each step, to another address than a graph has noted."""
    fields = lk.ModelConfig("llama", VOCABULARY, 64, 96, 2, 4, 2, 16)
    model = Decoder(fields).bfloat16()
    config = lk.TrainConfig(packing=True, train="full")
    assert why_eager(model, {}, config) == "Triton's kernels are not what runs"  # the last reason
    head = model.lm_head.weight
    head.data = head.data.t().contiguous().t()
    assert why_eager(model, {}, config) == "a trained parameter is fp16, or has strides"


@pytest.fixture(scope="module")
def run_with(tiny_dir, tok, tmp_path_factory):
    """run_with(recorder, name, **options): a run of `train` whose steps are recorded, on a CPU."""

    def run_of(recorder, name, **options):
        def make(*args):
            return CapturedStep(*args[:-2], recorder, *args[-2:])

        out = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch, kernels.use_backend("reference"):
            patch.setattr(documents, "PADDING", 16)
            patch.setattr(training_run, "captured_step", make)
            data = {"train": ROWS, "validation": ROWS[:4]}
            options = {
                "packing": True, "max_seq_length": 64, "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 2, "eval_steps": 3, "max_steps": 6, **options,
            }  # fmt: skip
            model, result = run(tiny_dir, tok, out, data, {"lora_dropout": 0.1}, **options)
        parts = [each.part for each in trainable_layers(model).values()]
        assert all(part.counter is None for part in parts)
        return out, result

    return run_of


def test_a_whole_run(run_with):
    """Its adapter, its log and its evaluations are those of the run that goes op by op."""
    recorder = Replays()
    (ours, result), (theirs, other) = run_with(recorder, "replayed"), run_with(Never(), "run")
    assert recorder.replayed > 4
    assert recorder.problems == []
    assert (ours / ADAPTER).read_bytes() == (theirs / ADAPTER).read_bytes()
    assert result.evaluations == other.evaluations
    texts = [(out / "metrics.jsonl").read_text() for out in (ours, theirs)]
    logs = [[json.loads(line) for line in text.splitlines()] for text in texts]
    for mine, its in zip(*logs, strict=True):
        for each in (mine, its):
            each.pop("tokens_per_second", None)
            each.pop("peak_memory_mb", None)
        assert mine == its
    assert 0 < logs[0][0]["padding"] < 1
