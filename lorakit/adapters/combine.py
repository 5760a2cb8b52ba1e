"""One adapter from several, layer by layer.

The result on a layer is A [r, in] and B [out, r] with scaling 1. Each given adapter i computes
s_i B_i A_i there and has a weight w_i. Three kinds combine what the adapters compute:

    "cat"      A = [w_i s_i A_i] stacked, B = [B_i] side by side: B A = sum w_i s_i B_i A_i, of
               rank sum r_i
    "svd"      the best approximation of that sum of rank `rank`: A = V^T, B = U S
    "linear"   A = sum +-sqrt|w_i s_i| A_i, B = sum sqrt|w_i s_i| B_i, with the sign of w_i s_i in
               A alone. It is cheap and of rank r, but has the cross terms B_i A_j of adapters that
               never met

The other kinds first prune every adapter: they keep the fraction `density` of its values. Then they
may let the adapters vote on signs before they are summed:

                        keeps                                  sums
    "magnitude_prune"   the largest                            all
    "ties"              the largest                            those of the majority's sign, by
                                                               their number (arXiv:2306.01708)
    "dare_linear"       random ones, times 1 / density         all (arXiv:2311.03099)
    "dare_ties"         random ones, times 1 / density         as ties

Each of them does so on A and on B, apart, with the weights of "linear". With "_svd" added it does
so on the products s_i B_i A_i, which is what the papers mean, and takes the best approximation of
the result. That needs several dense [out, in] matrices and one full decomposition a layer; "svd"
needs neither. Its sum of products is B_all A_all with B_all [out, R] and A_all [R, in],
R = sum r_i, so

    B_all = Q_B R_B,   A_all^T = Q_A R_A,   R_B R_A^T = U S V^T  [R, R]
    sum = (Q_B U) S (Q_A V)^T

is its singular value decomposition, exactly. The definitions are those of PEFT's
add_weighted_adapter. The sign of the majority is that of the values before their weights, as there.
"""

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.adapters.layers.lora import LoraLayer, LoraPart, lora_layers
from lorakit.adapters.manage import attached, check_adapter, check_new_name
from lorakit.config.adapters import LoraConfig
from lorakit.config.errors import LorakitError, check, nearest
from lorakit.config.patterns import each_alone

PRUNED = ("magnitude_prune", "ties", "dare_linear", "dare_ties")
KINDS = ("linear", "cat", "svd", *PRUNED, *(f"{kind}_svd" for kind in PRUNED))
_SIGN_METHODS = ("total", "frequency")


class Update(NamedTuple):
    """The update scaling * B A of one layer's weight by one adapter, of any floating dtype."""

    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    scaling: float


@dataclass(frozen=True)
class Combination:
    """The options of a combination, with the meaning that they have in `combine_adapters`."""

    kind: str
    rank: int | None = None
    density: float | None = None
    majority_sign_method: str = "total"
    generator: torch.Generator | None = None

    @property
    def method(self) -> str:
        """The kind without "_svd": the method that A and B, or their products, are merged by."""
        return self.kind.removesuffix("_svd")


@torch.no_grad()
def combine_adapters(
    module: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    name: str,
    kind: str = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int | None = None,
) -> nn.Module:
    """Attach a new adapter that is made of others.

    The selected adapter stays selected.

    Args:
        module: A module with plain LoRA adapters.
        names: The adapters to combine. If only some of them adapt a layer, it combines these.
        weights: One weight for each adapter; a negative one subtracts it.
        name: The name of the new adapter.
        kind: "linear", "cat", "svd", "magnitude_prune", "ties", "dare_linear" or "dare_ties", the
            last four also with "_svd" added.
        rank: The rank of the result, for the kinds that end in "svd". None takes the largest rank
            of the given adapters. Beyond the rank that the sum can have, A and B hold zeros.
        density: The fraction of values that the pruning kinds keep, in (0, 1]; they need it.
        majority_sign_method: Whether values vote with their size ("total") or each once
            ("frequency"), for the kinds with "ties".
        seed: Seeds what the kinds with "dare" drop. None draws from torch's global generator.

    Returns:
        `module`.

    Raises:
        LorakitError: An adapter is missing or holds more than A and B, `name` is taken, the kind is
            unknown, ranks do not fit it, or an option is missing, out of range, or given to a kind
            that does not use it. Nothing is attached then.
    """
    _check_types(names, weights, {"rank": rank, "density": density, "seed": seed})
    for each in names:
        check_adapter(module, each, "combine_adapters")
    check_new_name(module, name, "combine_adapters")
    check(len(names) == len(weights), "combine_adapters: give one weight for each adapter")
    _check_plain(module, names)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    how = Combination(kind, rank, density, majority_sign_method, generator)
    layers, weight_of = lora_layers(module), list(zip(names, weights, strict=True))
    found = {
        place: _combined(layer, weight_of, how)
        for place, layer in layers.items()
        if any(each in layer.adapters for each in names)
    }
    config = _config({place: len(A) for place, (A, _) in found.items()})
    for place, (A, B) in found.items():
        part = LoraPart(config, config.scaling(place), A.contiguous(), B.contiguous())
        layers[place].add_part(name, part.requires_grad_(False))
    return module


def _check_types(
    names: Sequence[str], weights: Sequence[float], options: Mapping[str, float | None]
) -> None:
    lists = [isinstance(each, (list, tuple)) for each in (names, weights)]
    check(all(lists), "combine_adapters: names and weights must be lists")
    check(len(names) > 0, "combine_adapters: name at least one adapter")
    for weight in weights:
        good = isinstance(weight, (int, float)) and abs(weight) <= sys.float_info.max
        check(good, f"combine_adapters: a weight must be a number, not {weight!r:.60}")
    for option, value in options.items():
        kinds = (int, float) if option == "density" else int
        good = value is None or (isinstance(value, kinds) and not isinstance(value, bool))
        check(good, f"combine_adapters: {option} must be a number, not {value!r:.60}")


def _check_plain(module: nn.Module, names: Sequence[str]) -> None:
    """Raise LorakitError if one of the adapters changes anything by more than an A and a B."""
    for place, each in attached(module).items():
        for name in names:
            if name not in each.adapters:
                continue
            part = each.part_of(name)
            if not isinstance(part, LoraPart) or part.has_extras:
                raise LorakitError(
                    f"combine_adapters: {name!r} holds more than A and B in {place}; only plain "
                    "low-rank updates are combined"
                )


def _combined(
    layer: LoraLayer, weight_of: Sequence[tuple[str, float]], how: Combination
) -> tuple[Tensor, Tensor]:
    """Return A and B of the new adapter on `layer`, made of those adapters that the layer has."""
    own = [(layer.part_of(name), weight) for name, weight in weight_of if name in layer.adapters]
    updates = [Update(*part.pair(), part.scaling) for part, _ in own]
    return combine(updates, [weight for _, weight in own], how)


def _config(ranks: Mapping[str, int]) -> LoraConfig:
    """Return the config of an adapter of these ranks, by layer, with scaling 1 in each."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = each_alone({place: own for place, own in ranks.items() if own != r}, ranks)
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
    )


# ---- one layer ----


@torch.no_grad()
def combine(
    updates: Sequence[Update], weights: Sequence[float], how: Combination
) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r], fp32, of the combined update; it has scaling 1.

    All updates are of one layer and on one device, and each has one weight. Raises LorakitError for
    an unknown kind or method, updates whose shapes do not fit each other or the kind, and a rank or
    density that is missing, out of range, or given to a kind without one.
    """
    _check_kind(how)
    _check_updates(updates, weights, how)
    _check_options(how, *_features(updates))
    As, Bs = [each.A.float() for each in updates], [each.B.float() for each in updates]
    scalings = [each.scaling for each in updates]
    factors = [w * s for w, s in zip(weights, scalings, strict=True)]
    rank = how.rank or max(map(len, As))
    if how.kind == "cat":
        return torch.cat(_scaled(As, factors)), torch.cat(Bs, dim=1)
    if how.kind == "svd":
        return _svd_of_sum(_scaled(As, factors), Bs, rank)
    if how.kind.endswith("_svd"):
        products = [B @ A * s for A, B, s in zip(As, Bs, scalings, strict=True)]
        return _truncated(_merge(products, weights, how), rank)
    roots = [math.sqrt(abs(f)) for f in factors]
    signed = [math.copysign(root, f) for root, f in zip(roots, factors, strict=True)]
    return _merge(As, signed, how), _merge(Bs, roots, how)


def _scaled(tensors: Sequence[Tensor], factors: Sequence[float]) -> list[Tensor]:
    return [f * t for f, t in zip(factors, tensors, strict=True)]


def _svd_of_sum(As: Sequence[Tensor], Bs: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of sum B_i A_i from small matrices; see the module's text."""
    QB, RB = torch.linalg.qr(torch.cat(list(Bs), dim=1))
    QA, RA = torch.linalg.qr(torch.cat(list(As)).t())
    A, B = _truncated(RB @ RA.t(), rank)
    return A @ QA.t(), QB @ B


def _merge(tensors: Sequence[Tensor], weights: Sequence[float], how: Combination) -> Tensor:
    """Prune tensors of one shape; return their weighted sum, or mean over the majority's sign."""
    if how.method in PRUNED:
        tensors = [_prune(t, how) for t in tensors]
    stacked = torch.stack(list(tensors))
    weighted = stacked * stacked.new_tensor(weights)[:, None, None]
    if not how.method.endswith("ties"):
        return weighted.sum(0)
    signs = stacked.sign()
    votes = (stacked if how.majority_sign_method == "total" else signs).sum(0)
    agrees = signs == torch.where(votes >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _prune(t: Tensor, how: Combination) -> Tensor:
    assert how.density is not None  # `_check_options` saw to it
    if how.method.startswith("dare"):
        return _drop(t, how.density, how.generator)
    return _trim(t, how.density)


def _trim(t: Tensor, density: float) -> Tensor:
    """Keep the floor(density * numel) largest values of `t`; the others become zero."""
    largest = t.abs().flatten().topk(int(density * t.numel()), sorted=False).indices
    kept = torch.zeros_like(t)
    kept.view(-1)[largest] = t.flatten()[largest]
    return kept


def _drop(t: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """Keep each value with probability `density`, divided by it: the result is `t` on average."""
    if density == 1:
        return t
    return t * torch.bernoulli(torch.full_like(t, density), generator=generator) / density


def _truncated(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return V^T [rank, n] and U S [m, rank] of M [m, n], the best B A of this rank.

    Beyond the rank of M they hold zeros.
    """
    U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    A, B = M.new_zeros(rank, M.shape[1]), M.new_zeros(M.shape[0], rank)
    A[: len(S)], B[:, : len(S)] = Vt[:rank], (U * S)[:, :rank]
    return A, B


def _check_kind(how: Combination) -> None:
    if how.kind not in KINDS:
        raise LorakitError(
            f"combination_type is {how.kind!r}{nearest(how.kind, KINDS)}; it must be one of "
            f"{', '.join(KINDS)}"
        )
    if how.majority_sign_method not in _SIGN_METHODS:
        raise LorakitError(
            f"majority_sign_method is {how.majority_sign_method!r}"
            f"{nearest(how.majority_sign_method, _SIGN_METHODS)}; it must be total or frequency"
        )


def _features(updates: Sequence[Update]) -> tuple[int, int]:
    """Return how many inputs and outputs the layer of the first update has."""
    return updates[0].A.shape[-1], updates[0].B.shape[0]


def _check_updates(updates: Sequence[Update], weights: Sequence[float], how: Combination) -> None:
    check(len(updates) > 0, "combine: there is no adapter to combine")
    check(
        len(weights) == len(updates),
        f"combine: {len(updates)} adapters need as many weights, not {len(weights)}",
    )
    for w in weights:
        check(math.isfinite(w), f"combine: a weight must be finite, not {w}")
    in_features, out_features = _features(updates)
    for A, B, _ in updates:
        r = A.shape[0]
        check(
            A.shape == (r, in_features) and B.shape == (out_features, r),
            f"combine: A {list(A.shape)} and B {list(B.shape)} do not fit a layer of "
            f"{in_features} inputs and {out_features} outputs",
        )
    ranks = sorted({len(A) for A, _, _ in updates})
    check(
        how.kind == "cat" or how.kind.endswith("svd") or len(ranks) == 1,
        f"combine: {how.kind!r} needs adapters of one rank, and these have {ranks}; "
        "cat and the kinds with svd take any",
    )


def _check_options(how: Combination, in_features: int, out_features: int) -> None:
    kind, density, rank = how.kind, how.density, how.rank
    if how.method not in PRUNED:
        check(density is None, f"combine: {kind!r} prunes nothing; leave density out")
    elif density is None:
        raise LorakitError(f"combine: {kind!r} needs a density")
    else:
        check(0 < density <= 1, f"combine: density is {density}; it must be in (0, 1]")
    if rank is not None:
        check(kind.endswith("svd"), f"combine: {kind!r} has a rank of its own; leave rank out")
        most = min(in_features, out_features)
        check(1 <= rank <= most, f"combine: rank is {rank}; this layer has {most} at most")
