"""`train: full` of weights that the ranks divide (models/sharding.py): ZeRO-3, arXiv:1910.02054.

Each rank has its rows of every weight, and the optimizer's state of these rows alone.

    forward, backward   FSDP2 gathers a block, and the model its embedding and head
    a gradient          is cut into rows as the weight is, and rank k gets the k-th ones of all
                        ranks, which it adds in the order of the micro-batches; then it is forgotten
    the norm            each weight's gradient is put together on one rank, which computes its norm
                        as one process does
    AdamW               takes its step on plain tensors, which are the memory of the parts

So weights, state and metrics have the bits of one process. FSDP2's own sum divides by the number of
ranks and adds in an order that is the library's; `_Unit` takes its place (set_custom_reduce_scatter
of torch). Weights that are whole on every rank, as the last norm is, go through an `OrderedSum`.

N bytes of weights, k rounds: a rank sends k (R - 1) / R N bytes of gradients a step, and R times
less for the norm; the weights are gathered twice a round.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.models.decoder import Decoder
from lorakit.models.shards import first_row, is_sharded
from lorakit.training.adamw import AdamW, Group
from lorakit.training.device_step import HostStep
from lorakit.training.gradients import GradientSum, Meeting, OrderedSum
from lorakit.training.paged_state import BLOCK

SOME = 8 << 20  # values that are added at a time in the last round

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter


class DividedWeights:
    """What trains in a model whose weights are divided, on this rank.

    Args:
        model: The model, whose mesh has one dimension. Its weights require gradients or not.

    Attributes:
        parts: This rank's part of each weight that trains, by name, as a plain tensor; of one that
            every rank has, the weight itself.
        whole_of: The divided weights that the parts belong to.

    Raises:
        LorakitError: The mesh has one rank or two dimensions, or the parts lie in host memory; or a
            block has weights of two dtypes.
    """

    def __init__(self, model: Decoder):
        mesh = model.mesh
        assert mesh is not None
        offloaded = any(p.device != model.device for p in model.parameters())
        if mesh.ndim != 1 or mesh.size() == 1 or offloaded:
            raise LorakitError(
                "train: full takes weights that all ranks divide: load the model with a mesh of "
                "one dimension, and without offload_weights"
            )
        self.model, self.mesh, self.size = model, mesh, mesh.size()
        self.parts: dict[str, Tensor] = {}
        self.whole_of: dict[Tensor, Tensor] = {}
        for name, p in model.named_parameters():
            if p.requires_grad and is_sharded(p):
                part = self.parts[name] = p.to_local().detach()
                self.whole_of[part] = p
            elif p.requires_grad:
                self.parts[name] = p
        for block in model.model.layers:
            dtypes = {p.dtype for p in block.parameters() if p.requires_grad}
            if len(dtypes) > 1:
                raise LorakitError(
                    f"train: full with shard: full needs blocks of one dtype, and one has weights "
                    f"in {' and '.join(sorted(map(str, dtypes)))}; load the model in float32"
                )

    def numbers(self) -> dict[Tensor, int]:
        """Return how many values the weight has that a part belongs to."""
        return {part: whole.numel() for part, whole in self.whole_of.items()}

    def in_groups(self, groups: Iterable[Group]) -> list[Group]:
        """Return groups of weights as groups of their parts."""
        part_of = {whole: part for part, whole in self.whole_of.items()}
        return [{**g, "params": [part_of.get(p, p) for p in g["params"]]} for g in groups]

    def check_blocks(self, optimizer: AdamW) -> None:
        """Raise LorakitError if the ranks cut a block of 256 values whose state is of 8 bits."""
        for name, part in self.parts.items():
            whole = self.whole_of.get(part)
            if whole is not None and optimizer.in_8bit(part) and self.even(whole) % BLOCK:
                raise LorakitError(
                    f"train: optim adamw_8bit has blocks of {BLOCK} values, and {self.size} ranks "
                    f"would cut one of {name}, {tuple(whole.shape)}; take adamw_torch or "
                    "paged_adamw_32bit, or another number of ranks"
                )

    def even(self, whole: Tensor) -> int:
        """Return the values of a weight's largest part."""
        return -(-len(whole) // self.size) * math.prod(whole.shape[1:])

    # ---- the optimizer's state, put together and cut ----

    def joined_state(self, optimizer: AdamW, ranks: Meeting) -> dict[str, Tensor]:
        """Return the whole state by the names of a checkpoint, in host memory, on rank 0 alone.

        All ranks must call it. One tensor after the other is sent.
        """
        found: dict[str, Tensor] = {}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for number, state in optimizer.state_dict()["state"].items():
            for name, t in state.items():
                value = self._joined(params[number], name, t, ranks)
                if ranks.share.rank == 0:
                    found[f"optimizer.{number}.{name}"] = value.cpu()
        return found

    def _joined(self, part: Tensor, name: str, t: Tensor, ranks: Meeting) -> Tensor:
        """Return a tensor of the state of a part, on rank 0 with those of the others behind it."""
        whole = self.whole_of.get(part)
        if whole is None:
            return t
        each, count = (-(-n // _values_of_one(name)) for n in (self.even(whole), whole.numel()))
        values = joined(t.reshape(-1).to(part.device), each, count, ranks, 0)
        return values.view(whole.shape) if t.dim() > 1 and ranks.share.rank == 0 else values

    def own_state(self, part: Tensor, name: str, t: Tensor) -> Tensor:
        """Return what a part has of a tensor of the whole weight's state."""
        whole = self.whole_of.get(part)
        if whole is None:
            return t
        first = first_row(len(whole), self.mesh) * math.prod(whole.shape[1:])
        start, n = (-(-n // _values_of_one(name)) for n in (first, part.numel()))
        mine = t.reshape(-1)[start : start + n]
        return mine.view(part.shape) if t.dim() > 1 else mine


def _values_of_one(name: str) -> int:
    """Return how many values of a weight share a number of its state that is called `name`."""
    return BLOCK if name.endswith("absmax") else 1


def joined(values: Tensor, each: int, count: int, ranks: Meeting, where: int) -> Tensor:
    """Return the values of all ranks one after the other, on rank `where`; else those of this one.

    Args:
        values: [n], those of this rank, n <= each.
        each: The values of a rank, of which the last ones may have fewer.
        count: The values of all.
        ranks: The ranks, which must all call it.
        where: The rank that gets them.
    """
    sent = filled(values, each)
    received = None
    if ranks.share.rank == where:
        received = values.new_empty(ranks.share.size * each)
    ranks.collect(received, sent, where)
    return values if received is None else received[:count]


def filled(values: Tensor, n: int) -> Tensor:
    """Return values [m], m <= n, in dense memory for n; what is behind them is 0."""
    if len(values) == n:
        return values.contiguous()
    found = values.new_zeros(n)
    found[: len(values)] = values
    return found


# ---- a step ----


class DividedSum(GradientSum):
    """The gradients of a step, of which each rank gets those of its own rows; see the module.

    Args:
        ranks: The ranks, which meet in every backward pass.
        divided: What trains.
    """

    alone = False
    takes_rounds = True

    def __init__(self, ranks: Meeting, divided: DividedWeights):
        from torch.distributed.fsdp import FSDPModule

        self.ranks, self.share, self.divided = ranks, ranks.share, divided
        model = divided.model
        if divided.size != ranks.share.size:
            raise LorakitError(
                f"train: full: {divided.size} ranks divide the weights, and {ranks.share.size} "
                "train; they must be the same"
            )
        everywhere = [p for p in divided.parts.values() if p not in divided.whole_of]
        self.whole = OrderedSum(ranks, everywhere, False, model.device)
        self.counts = self.last = True
        for block in model.model.layers:
            assert isinstance(block, FSDPModule)
            unit = cast("ReduceScatter", _Unit(self))
            try:
                block.set_custom_reduce_scatter(unit)
            except AttributeError:
                raise LorakitError(
                    f"train: full with shard: full needs set_custom_reduce_scatter of FSDP2, which "
                    f"torch {torch.__version__} lacks; 2.13 has it"
                ) from None
        self.ends: dict[Tensor, _End] = {}
        model.takes_gradients = self

    def begin_round(self, counts: bool, last: bool) -> None:
        self.counts, self.last = counts, last

    def end_round(self, last: bool) -> None:
        self.whole.end_round(last)
        if not last:  # the units have the sum
            for whole in self.divided.whole_of.values():
                whole.grad = None

    def finish(self, sums: Sequence[Tensor], parts: int) -> list[Tensor]:
        for part, whole in self.divided.whole_of.items():
            if whole in self.ends:
                part.grad, self.ends[whole].grad = self.ends[whole].grad, None
            elif whole.grad is not None:
                assert is_sharded(whole.grad)
                part.grad, whole.grad = whole.grad.to_local(), None
        return self.whole.finish(sums, parts)

    # ---- of the embedding and the head, which the model gathers ----

    def expect(self, whole: Tensor) -> None:
        """Note that a gradient of a gathered weight will come; of a tied one there will be two."""
        self.ends.setdefault(whole, _End(_Unit(self))).expected += 1

    def take(self, whole: Tensor, gradient: Tensor) -> None:
        """Take the gradient of a gathered weight, of its whole shape."""
        end = self.ends[whole]
        end.expected -= 1
        end.gathered = gradient if end.gathered is None else end.gathered.add_(gradient)
        if end.expected:
            return
        gathered, end.gathered = end.gathered, None
        rows, size = -(-len(whole) // self.share.size), self.share.size
        width = math.prod(whole.shape[1:])
        sent = filled(gathered.reshape(-1), size * rows * width)
        mine = sent.new_empty(rows * width)
        end.unit.add(mine, sent)
        part = whole.to_local() if is_sharded(whole) else whole
        end.grad = mine[: part.numel()].view(part.shape)


class _Unit:
    """Adds the gradients of a unit of weights, in FSDP2's place; torch's ReduceScatter protocol."""

    def __init__(self, sums: DividedSum):
        self.sums = sums
        self.total: Tensor | None = None  # between the rounds of a step

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for what is sent, or for what comes of it."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, *_: Any, **__: Any
    ) -> None:
        """Write the sum of this rank's slice of the input; `op`, which divides, is left out."""
        self.add(output_tensor, input_tensor)

    @torch.no_grad()
    def add(self, output: Tensor, sent: Tensor) -> None:
        """Add a round's gradients to those of earlier rounds, and write the sum to `output`.

        Args:
            output: [n].
            sent: [ranks, n] or flat. It is overwritten where this rank has no micro-batch.
        """
        sums = self.sums
        if not sums.counts:
            sent.fill_(-0.0)
        received = torch.empty_like(sent)
        sums.ranks.exchange(received, sent)
        parts = received.view(sums.share.size, -1)
        if not sums.last:
            # FSDP2 takes it for a gradient, which the end of the round forgets
            exact = output.dtype != torch.bfloat16
            total = output if exact else torch.empty_like(output, dtype=torch.float32)
            self.total = _add_up(self.total, parts, total)
            return
        for start in range(0, len(output), SOME):  # in fp32, which takes room
            piece = slice(start, start + SOME)
            before = None if self.total is None else self.total[piece]
            total = torch.empty_like(output[piece], dtype=torch.float32)
            output[piece] = _add_up(before, parts[:, piece], total)
        self.total = None


def _add_up(before: Tensor | None, parts: Tensor, total: Tensor) -> Tensor:
    """Write the sum of `before` [n] and of parts [ranks, n], in this order, to total [n]."""
    first, *others = parts
    if before is None:
        total.copy_(first)
    else:
        torch.add(before, first, out=total)
    for each in others:
        total.add_(each)
    return total


class _End:
    """The gradient of the embedding or the head.

    Attributes:
        unit: What adds it over the ranks.
        expected: How many gradients of this micro-batch are to come.
        gathered: The sum of those that came, of the whole shape.
        grad: This rank's rows of the sum over the ranks.
    """

    def __init__(self, unit: _Unit):
        self.unit, self.expected = unit, 0
        self.gathered: Tensor | None = None
        self.grad: Tensor | None = None


class DividedStep(HostStep):
    """Clips and steps as `HostStep` does, by the norm that one process would have.

    The sum of a weight's squares in its own order needs all of it on one rank: weight i is put
    together on rank i mod R.

    Args:
        optimizer: The optimizer, of parts.
        params: The parts, in the order in which one is looked for that is not finite.
        rates: As of `DeviceStep`.
        max_norm: The norm that longer gradients are shortened to.
        divided: What the parts belong to.
        ranks: The ranks, which meet in every step.
    """

    def __init__(
        self,
        optimizer: AdamW,
        params: Sequence[Tensor],
        rates: Sequence[Sequence[float]],
        max_norm: float,
        divided: DividedWeights,
        ranks: Meeting,
    ):
        super().__init__(optimizer, params, rates, max_norm)
        self.divided, self.ranks = divided, ranks

    def norms(self, params: Sequence[Tensor]) -> Tensor:
        own, found = self.ranks.share.rank, torch.zeros(len(params), device=params[0].device)
        for i, part in enumerate(params):
            assert part.grad is not None
            whole, where, grad = self.divided.whole_of.get(part), i % self.divided.size, part.grad
            if whole is not None:
                count = whole.numel()
                grad = joined(grad.reshape(-1), self.divided.even(whole), count, self.ranks, where)
            if own == where:
                [found[i]] = torch._foreach_norm([grad], dtype=torch.float32)
        self.ranks.add_up(found)  # all but one are 0
        return found

    def not_finite(self) -> list[bool]:
        return self.ranks.any_of(super().not_finite())
