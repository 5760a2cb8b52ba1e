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
robust visual tracking", section 2.1). It is exact while the data has rank k; past that, what was
cut away after one batch cannot come back, and S is a little too small.

The rows that pass are many, so the directions are found by subspace iteration with 2 k vectors
(`subspace_svd`) wherever that is less than everything, always from the same random start: the same
rows give the same bits, and torch's generator does not move.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LorakitError, check
from .initialization import subspace_svd

SUBSPACE_ITERATIONS = 4


class IncrementalSVD:
    """The k main directions of rows that come in batches: `n_components`, or as many as the rows
    have features.

    components: [k, in], fp32: orthonormal rows, the direction of most variance first, each up to
        its sign. Empty before the first batch, as singular_values is.
    singular_values: [k], fp32, of all rows so far less their mean.
    similarity: [k], fp32 in [0, 1]: |cosine| of each component with what it was before the last
        batch; 0 until there was a second.
    rows: how many rows were taken so far.

    Raises LorakitError unless n_components is positive.
    """

    def __init__(self, n_components: int):
        check(n_components > 0, f"n_components must be positive, not {n_components}")
        self.n_components = n_components
        self.rows = 0
        self.components = self.singular_values = torch.empty(0)
        self.similarity = torch.zeros(n_components)
        self._mean = self._total = torch.zeros(())  # [in], and the sum of all squares about it
        self._features: int | None = None
        self._waiting: list[Tensor] = []

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take the rows x [n, in], of any floating dtype.

        Fewer rows than components would leave some of these undetermined, and a few rows more
        change so little that all seems to have settled: such rows wait until there are enough.
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
        n, features = x.shape
        if self.rows == 0:
            self.components = x.new_empty(0, features)
            self.singular_values = x.new_empty(0)
            # the means in fp64: their difference is small beside them
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
            stack, k, width=2 * k, iterations=SUBSPACE_ITERATIONS, generator=generator
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
        """[k], fp32: the variance of all rows so far along each component."""
        return self.singular_values.square() / max(self.rows - 1, 1)

    @property
    def explained_variance_ratio(self) -> Tensor:
        """[k], fp32: the share of the whole variance that is along each component; 0 where nothing
        varies."""
        total = self._total.float().clamp(min=torch.finfo(torch.float32).tiny)
        return self.singular_values.square() / total

    def converged(self, tau: float = 0.99) -> Tensor:
        """[k], bool: which components the last batch turned by less than the angle of cosine
        `tau`."""
        return self.similarity >= tau


def redistribute(
    ratios: Mapping[str, Tensor],
    r: int,
    lora_alpha: float,
    *,
    rho: float = 2.0,
    adjust_scaling_factors: bool = True,
) -> tuple[dict[str, int], dict[str, float]]:
    """The rank and the lora_alpha of each layer, r * len(ratios) ranks in all going to the
    components that explain most of their own layer's variance, at most round(r * rho) to a layer.

    ratios: `explained_variance_ratio` of each layer by its name, [k] in falling order, k at least
        round(r * rho) or the layer's number of features. Of equal ones the earlier component goes
        first, then the earlier layer: layers that read the same input differ by one rank at most.
    adjust_scaling_factors: scale lora_alpha with the rank, so that lora_alpha / rank stays
        lora_alpha / r; otherwise it is `lora_alpha` for all.

    A layer may get rank 0: it needs no adapter. Raises LorakitError for rho below 1.
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
