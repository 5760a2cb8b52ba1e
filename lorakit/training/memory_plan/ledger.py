"""Who holds how many bytes, booked operation by operation.

    with Ledger("meta", pool=Pool()) as ledger:
        ...                                  # anything of torch's
    ledger.total, ledger.peaks["forward"].kinds

A `Ledger` sees every operation of torch. Memory that it has not seen is booked under the kind that
is current, from then until the last tensor on it is gone. What no tensor shows, such as what an
operation takes for itself, is booked by `while_it_runs`.

Of a tensor that is divided among ranks, the part of this one is booked.

Tensors of the meta device have no values. An operation that asks for one gets an answer here: zero
is not asked about, so a condition is true and a number is 0.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.models.shards import is_sharded
from lorakit.training.memory_plan.answers import answer
from lorakit.training.memory_plan.pool import Block, Pool, rounded
from lorakit.training.memory_plan.workspace import WORKSPACES

Kind = tuple[str, str]
"""What bytes are, and of which part of the model, if that is known: ("activations", "mlp")."""
ROUNDING: Kind = ("rounding", "")
GATHERED: Kind = ("gathered weights", "")
aten = torch.ops.aten
_PLAIN = (Tensor, torch.nn.Parameter)


class Peak(NamedTuple):
    """The moment at which the most bytes were held."""

    total: int
    kinds: Mapping[Kind, int]


class _Held(NamedTuple):
    kind: Kind
    size: int
    filling: int  # bytes of the block beyond it
    block: Block | None


class Ledger(TorchDispatchMode):
    """Books the memory of tensors on one type of device; see the module.

    Attributes:
        kind: What new memory is booked as.
        mark: The name of the moment; `peaks` has the peak of each.
        arena: The arena of the pool that new memory comes from.
        total: The bytes that are held now.
        now: These by kind.
        host: The bytes of copies in host memory that are held now.
        most_on_host: The most that `host` was.
        peaks: The peak of each mark that there was.

    Args:
        device: The type of the device, such as "meta".
        pool: Rounds as CUDA's allocator does, and counts what it reserves. None books bytes as they
            are.
    """

    def __init__(self, device: str, pool: Pool | None = None):
        super().__init__()
        self.device, self.pool = device, pool
        self.kind: Kind = ("activations", "")
        self.arena = ""
        self.total, self.host, self.most_on_host = 0, 0, 0
        self.now: Counter[Kind] = Counter()
        self.peaks: dict[Any, Peak] = {}
        self._held: dict[int, _Held] = {}
        self._on_host: dict[int, int] = {}
        self._wait_there: set[int] = set()  # of these, what is weights
        self._mark: Any = ""

    @property
    def mark(self) -> Any:
        """The name of the moment."""
        return self._mark

    @mark.setter
    def mark(self, mark: Any) -> None:
        self._mark = mark
        self._note()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch calls ten functions of its own around each operator

    # ---- booking ----

    def own(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """Book tensors as of this kind, whatever they were booked as, if at all.

        Those in host memory are weights that wait there.
        """
        for tensor in map(_own_part, tensors):
            key = tensor.untyped_storage()._cdata
            if tensor.device.type != self.device:
                self._wait_there.add(key)
                self.copied_to_host(tensor)
                continue
            held = self._held.get(key)
            if held is None:
                self._book(tensor, kind)
            else:
                self.now[held.kind] -= held.size
                self.now[kind] += held.size
                self._held[key] = held._replace(kind=kind)

    @contextmanager
    def as_kind(self, kind: Kind) -> Iterator[None]:
        """Book new memory under a kind while the `with` block runs."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def while_it_runs(self, kind: Kind, sizes: Iterable[int]) -> Callable[[], None]:
        """Book memory without a tensor, and return what gives it back."""
        held = [self._taken(size, kind) for size in sizes if size]

        def end() -> None:
            for each in held:
                self._given(each)

        return end

    def _book(self, tensor: Tensor, kind: Kind) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held and storage.nbytes():
            self._held[key] = self._taken(storage.nbytes(), kind)
            weakref.finalize(storage, self._gone, key).atexit = False

    def _taken(self, size: int, kind: Kind) -> _Held:
        block = None if self.pool is None or not size else self.pool.take(size, self.arena)
        filling = 0 if self.pool is None else rounded(size) - size
        self.now[kind] += size
        self.now[ROUNDING] += filling
        self.total += size + filling
        self._note()
        return _Held(kind, size, filling, block)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Book memory that was given back, or taken again, while its tensor lived on."""
        key = storage._cdata
        held = self._held.get(key)
        if held is not None and held.size != storage.nbytes():
            self._given(held)
            self._held[key] = self._taken(storage.nbytes(), held.kind)

    def _gone(self, key: int) -> None:
        self._given(self._held.pop(key))

    def _given(self, held: _Held) -> None:
        if held.block is not None and self.pool is not None:
            self.pool.give(held.block)
        self.now[held.kind] -= held.size
        self.now[ROUNDING] -= held.filling
        self.total -= held.size + held.filling

    def _note(self) -> None:
        """Keep the moment if it is the peak of its mark."""
        known = self.peaks.get(self._mark)
        if known is None or self.total > known.total:
            self.peaks[self._mark] = Peak(self.total, dict(+self.now))

    # ---- watching ----

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(each not in _PLAIN for each in types):
            return NotImplemented  # it tells in operations on its parts, which come here
        kwargs = kwargs or {}
        waits = func.namespace == "_c10d_functional" and func not in _GATHERS
        answers = _there if waits else _ANSWERS.get(func, _run)
        out = answers(self, func, *args, **kwargs)
        if func in _GATHERS:
            with self.as_kind(GATHERED):
                self._see(out)
        self._see(out)
        workspace = WORKSPACES.get(func)
        if workspace is not None:
            self.while_it_runs(("workspace", ""), workspace(*args))()
        return out

    def _see(self, out: Any) -> None:
        if isinstance(out, Tensor):
            if out.device.type == self.device:
                self._book(out, self.kind)
        elif isinstance(out, (tuple, list)):
            for each in out:
                self._see(each)

    def copied_to_host(self, copy: Tensor) -> None:
        """Book a copy in host memory for as long as it lives."""
        storage = copy.untyped_storage()
        key = storage._cdata
        if key not in self._on_host:
            self._on_host[key] = storage.nbytes()
            self.host += storage.nbytes()
            self.most_on_host = max(self.most_on_host, self.host)
            weakref.finalize(storage, self._gone_from_host, key).atexit = False

    def _gone_from_host(self, key: int) -> None:
        self.host -= self._on_host.pop(key)


# ---- answers of the meta device, which has none ----


def _run(ledger: Ledger, func: Any, *args: Any, **kwargs: Any) -> Any:
    found = answer(func, args, kwargs) if ledger.device == "meta" else None
    return func(*args, **kwargs) if found is None else found


def _value(ledger: Ledger, func: Any, t: Tensor) -> Any:
    if not t.is_meta:
        return func(t)
    if t.dtype == torch.bool:
        return True
    return 0.0 if t.dtype.is_floating_point else 0


def _own_part(t: Tensor) -> Tensor:
    """Return a tensor, or of one that is divided the part of this rank."""
    return t.to_local().detach() if is_sharded(t) else t


def _copied(ledger: Ledger, func: Any, t: Tensor, **options: Any) -> Tensor:
    """Return a copy that may go to the host, where it is zeros."""
    device = options.get("device")
    if t.untyped_storage()._cdata in ledger._wait_there:
        with ledger.as_kind(GATHERED):
            out: Tensor = func(t, **options)
            ledger._see(out)
            return out
    if not t.is_meta or device is None or device.type == "meta":
        return func(t, **options)
    found = torch.zeros(t.shape, dtype=options.get("dtype") or t.dtype, device=device)
    ledger.copied_to_host(found)
    return found


def _copied_into(ledger: Ledger, func: Any, to: Tensor, t: Tensor, *rest: Any) -> Tensor:
    one_value = ledger.device == "meta" and not any(t.stride())  # stands for a weight of a file
    if to.is_meta or not (t.is_meta or one_value):
        return func(to, t, *rest)
    ledger.copied_to_host(to)  # there is nothing to copy
    return to


def _counts(
    ledger: Ledger, func: Any, t: Tensor, weights: Tensor | None = None, minlength: int = 0
) -> Tensor:
    """Return, in host memory, how often each number occurs: all equally often, as far as can be."""
    if not t.is_meta:
        return func(t, weights, minlength)
    n, bins = len(t), minlength
    return torch.tensor([n * (i + 1) // bins - n * i // bins for i in range(bins)])


def _of_first(ledger: Ledger, func: Any, first: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Torch 2.13 fails on beta, on the meta device; 2.11 in the first of them too."""
    return torch.empty_like(first) if first.is_meta else func(first, *rest, **options)


def _into_out(ledger: Ledger, func: Any, *rest: Any, out: Tensor, **options: Any) -> Tensor:
    return out if out.is_meta else func(*rest, out=out, **options)


def _sent(ledger: Ledger, func: Any, out: Tensor, t: Tensor, *rest: Any) -> tuple[Tensor, Any]:
    """Send nothing to ranks that are not there."""
    if not t.is_meta:
        return func(out, t, *rest)
    from torch._C._distributed_c10d import FakeWork

    return out, FakeWork().boxed()


def _there(ledger: Ledger, func: Any, t: Tensor, *rest: Any) -> Any:
    """Return what was sent, for which torch would make another tensor on the meta device."""
    return t if t.is_meta else func(t, *rest)


_ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _value,
    aten._to_copy.default: _copied,
    aten.copy_.default: _copied_into,
    aten.bincount.default: _counts,
    aten.addmm.dtype: _of_first,
    aten.baddbmm.dtype: _of_first,
    aten._scaled_mm.out: _into_out,
}
_GATHERS: set[Any] = set()
if torch.distributed.is_available():
    _GATHERS.add(torch.ops._c10d_functional.all_gather_into_tensor.default)
    _ANSWERS[torch.ops.c10d._allgather_base_.default] = _sent
