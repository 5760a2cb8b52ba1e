"""EVA: A starts as the main directions of what its layer reads (arXiv:2410.07170).

The right singular vectors of a layer's inputs X [rows, in], less their mean, are the directions in
which the data varies most. Rows of A along them (and B = 0) keep most of X in A X^T; the paper
finds that this trains faster than random rows do. What share of the variance each direction
explains also says which layers need more of them, so ranks move between layers.

X is never held. `IncrementalSVD` keeps k directions V^T with their singular values S, the mean and
the count, and takes the next rows by decomposing the small matrix

    [ S V^T                           ]   [k, in]       what was kept
    [ X_new - mean_new                ]   [n, in]       the new rows
    [ sqrt(N n / (N + n)) (mean - mean_new) ]  [1, in]  the step between the two means

whose Gram matrix is the scatter of all rows so far (Ross et al. 2008, "Incremental learning for
robust visual tracking", section 2.1). It is exact while the data has rank k. Past that, what was
cut away after one batch cannot come back, and S is a little too small.

Many rows pass, so the directions are found by subspace iteration with 2 k vectors (`subspace_svd`)
wherever that is less than a whole decomposition. It always begins at one and the same random start,
so equal rows give equal bits, and torch's generator does not move.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lorakit.adapters.initialize import subspace_svd
from lorakit.adapters.layers.lora import LoraLinear, LoraPart
from lorakit.adapters.layers.wrapper import Part
from lorakit.adapters.manage import attached, remove_parts, require_selected
from lorakit.config.adapters import LoraConfig
from lorakit.config.errors import LorakitError, check
from lorakit.config.patterns import each_alone

_SUBSPACE_ITERATIONS = 4
_TAU = 0.99  # the cosine from which on a direction counts as found

Batch = Tensor | Mapping[str, Tensor]

log = logging.getLogger("lorakit")


@dataclass(frozen=True)
class EvaResult:
    """The outcome of EVA, which prints as one line."""

    ranks: dict[str, int]
    """The rank of each layer by its name, 0 where no direction is worth it."""
    batches: int
    """How many batches were read."""
    converged: bool
    """Whether all directions had settled before the batches ended."""

    def __str__(self) -> str:
        given = [r for r in self.ranks.values() if r]
        until = "until all directions settled" if self.converged else "all that there were"
        return (
            f"EVA: {self.batches} batches, {until}; ranks {min(given)} to {max(given)} in "
            f"{len(given)} of {len(self.ranks)} layers"
        )


@torch.no_grad()
def eva(
    module: nn.Module, batches: Iterable[Batch], *, rho: float = 2.0, tau: float = _TAU
) -> EvaResult:
    """Start the selected LoRA adapter from what its linear layers read, and move ranks.

    The adapter then has the rank where it explains most of the data (arXiv:2410.07170). What it
    held is lost. B is zero, so the model's outputs do not change yet.

    Args:
        module: The model that the adapter is attached to.
        batches: Token ids, int64 [B, T], or mappings of keywords for `module`; positions where
            their attention_mask is 0 do not count. No more batches are taken than are needed.
        rho: No layer gets more than rho times the adapter's r. 1 leaves all ranks as they are.
        tau: A direction is found when a batch turns it by less than the angle of this cosine.

    Returns:
        The rank of each layer, and how many batches it took.

    Raises:
        LorakitError: No adapter is selected, it is merged, is on no linear layer or has a
            rank_pattern, an argument is out of range, a layer sees fewer rows than it needs, or an
            input is not finite. Nothing has changed then.
    """
    name = require_selected(module, "eva")
    layers = {
        place: layer
        for place, layer in module.named_modules()
        if isinstance(layer, LoraLinear) and name in layer.adapters
    }
    config = _checked_config(layers, name)
    good = isinstance(rho, (int, float)) and 1 <= rho < 1e6
    check(good, f"eva: rho must be at least 1, and below 10^6, not {rho!r:.60}")
    check(isinstance(batches, Iterable), f"eva: batches must be iterable, not {batches!r:.60}")
    watch = _Watch(layers, round(config.r * rho))
    count, done = 0, False
    with watch:
        for batch in tqdm(batches, desc="EVA", unit="batch", disable=None, leave=False):
            watch.run(module, batch)
            count += 1
            if done := watch.converged(tau):
                break
    if (short := watch.layer_short_of_rows()) is not None:
        raise LorakitError(
            f"eva: {short} saw too few rows in {count} batches; it needs {watch.n_components}"
        )
    if not done:
        log.warning("lorakit: eva: some directions had not settled after %d batches", count)
    ranks = _start_layers(module, name, config, watch, rho)
    return EvaResult(ranks, count, done)


def _checked_config(layers: Mapping[str, LoraLinear], name: str) -> LoraConfig:
    """Return the config of adapter `name` on these layers, if EVA can start it."""
    check(len(layers) > 0, "eva: the adapter is on no linear layer")
    config = next(iter(layers.values())).part_of(name).config
    check(all(m.merged is None for m in layers.values()), "eva: the adapter is merged; unmerge it")
    check(not config.rank_pattern, "eva: it finds the ranks itself; leave rank_pattern out")
    return config


def _start_layers(
    module: nn.Module, name: str, config: LoraConfig, watch: "_Watch", rho: float
) -> dict[str, int]:
    """Give every layer its rank and its start, and return the ranks."""
    layers = watch.layers
    ratios = {place: watch.svd_of[place].explained_variance_ratio for place in layers}
    ranks, alphas = redistribute(ratios, config.r, config.lora_alpha, rho=rho)
    moved = [place for place, r in ranks.items() if r not in (0, config.r)]
    config = dataclasses.replace(
        config,
        rank_pattern=each_alone({place: ranks[place] for place in moved}, ranks),
        alpha_pattern=each_alone({place: alphas[place] for place in moved}, ranks),
    )
    for place, layer in layers.items():
        if ranks[place]:
            A = watch.svd_of[place].components[: ranks[place]]
            _start_layer(layer, name, config, config.scaling(place), A)
    remove_parts(module, name, [place for place, r in ranks.items() if r == 0], name)
    for wrapper in attached(module).values():  # the parts of embeddings belong to the adapter too
        part = wrapper.part_of(name) if name in wrapper.adapters else None
        if isinstance(part, Part):
            part.config = config
        if isinstance(part, LoraPart):
            part.awaits = None
    return ranks


def _start_layer(
    layer: LoraLinear, name: str, config: LoraConfig, scaling: float, A: Tensor
) -> None:
    """Put a part with this A [r, in] and B = 0 in the place of the layer's own."""
    old = layer.part_of(name)
    B = old.lora_B.new_zeros(old.lora_B.shape[0], len(A))
    part = LoraPart(config, scaling, A.to(old.lora_A.device).clone(), B)
    layer.complete(part)
    layer.add_part(name, part)
    layer.select(name)


class _Watch:
    """Watch what layers read while a module runs, and decompose it.

    Layers that read the very same tensor, as q, k and v do, share one decomposition. The first of
    them feeds it.
    """

    def __init__(self, layers: Mapping[str, LoraLinear], n_components: int):
        self.layers, self.n_components = layers, n_components
        self.svd_of: dict[str, IncrementalSVD] = {}
        self.feeder_of: dict[IncrementalSVD, str] = {}
        self.mask: Tensor | None = None
        # The inputs of this run by their ids. An id is a tensor's own only while the tensor lives.
        self.seen: dict[int, tuple[Tensor, IncrementalSVD]] = {}

    def __enter__(self) -> "_Watch":
        self.hooks = [
            layer.register_forward_pre_hook(lambda m, args, place=place: self._take(place, args[0]))
            for place, layer in self.layers.items()
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self.hooks:
            hook.remove()

    def run(self, module: nn.Module, batch: Batch) -> None:
        """Run `module` on a batch, and take what its layers read."""
        self.seen, self.mask = {}, None
        if isinstance(batch, Mapping):
            self.mask = batch.get("attention_mask")
            module(**batch)
        else:
            module(batch)

    def _take(self, place: str, x: Tensor) -> None:
        """Take the input x [..., in] of the layer at `place`."""
        if place not in self.svd_of:
            if id(x) in self.seen:
                self.svd_of[place] = self.seen[id(x)][1]
            else:
                self.svd_of[place] = IncrementalSVD(self.n_components)
                self.feeder_of[self.svd_of[place]] = place
        svd = self.svd_of[place]
        self.seen[id(x)] = (x, svd)
        if self.feeder_of[svd] == place:
            if self.mask is not None and self.mask.shape == x.shape[:-1]:
                svd.update(x[self.mask.bool()])
            else:
                svd.update(x.reshape(-1, x.shape[-1]))

    def converged(self, tau: float) -> bool:
        """Return whether the directions of all layers have settled."""
        whole = len(self.svd_of) == len(self.layers)
        return whole and all(bool(svd.converged(tau).all()) for svd in self.feeder_of)

    def layer_short_of_rows(self) -> str | None:
        """Return the name of a layer that has not read enough rows; None if all have."""
        for place in self.layers:
            if place not in self.svd_of or not self.svd_of[place].rows:
                return place
        return None


class IncrementalSVD:
    """The k main directions of rows that come in batches.

    k is `n_components`, or the number of features where that is smaller. All tensors are fp32.

    Attributes:
        components: [k, in], orthonormal rows, the direction of most variance first, each up to its
            sign. It is empty before the first batch, as singular_values is.
        singular_values: [k], the singular values of all rows so far, less their mean.
        similarity: [k] in [0, 1], |cosine| of each component with what it was before the last
            batch; 0 until there was a second one.
        rows: How many rows were taken so far.
    """

    def __init__(self, n_components: int):
        check(n_components > 0, f"n_components must be positive, not {n_components}")
        self.n_components = n_components
        self.rows = 0
        self.components = self.singular_values = torch.empty(0)
        self.similarity = torch.zeros(n_components)
        self._mean = torch.zeros(())  # [in]
        self._total = torch.zeros(())  # the sum of all squares about the mean
        self._features: int | None = None
        self._waiting: list[Tensor] = []

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take the rows x [n, in], of any floating dtype.

        Fewer rows than components would leave some of these undetermined, and a few rows more
        change so little that all seems to have settled. Such rows wait until there are enough.
        Raises LorakitError for an x that is no matrix, has another number of features than
        before, or holds NaN or infinite values.
        """
        if x.dim() != 2 or self._features not in (None, x.shape[1]):
            wanted = self._features or "features"
            raise LorakitError(f"EVA: the rows must be [n, {wanted}], not {list(x.shape)}")
        if not torch.isfinite(x).all():
            raise LorakitError("EVA: the inputs of a layer hold NaN or infinite values")
        self._features = x.shape[1]
        self._waiting.append(x.float())
        if sum(map(len, self._waiting)) >= self.n_components:
            self._take(torch.cat(self._waiting))
            self._waiting = []

    def _take(self, x: Tensor) -> None:
        """Decompose the kept directions together with the rows x [n, in], n >= n_components."""
        n, features = x.shape
        if self.rows == 0:
            self.components = x.new_empty(0, features)
            self.singular_values = x.new_empty(0)
            # The means are fp64, because their difference is small beside them.
            self._mean = x.new_zeros(features, dtype=torch.float64)
            self._total = x.new_zeros((), dtype=torch.float64)
        mean = x.mean(0, dtype=torch.float64)
        step = (self.rows * n / (self.rows + n)) ** 0.5 * (self._mean - mean)
        centred = x - mean.float()
        kept = self.singular_values[:, None] * self.components
        stack = torch.cat([kept, centred, step.float()[None]])  # [k + n + 1, in]
        k = min(self.n_components, features)
        generator = torch.Generator(x.device).manual_seed(0)
        _, values, components = subspace_svd(
            stack, k, width=2 * k, iterations=_SUBSPACE_ITERATIONS, generator=generator
        )
        if self.rows == 0:
            self.similarity = torch.zeros_like(values)
        else:
            self.similarity = F.cosine_similarity(components, self.components).abs()
        self._total = self._total + centred.double().square().sum() + step.square().sum()
        self._mean = (self.rows * self._mean + n * mean) / (self.rows + n)
        self.components, self.singular_values = components.contiguous(), values
        self.rows += n

    @property
    def explained_variance(self) -> Tensor:
        """The variance of all rows so far along each component, [k]."""
        return self.singular_values.square() / max(self.rows - 1, 1)

    @property
    def explained_variance_ratio(self) -> Tensor:
        """The share of the whole variance along each component, [k]; 0 where nothing varies."""
        total = self._total.float().clamp(min=torch.finfo(torch.float32).tiny)
        return self.singular_values.square() / total

    def converged(self, tau: float = _TAU) -> Tensor:
        """Return which components have settled, bool [k].

        A component has settled if the last batch turned it by less than the angle of cosine `tau`.
        """
        return self.similarity >= tau


def redistribute(
    ratios: Mapping[str, Tensor],
    r: int,
    lora_alpha: float,
    *,
    rho: float = 2.0,
    adjust_scaling_factors: bool = True,
) -> tuple[dict[str, int], dict[str, float]]:
    """Divide ranks among layers by how much of their variance the components explain.

    There are r * len(ratios) ranks to give away. They go to the components that explain most of
    their own layer's variance, and at most round(r * rho) to one layer. A layer of rank 0 needs no
    adapter.

    Args:
        ratios: The `explained_variance_ratio` of each layer by its name: [k] in falling order, with
            k at least round(r * rho) or the layer's number of features. Among equal ratios the
            earlier component goes first, then the earlier layer. So layers that read the same input
            differ by one rank at most.
        r: The mean rank of a layer.
        lora_alpha: The alpha of a layer of rank r.
        rho: How many times r a layer may have.
        adjust_scaling_factors: Scale lora_alpha with the rank, so that lora_alpha / rank stays
            lora_alpha / r. Otherwise it is `lora_alpha` for all.

    Returns:
        The rank and the lora_alpha of each layer, by its name.

    Raises:
        LorakitError: `r` is not positive, or `rho` is below 1.
    """
    check(r > 0, f"r must be positive, not {r}")
    check(rho >= 1, f"rho must be at least 1, not {rho}")
    most = round(r * rho)
    candidates = [
        (-value, component, position, name)
        for position, (name, values) in enumerate(ratios.items())
        for component, value in enumerate(values[:most].tolist())
    ]
    ranks = dict.fromkeys(ratios, 0)
    for *_, name in sorted(candidates)[: r * len(ratios)]:
        ranks[name] += 1
    if not adjust_scaling_factors:
        return ranks, dict.fromkeys(ratios, lora_alpha)
    return ranks, {name: lora_alpha * rank / r for name, rank in ranks.items()}
