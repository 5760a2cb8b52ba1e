"""An optimizer step of packed rows as a CUDA graph: recorded once, then launched as a whole.

The first step runs op by op, which compiles what is compiled on first use. From the second on, each
kind of micro-batch is recorded when it first comes, and replayed from then on. A kind is

    rows     how many hidden states the head takes: T/4, T/2, 3T/4 or T
    first    whether its gradients are written to memory, or added to those that are there
    last     whether the optimizer's step follows, which it does op by op if there are several ranks

A graph holds addresses and numbers. So what differs from step to step lies in tensors that stay
(`PackedInputs`), and is copied there before a replay, without a wait. A row has T tokens whatever
its documents are: the rest is padding in documents of its own, which no label and so no gradient
comes from. Label rows beyond the labels have targets of -100. The masks of dropout are a function
of the micro-batch's number (kernels/ops/dropout). Which tokens an expert gets is found on the
device, and the host never learns it (kernels/ops/experts). The gradients have memory of their own.

The graphs share one pool of memory, since they never run at the same time. It holds the activations
of a step from then on, which is why `free` gives it back before an evaluation.

A step that is not recorded computes the same bits by the same code. So a run goes on in this way if
a recording fails.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lorakit import kernels
from lorakit.adapters.layers.lora import LowRankLinear, LowRankPart
from lorakit.adapters.layers.wrapper import Attached
from lorakit.config.training import OPTIMIZERS, TrainConfig
from lorakit.data.batching import Order
from lorakit.data.encode import IGNORE, AnyExample, Example
from lorakit.models.decoder import Decoder
from lorakit.models.hooks import has_hooks, has_own_forward
from lorakit.models.mlp import Experts
from lorakit.models.per_layer import host_tables
from lorakit.models.views import PackedRow
from lorakit.training.draws import drawing_from
from lorakit.training.gradients import ALONE, SUMS, GradientSum
from lorakit.training.kernel_line import linear_kernels

Function = Callable[[], Tensor | None]


class Kind(NamedTuple):
    """What a graph was recorded for; see the module."""

    rows: int
    first: bool
    last: bool


class Recording(NamedTuple):
    """A function that was recorded, and what it returned, which each replay writes again."""

    replay: Callable[[], None]
    result: Tensor | None


class Recorder(Protocol):
    """Records what a function launches."""

    def run(self, function: Function) -> Tensor | None:
        """Return what the function returns, run as it will be recorded."""

    def record(self, function: Function) -> Recording:
        """Record what the function launches; nothing of it runs."""


class Packs(Protocol):
    """What rows are packed of: see `Order`."""

    packs: list[list[int]] | None
    """Numbers of the documents in each row."""
    lengths: "array[int]"
    """Tokens of each document."""


class CudaGraphs:
    """The recorder of a GPU: CUDA graphs that share their memory."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, function: Function) -> Tensor | None:
        """Run the function on the stream that records."""
        current = torch.cuda.current_stream(self.stream.device)  # another device may be current
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def record(self, function: Function) -> Recording:
        """Record the function. Raises RuntimeError if a graph cannot hold it."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as one that pins memory, go on meanwhile
        mode = "thread_local"
        # a recording that fails would leave its stream the current one
        with (
            torch.cuda.stream(self.stream),
            torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode=mode),
        ):
            result = function()
        return Recording(graph.replay, result)


class HostRow(NamedTuple):
    """A micro-batch in host memory, where a copy to the device need not wait."""

    memory: Tensor
    lengths: list[int]  # of its documents
    rows: int  # hidden states that the head takes


class PackedInputs:
    """The tensors of a packed row on the device, which every micro-batch fills."""

    def __init__(self, documents: kernels.PaddedDocuments, device: torch.device):
        self.documents, self.tokens, self.device = documents, documents.tokens, device
        self.memory = self._empty(device)
        self.ids, self.positions, self.label_rows, self.targets, numbers = self._parts(self.memory)
        self.count, self.number = numbers.unbind()

    def row(self, rows: int) -> PackedRow:
        """Return the row, whose head takes so many hidden states."""
        labels = self.label_rows[:rows], self.targets[:rows]
        return PackedRow(self.ids[None], self.positions, self.documents, *labels)

    def prepare(self, examples: Sequence[Example], count: int, number: int) -> HostRow:
        """Return a micro-batch as it will lie in the tensors, in host memory.

        Args:
            examples: The documents of the row.
            count: The label tokens of the whole step.
            number: The number of the micro-batch in the run.
        """
        lengths = [len(example.input_ids) for example in examples]
        memory = self._empty(torch.device("cpu"))
        ids, positions, label_rows, targets, numbers = self._parts(memory)
        ids.zero_()
        found = torch.tensor([token for each in examples for token in each.input_ids])
        ids[: len(found)] = found
        torch.cat([torch.arange(n) for n in self.documents.filled(lengths)], out=positions)
        next_tokens = torch.full_like(ids, IGNORE)
        found = torch.tensor([label for e in examples for label in [*e.labels[1:], IGNORE]])
        next_tokens[: len(found)] = found
        # those with a label first: all are different, so that no two gradients meet in one place
        label_rows.copy_((next_tokens == IGNORE).to(torch.uint8).argsort(stable=True))
        targets.copy_(next_tokens[label_rows])
        numbers.copy_(torch.tensor([count, number]))
        labels, quarter = int((targets != IGNORE).sum()), self.tokens // 4
        return HostRow(memory, lengths, max(1, -(-labels // quarter)) * quarter)

    def write(self, row: HostRow) -> None:
        """Write a micro-batch to the tensors; the host does not wait."""
        self.documents.refill(row.lengths)
        self.memory.copy_(row.memory, non_blocking=True)

    def _empty(self, device: torch.device) -> Tensor:
        """Return memory for all parts; on the host it is pinned, and free after the copy."""
        pinned = device.type == "cpu" and self.device.type == "cuda"
        size = 4 * self.tokens + 2
        return torch.empty(size, dtype=torch.int64, device=device, pin_memory=pinned)

    def _parts(self, memory: Tensor) -> tuple[Tensor, ...]:
        return memory.split([self.tokens] * 4 + [2])


class CapturedStep:
    """Optimizer steps of packed rows, which are recorded and replayed.

    If a recording fails, one line says so, and nothing is recorded any more.
    """

    def __init__(
        self,
        model: Decoder,
        layers: Mapping[str, Attached],
        order: "Packs",
        config: TrainConfig,
        update: Callable[[Tensor], Tensor],
        recorder: Recorder,
        say: Callable[[str], None],
        sums: GradientSum = ALONE,
    ):
        """Prepare the memory of the steps.

        Args:
            model: The model, in training mode.
            layers: Its wrappers with a part of the adapter.
            order: The packed rows of the run.
            config: The settings of the run.
            update: Takes the optimizer's step by the gradients that the parameters have. It is
                given the summed loss of the step, fp32 [1], and returns what is told of the step,
                on the device.
            recorder: What records.
            say: Prints a line.
            sums: Adds up the gradients of several ranks. Then a graph ends with the gradients of
                a micro-batch, and the optimizer's step follows op by op.
        """
        assert order.packs is not None
        rows = [[order.lengths[i] for i in pack] for pack in order.packs]
        documents = kernels.PaddedDocuments.for_rows(rows)
        self.model, self.config, self.update = model, config, update
        self.recorder, self.say, self.failed, self.sums = recorder, say, False, sums
        self.inputs = PackedInputs(documents, model.device)
        self.params = [p for p in model.parameters() if p.requires_grad]
        several = sums.alone and config.batches_of_step > 1
        self.totals = [torch.zeros_like(p, dtype=_sum_dtype(p, several)) for p in self.params]
        self.grads = [
            total if total.dtype == p.dtype else torch.zeros_like(p)
            for p, total in zip(self.params, self.totals, strict=True)
        ]
        # both summed over the labels of the step; see `gradients.SUMS`
        self.loss = torch.zeros(1, device=model.device)
        self.statistics = torch.zeros(SUMS - 1, device=model.device)
        self.recordings: dict[Kind, Recording] = {}
        self.warm = False
        self.parts = low_rank_parts(layers)
        for part in self.parts:
            part.counter = self.inputs.number

    def prepare(
        self, step: int, micro_batches: Sequence[Sequence[AnyExample]], count: int
    ) -> list[HostRow | None]:
        """Return this rank's micro-batches of step 1, 2, ..., which has `count` label tokens.

        `micro_batches` are those of all ranks. A round without one of this rank is None.
        """
        first = (step - 1) * self.config.batches_of_step
        found = list[HostRow | None]()
        for each in self.sums.share.rounds(list(enumerate(micro_batches, first))):
            if each is None:
                found.append(None)
            else:
                rows = [row for example in each[1] for row in example.answers]
                found.append(self.inputs.prepare(rows, count, each[0]))
        return found

    def __call__(self, micro_batches: Sequence[HostRow | None], parts: int | None = None) -> Tensor:
        """Take a step with these rows of this rank, and return what `update` returns.

        `parts` is the number of micro-batches of all ranks; None means that there are no others.
        The parameters' gradients are those of the step. What is returned, and the statistics, are
        overwritten by later steps.
        """
        told: Tensor | None = None
        found, alone = list[Tensor](), self.sums.alone
        for i, row in enumerate(micro_batches):
            if row is not None:
                self.inputs.write(row)
                last = alone and i == len(micro_batches) - 1
                first = i == 0 or self.sums.takes_rounds
                told = self._take(Kind(row.rows, first, last))
                self.warm = self.warm or last or not alone
                self._give_gradients()
                if not alone:
                    found.append(torch.cat([self.loss, self.statistics]))
            if not alone:
                self.sums.end_round(i == len(micro_batches) - 1)
        if not alone:
            told = self._update_of_ranks(found, parts or len(micro_batches))
        assert told is not None
        return told

    def _update_of_ranks(self, sums: Sequence[Tensor], parts: int) -> Tensor:
        """Take the step by the gradients of all ranks, and by the sum of their losses."""
        total, *others = self.sums.finish(sums, parts)
        for each in others:
            total = total + each
        self.statistics.copy_(total[1:])
        return self.update(total[:1])

    def free(self) -> None:
        """Give the graphs' memory back; they are recorded again when steps follow."""
        if self.recordings and self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.recordings.clear()

    def end(self) -> None:
        """Free the memory, and let dropout draw its masks as it did before."""
        self.free()
        for part in self.parts:
            part.counter = None

    def _take(self, kind: Kind) -> Tensor | None:
        """Compute the micro-batch that the inputs hold."""
        if self.warm and not self.failed and kind not in self.recordings:
            try:
                self.recordings[kind] = self.recorder.record(lambda: self._micro_batch(kind))
            except RuntimeError as error:  # out of memory is one too
                self.failed = True
                self.free()
                reason = str(error).partition("\n")[0]
                self.say(f"lorakit: no CUDA graph of a step, which goes on op by op: {reason}")
        found = self.recordings.get(kind)
        if found is None:
            return self.recorder.run(lambda: self._micro_batch(kind))
        found.replay()
        return found.result

    def _micro_batch(self, kind: Kind) -> Tensor | None:
        """Compute loss and gradients, and after the last micro-batch of a step the update."""
        config, inputs = self.config, self.inputs
        statistics = torch.zeros_like(self.statistics)
        # each layer's dropout gets the same number in every step, as a graph has it
        with drawing_from(config.seed):
            loss = self.model.packed_loss(
                inputs.row(kind.rows),
                label_smoothing=config.label_smoothing_factor,
                z_loss=config.z_loss,
                dft=config.form == "dft",
                statistics=statistics,
            )
        mean, total = loss / inputs.count, loss.detach().view(1)
        found = torch.autograd.grad(mean, self.params, allow_unused=not self.warm)
        self._drop_unused(found)
        grads = [grad for grad in found if grad is not None]
        if kind.first:
            torch._foreach_copy_(self.totals, grads)
            self.loss.copy_(total)
            self.statistics.copy_(statistics)
        else:
            torch._foreach_add_(self.totals, grads)
            self.loss.add_(total)
            self.statistics.add_(statistics)
        if not kind.last:
            return None
        for grad, total in zip(self.grads, self.totals, strict=True):
            if grad is not total:
                grad.copy_(total)
        self._give_gradients()
        return self.update(self.loss)

    def _give_gradients(self) -> None:
        """Let the parameters have their gradients; a replay writes only the memory of them."""
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad

    def _drop_unused(self, grads: Sequence[Tensor | None]) -> None:
        """Leave out parameters that got no gradient, in the first step; a check of it names one."""
        if any(grad is None for grad in grads):
            used = [i for i, grad in enumerate(grads) if grad is not None]
            self.params = [self.params[i] for i in used]
            self.grads = [self.grads[i] for i in used]
            self.totals = [self.totals[i] for i in used]


def _sum_dtype(p: Tensor, several: bool) -> torch.dtype:
    """Return the dtype that gradients of p, of several micro-batches or of one, are added up in."""
    return torch.float32 if several and p.dtype == torch.bfloat16 else p.dtype


def low_rank_parts(layers: Mapping[str, Attached]) -> list[LowRankPart]:
    """Return the parts of wrappers of linear layers that may drop what they read."""
    return [each.part for each in layers.values() if isinstance(each, LowRankLinear)]


def captured_step(
    model: Decoder,
    layers: Mapping[str, Attached],
    order: Order,
    config: TrainConfig,
    update: Callable[[Tensor], Tensor],
    say: Callable[[str], None],
    sums: GradientSum,
) -> CapturedStep | None:
    """Return what takes the steps of a run as CUDA graphs; the arguments are `CapturedStep`'s.

    Return None where a step is launched op by op. If rows are packed on a GPU, one line says why.
    """
    if not config.packing or model.device.type != "cuda" or config.cuda_graph == "off":
        return None
    if model.mesh is not None:  # its weights move
        return None
    reason = why_eager(model, layers, config)
    if reason is not None:
        say(f"lorakit: no CUDA graph of a step, since {reason}")
        return None
    recorder = CudaGraphs(model.device)
    return CapturedStep(model, layers, order, config, update, recorder, say, sums)


def why_eager(model: Decoder, layers: Mapping[str, Attached], config: TrainConfig) -> str | None:
    """Return why the steps of a run cannot be CUDA graphs, or None if they can.

    The sentence is for a run that packs rows on a GPU.
    """
    parts = low_rank_parts(layers)
    drops = any(part.dropout for part in parts)
    whole = all(each.base.frozen for each in layers.values() if isinstance(each, LowRankLinear))
    heads, wide = max(model.config.rope_head_dims), model.dtype == torch.float32
    trained = [p for p in model.parameters() if p.requires_grad]
    reasons = {
        f"objective is {config.objective}": config.objective != "sft",
        "activation_offloading is set": config.activation_offloading,
        "neftune_noise_alpha is set": config.neftune_noise_alpha is not None,
        f"optim is {config.optim}": config.optim == "muon" or OPTIMIZERS[config.optim][1],
        "the rotary embedding depends on the length of a row": model.config.by_length,
        "rows of the second embedding are looked up in host memory": bool(host_tables(model)),
        "linear attention asks the host where documents end": any(model.config.linear_layers)
        and set(linear_kernels(model).values()) != {"triton"},
        "quantize_aware is set": any(part.rounding is not None for part in parts),
        "the adapter is a learned prompt": model.beginning.length > 0,
        "a module has hooks or a forward of its own": any(
            has_hooks(each) or has_own_forward(each) for each in model.modules()
        ),
        "dropout comes before a weight that is trained": drops and not whole,
        # whose gradients the optimizer copies, and a graph would hold the copies' addresses
        "a trained parameter is fp16, or has strides": not all(
            p.dtype in (torch.float32, torch.bfloat16) and p.is_contiguous() for p in trained
        ),
        "Triton's kernels are not what runs": not _runs_triton(model),
        f"heads of {heads} in {model.dtype} are too wide": heads > (128 if wide else 512),
        # how many tokens each of them has, the host would have to know
        "experts run one by one, being more than frozen layers with low-rank updates": any(
            each.together(model.model.norm.weight) is None
            for each in model.modules()
            if isinstance(each, Experts)
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _runs_triton(model: Decoder) -> bool:
    """Return whether Triton runs on the model's device, its products included (sm_80)."""
    if not kernels.dispatch.triton_runs(model.model.norm.weight):
        return False
    compiled = kernels.dispatch.compiles_to()
    return compiled == "amdgcn" or kernels.dispatch.capability(model.device) >= (8, 0)
