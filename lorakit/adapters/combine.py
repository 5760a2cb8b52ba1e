"""One adapter from several: the A [r, in] and B [out, r] of one layer, scaling 1 folded in.

Each part i computes s_i B_i A_i and has a weight w_i. Three kinds combine what the parts compute:

    "cat"      A = [w_i s_i A_i] stacked, B = [B_i] side by side: B A = sum w_i s_i B_i A_i, of
               rank sum r_i
    "svd"      the best approximation of that sum of rank `rank`: A = V^T, B = U S
    "linear"   A = sum +-sqrt|w_i s_i| A_i, B = sum sqrt|w_i s_i| B_i, the sign of w_i s_i in A
               alone. Cheap and of rank r, but with the cross terms B_i A_j of parts that never met

The others first prune every part, keeping the fraction `density` of its values, and may let the
parts vote on signs before they are summed:

                        keeps                                  sums
    "magnitude_prune"   the largest                            all
    "ties"              the largest                            those of the majority's sign, by
                                                               their number (arXiv:2306.01708)
    "dare_linear"       random ones, times 1 / density         all (arXiv:2311.03099)
    "dare_ties"         random ones, times 1 / density         as ties

Each does so on A and on B, apart, with the weights of "linear". With "_svd" added it does so on the
products s_i B_i A_i, which is what the papers mean, and takes the best approximation of the result:
several dense [out, in] matrices and one full decomposition a layer, where "svd" needs neither. The
sum of products is B_all A_all with B_all [out, R] and A_all [R, in], R = sum r_i, so

    B_all = Q_B R_B,   A_all^T = Q_A R_A,   R_B R_A^T = U S V^T  [R, R]
    sum = (Q_B U) S (Q_A V)^T

is its singular value decomposition, exactly. Definitions as in PEFT's add_weighted_adapter; the
sign of the majority is that of the values before their weights, as there.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.adapters.layers.lora import LoraPart, lora_layers
from lorakit.adapters.manage import attached, check_adapter, check_new_name
from lorakit.config.adapters import LoraConfig
from lorakit.config.errors import LorakitError, check, nearest
from lorakit.config.patterns import each_alone

PRUNED = ("magnitude_prune", "ties", "dare_linear", "dare_ties")
KINDS = ("linear", "cat", "svd", *PRUNED, *(f"{kind}_svd" for kind in PRUNED))
SIGN_METHODS = ("total", "frequency")


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
    """Attach adapter `name`, made of the adapters `names` by `weights`, one for each; the selected
    one stays selected. Returns `module`.

    kind, rank, density, majority_sign_method: as in `combine`; a layer that only some of the
        adapters have is made of these.
    seed: of what the kinds with "dare" drop; None draws from torch's global generator.

    Raises LorakitError, and changes nothing, if an adapter is missing or `name` is taken, one holds
    more than A and B, or `combine` refuses.
    """
    lists = [isinstance(each, (list, tuple)) for each in (names, weights)]
    check(all(lists), "combine_adapters: names and weights must be lists")
    check(len(names) > 0, "combine_adapters: name at least one adapter")
    for weight in weights:
        good = isinstance(weight, (int, float)) and abs(weight) <= sys.float_info.max
        check(good, f"combine_adapters: a weight must be a number, not {weight!r:.60}")
    for option, value, kinds in (
        ("rank", rank, int),
        ("density", density, (int, float)),
        ("seed", seed, int),
    ):
        good = value is None or (isinstance(value, kinds) and not isinstance(value, bool))
        check(good, f"combine_adapters: {option} must be a number, not {value!r:.60}")
    for each in names:
        check_adapter(module, each, "combine_adapters")
    check_new_name(module, name, "combine_adapters")
    check(len(names) == len(weights), "combine_adapters: give one weight for each adapter")
    layers = lora_layers(module)
    for place, each in attached(module).items():
        for other in set(names) & set(each.adapters):
            part = each.adapters[other]
            plain = isinstance(part, LoraPart) and part.magnitude is part.lora_bias is part.bias
            if not plain:
                raise LorakitError(
                    f"combine_adapters: {other!r} holds more than A and B in {place}; only plain "
                    "low-rank updates are combined"
                )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found = {}
    for place, layer in layers.items():
        mine = [n for n in names if n in layer.adapters]
        if mine:
            parts = [(*layer.adapters[n].pair(), layer.adapters[n].scaling) for n in mine]
            found[place] = combine(
                kind,
                parts,
                [w for n, w in zip(names, weights, strict=True) if n in layer.adapters],
                rank=rank,
                density=density,
                majority_sign_method=majority_sign_method,
                generator=generator,
            )
    ranks = {place: len(A) for place, (A, _) in found.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = each_alone({place: own for place, own in ranks.items() if own != r}, ranks)
    config = LoraConfig(
        r=r, lora_alpha=r, target_modules=list(found), rank_pattern=others, alpha_pattern=others
    )
    for place, (A, B) in found.items():
        part = LoraPart(config, config.scaling(place), A.contiguous(), B.contiguous())
        layers[place].add_part(name, part.requires_grad_(False))
    return module


@torch.no_grad()
def combine(
    kind: str,
    parts: Sequence[tuple[Tensor, Tensor, float]],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], fp32, of the combined adapter; it is to run with scaling 1.

    parts: (A [r_i, in], B [out, r_i], scaling) of each adapter, any floating dtype, one device.
    weights: one for each part; a negative one subtracts it.
    rank: of the result of the kinds that end in "svd"; None: the largest r_i. Beyond the rank that
        the sum can have, the rows of A and columns of B are zero.
    density: the fraction of values that the pruning kinds keep, in (0, 1]; they need it.
    majority_sign_method: whether values vote with their size ("total") or each once
        ("frequency"), for the kinds with "ties".
    generator: draws what the kinds with "dare" keep; None: torch's global one.

    Raises LorakitError for an unknown kind or method, parts whose shapes do not fit each other or
    the kind, and a rank or density that is missing, out of range, or given to a kind without one.
    """
    _check(kind, parts, weights, rank, density, majority_sign_method)
    As, Bs = [A.float() for A, _, _ in parts], [B.float() for _, B, _ in parts]
    scalings = [scaling for _, _, scaling in parts]
    factors = [w * s for w, s in zip(weights, scalings, strict=True)]
    if kind == "cat":
        return torch.cat([f * A for f, A in zip(factors, As, strict=True)]), torch.cat(Bs, dim=1)
    rank = rank or max(map(len, As))
    if kind == "svd":
        QB, RB = torch.linalg.qr(torch.cat(Bs, dim=1))
        QA, RA = torch.linalg.qr(torch.cat([f * A for f, A in zip(factors, As, strict=True)]).t())
        A, B = _truncated(RB @ RA.t(), rank)
        return A @ QA.t(), QB @ B

    def merged(tensors: list[Tensor], by: list[float]) -> Tensor:
        method = kind.removesuffix("_svd")
        return _merge(method, tensors, by, density, majority_sign_method, generator)

    if kind.endswith("_svd"):
        products = [B @ A * s for A, B, s in zip(As, Bs, scalings, strict=True)]
        return _truncated(merged(products, weights), rank)
    roots = [math.sqrt(abs(f)) for f in factors]
    signed = [math.copysign(root, f) for root, f in zip(roots, factors, strict=True)]
    return merged(As, signed), merged(Bs, roots)


def _merge(
    method: str,
    tensors: list[Tensor],
    weights: Sequence[float],
    density: float | None,
    majority_sign_method: str,
    generator: torch.Generator | None,
) -> Tensor:
    """The weighted sum of the pruned tensors, or their mean over those of the majority's sign."""
    if method.startswith("dare"):
        tensors = [_drop(t, density, generator) for t in tensors]
    elif method != "linear":
        tensors = [_trim(t, density) for t in tensors]
    stacked = torch.stack(tensors)
    weighted = stacked * stacked.new_tensor(weights)[:, None, None]
    if not method.endswith("ties"):
        return weighted.sum(0)
    signs = stacked.sign()
    votes = (stacked if majority_sign_method == "total" else signs).sum(0)
    agrees = signs == torch.where(votes >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _trim(t: Tensor, density: float) -> Tensor:
    """`t` with its floor(density * numel) largest values, and zeros."""
    largest = t.abs().flatten().topk(int(density * t.numel()), sorted=False).indices
    kept = torch.zeros_like(t)
    kept.view(-1)[largest] = t.flatten()[largest]
    return kept


def _drop(t: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """Each value with probability `density`, divided by it: `t` on average."""
    if density == 1:
        return t
    return t * torch.bernoulli(torch.full_like(t, density), generator=generator) / density


def _truncated(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """V^T [rank, n] and U S [m, rank] of M [m, n], the best B A of this rank; zeros beyond M's."""
    U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    A, B = M.new_zeros(rank, M.shape[1]), M.new_zeros(M.shape[0], rank)
    A[: len(S)], B[:, : len(S)] = Vt[:rank], (U * S)[:, :rank]
    return A, B


def _check(
    kind: str,
    parts: Sequence[tuple[Tensor, Tensor, float]],
    weights: Sequence[float],
    rank: int | None,
    density: float | None,
    majority_sign_method: str,
) -> None:
    if kind not in KINDS:
        raise LorakitError(
            f"combination_type is {kind!r}{nearest(kind, KINDS)}; it must be one of "
            f"{', '.join(KINDS)}"
        )
    if majority_sign_method not in SIGN_METHODS:
        raise LorakitError(
            f"majority_sign_method is {majority_sign_method!r}"
            f"{nearest(majority_sign_method, SIGN_METHODS)}; it must be total or frequency"
        )
    check(len(parts) > 0, "combine: there is no adapter to combine")
    check(
        len(weights) == len(parts),
        f"combine: {len(parts)} adapters need as many weights, not {len(weights)}",
    )
    for w in weights:
        check(math.isfinite(w), f"combine: a weight must be finite, not {w}")
    out_features, in_features = parts[0][1].shape[0], parts[0][0].shape[-1]
    for A, B, _ in parts:
        r = A.shape[0]
        check(
            A.shape == (r, in_features) and B.shape == (out_features, r),
            f"combine: A {list(A.shape)} and B {list(B.shape)} do not fit a layer of "
            f"{in_features} inputs and {out_features} outputs",
        )
    ranks = sorted({A.shape[0] for A, _, _ in parts})
    check(
        kind == "cat" or kind.endswith("svd") or len(ranks) == 1,
        f"combine: {kind!r} needs adapters of one rank, and these have {ranks}; "
        "cat and the kinds with svd take any",
    )
    if kind.removesuffix("_svd") in PRUNED:
        check(density is not None, f"combine: {kind!r} needs a density")
        check(0 < density <= 1, f"combine: density is {density}; it must be in (0, 1]")
    else:
        check(density is None, f"combine: {kind!r} prunes nothing; leave density out")
    if rank is not None:
        check(kind.endswith("svd"), f"combine: {kind!r} has a rank of its own; leave rank out")
        most = min(in_features, out_features)
        check(1 <= rank <= most, f"combine: rank is {rank}; this layer has {most} at most")
