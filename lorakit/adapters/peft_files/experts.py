"""Adapters of experts: fused as in transformers 5, or one for each expert's layers.

transformers 5 keeps the experts of a layer in two parameters, and PEFT adapts each as one:

    A [E r, in]    expert-major: row e r + k is row k of expert e
    B [out, r E]   expert-minor: column k E + e is column k of expert e

`experts.base_layer` is gate_up_proj and `experts` down_proj, one wrapped around the other. The
shapes tell them apart, since gate_up writes twice what down reads. transformers 4, the published
model files, lorakit and most servers have a linear layer for each expert's gate, up and down.
"""

import json
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError

_FUSED = ".experts"
_MOE_NAMES = ("mlp", "gate_proj", "up_proj", "down_proj")  # as ModelConfig.moe_names

_Pair = tuple[Tensor, Tensor]


def experts_place(block: str) -> str:
    """Return how the name of a layer's experts ends; `block` is the MoE block's, or empty."""
    return f".{block}.experts" if block else ".experts"


def fused_place(block: str) -> str:
    """Return the same in transformers 5, which calls all blocks `mlp`."""
    return experts_place(block and "mlp")


def is_fused(key: str) -> bool:
    """Return whether `key`, a name up to .lora_A, is that of the fused experts of a layer."""
    return key.removesuffix(".base_layer").endswith(_FUSED)


def which_fused(shapes: Mapping[str, tuple[int, int]], targets: Sequence[str]) -> dict[str, str]:
    """Return which parameter each of one layer's wrappers adapts: gate_up_proj or down_proj.

    `shapes` holds (in, out) of each wrapper: (h, 2 i) for gate_up and (i, h) for down. For a
    wrapper that stands alone `targets` decides, the adapted parameters. Raises LorakitError where
    neither does.
    """
    leaves = {target.rpartition(".")[2] for target in targets} & {"gate_up_proj", "down_proj"}
    if len(shapes) == 1 and len(leaves) == 1:
        return {next(iter(shapes)): leaves.pop()}
    if len(shapes) == 2:
        for gate_up, down in (list(shapes), list(shapes)[::-1]):
            (h, twice), (i, out) = shapes[gate_up], shapes[down]
            if (h, twice) == (out, 2 * i):
                return {gate_up: "gate_up_proj", down: "down_proj"}
    raise LorakitError(
        f"{next(iter(shapes))}: which of gate_up_proj and down_proj this adapts follows neither "
        f"from its shape nor from target_parameters, {json.dumps(list(targets))}"
    )


def per_expert(a: Tensor, b: Tensor, experts: int) -> _Pair:
    """Return A [E r, in] and B [out, r E] as [E, r, in] and [E, out, r]."""
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)


# ---- fused -> single ----


def split_experts(
    tensors: Mapping[str, Tensor],
    experts: int,
    names: Sequence[str] = _MOE_NAMES,
    target_parameters: Sequence[str] = ("gate_up_proj", "down_proj"),
    interleaved: bool = False,
) -> dict[str, Tensor]:
    """Return PEFT's adapters of fused experts as adapters of each expert's layers.

    Gate and up get the same A, unless B is block-diagonal as `join_experts` makes it: then each
    gets its own half of the rank. The scaling stays.

    Args:
        tensors: The tensors of an adapter file. `….mlp.experts[.base_layer].lora_A.weight`
            [E r, in] and `.lora_B.weight` [out, r E] are split, the others are returned as they
            are.
        experts: How many experts a layer has, E.
        names: What the MoE block, gate, up and down are to be called: `ModelConfig.moe_names`.
        target_parameters: The adapted parameters. They tell where a layer's only pair belongs.
        interleaved: Whether rows of gate and up take turns in B of gate_up_proj, as in gpt-oss
            (`ModelConfig.experts_interleaved`); else all of gate stand first.

    Returns:
        The tensors of each expert e, `….<block>.experts.<e>.<gate|up|down>.lora_A.weight` [r, in]
        and `.lora_B.weight` [out, r], and the others.

    Raises:
        LorakitError: A tensor lacks its counterpart, `experts` is no positive number, or a rank is
            no multiple of it.
    """
    if type(experts) is not int or experts < 1:
        raise LorakitError(
            f"split_experts: experts must be a whole number from 1 on, not {experts}"
        )
    pairs, result = _fused_pairs(tensors, experts)
    for key, (a, b) in pairs.items():
        outer = key.removesuffix(".base_layer")
        both = (outer, outer + ".base_layer")
        shapes = {k: (pairs[k][0].shape[1], pairs[k][1].shape[0]) for k in both if k in pairs}
        kind = which_fused(shapes, target_parameters)[key]
        prefix = outer.removesuffix(fused_place(names[0])) + experts_place(names[0])
        every = per_expert(a, b, experts)
        for leaf, (every_a, every_b) in _by_leaf(kind, *every, names, interleaved).items():
            for e in range(experts):
                result[f"{prefix}.{e}.{leaf}.lora_A.weight"] = every_a[e].contiguous()
                result[f"{prefix}.{e}.{leaf}.lora_B.weight"] = every_b[e].contiguous()
    return result


def _fused_pairs(
    tensors: Mapping[str, Tensor], experts: int
) -> tuple[dict[str, _Pair], dict[str, Tensor]]:
    """Return A and B of each fused parameter by its name up to .lora_A, and the other tensors."""
    halves: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name)
        if found is not None and is_fused(found[1]):
            halves.setdefault(found[1], {})[found[2]] = tensor
        else:
            rest[name] = tensor
    pairs = {}
    for key, found_halves in halves.items():
        if found_halves.keys() != {"A", "B"}:
            raise LorakitError(f"split_experts: {key} has only one of lora_A and lora_B")
        a, b = found_halves["A"], found_halves["B"]
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or not len(a) or len(a) % experts:
            raise LorakitError(
                f"split_experts: {key}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are "
                f"not those of {experts} experts"
            )
        pairs[key] = a, b
    return pairs, rest


def _by_leaf(
    kind: str, a: Tensor, b: Tensor, names: Sequence[str], interleaved: bool
) -> dict[str, _Pair]:
    """Return A [E, r, in] and B [E, out, r] of a fused parameter for each layer that it holds."""
    _, gate, up, down = names
    if kind == "down_proj":
        return {down: (a, b)}
    if interleaved:
        b = torch.cat((b[:, 0::2], b[:, 1::2]), dim=1)
    of_gate, of_up = b[:, : b.shape[1] // 2], b[:, b.shape[1] // 2 :]
    if not _block_diagonal(b):
        return {gate: (a, of_gate), up: (a, of_up)}
    half = b.shape[2] // 2
    return {gate: (a[:, :half], of_gate[:, :, :half]), up: (a[:, half:], of_up[:, :, half:])}


def _block_diagonal(b: Tensor) -> bool:
    """Return whether B [E, 2 i, r] is two blocks [i, r / 2], neither zero in all experts."""
    if b.shape[1] % 2 or b.shape[2] % 2:
        return False
    (g, no), (nothing, u) = (rows.chunk(2, dim=2) for rows in b.chunk(2, dim=1))
    return bool(g.any() and u.any() and not no.any() and not nothing.any())


# ---- single -> fused ----

# The tensors of a layer's experts: (leaf, "A" or "B") -> expert -> tensor
_Experts = dict[tuple[str, str], dict[int, Tensor]]


def join_experts(
    tensors: Mapping[str, Tensor],
    names: Sequence[str] = _MOE_NAMES,
    interleaved: bool = False,
) -> dict[str, Tensor]:
    """Return adapters of single experts as PEFT keeps them with transformers 5.

    This is the inverse of `split_experts`. Gate and up have an A each, so gate_up_proj gets both,
    rank 2 r, and a block-diagonal B. Its alpha must be 2 alpha then (with rsLoRA sqrt(2) alpha).
    The caller sets rank_pattern and alpha_pattern for gate_up_proj, and target_parameters.

    Args:
        tensors: The tensors of an adapter file. Those that belong to no expert are returned as they
            are.
        names: What the MoE block, gate, up and down are called: `ModelConfig.moe_names`.
        interleaved: Whether rows of gate and up take turns in B of gate_up_proj, as in gpt-oss.

    Returns:
        The fused tensors, `….mlp.experts[.base_layer].lora_A.weight` [E r, in] and
        `.lora_B.weight` [out, r E], and the others.

    Raises:
        LorakitError: An expert, or gate or up of one, is missing, or their shapes differ.
    """
    layers, result = _single_experts(tensors, names)
    _, gate, up, down = names
    for layer, parts in layers.items():
        leaves = {leaf for leaf, _ in parts}
        if (gate in leaves) != (up in leaves):
            raise LorakitError(
                f"join_experts: {layer}: {gate} and {up} can only be joined together"
            )
        wanted = [(leaf, half) for leaf in (gate, up, down) if leaf in leaves for half in "AB"]
        stacks = {which: _stack(layer, parts, *which) for which in wanted}
        outer = layer + fused_place(names[0])
        if gate in leaves:
            a = torch.cat([stacks[gate, "A"], stacks[up, "A"]], dim=1)
            blocks = zip(stacks[gate, "B"], stacks[up, "B"], strict=True)
            b = torch.stack([torch.block_diag(g, u) for g, u in blocks])
            if interleaved:
                b = b.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            _put_fused(result, f"{outer}.base_layer" if down in leaves else outer, a, b)
        if down in leaves:
            _put_fused(result, outer, stacks[down, "A"], stacks[down, "B"])
    return result


def _single_experts(
    tensors: Mapping[str, Tensor], names: Sequence[str]
) -> tuple[dict[str, _Experts], dict[str, Tensor]]:
    """Return the tensors of each layer's experts, and the other tensors."""
    place, leaves = re.escape(experts_place(names[0])), map(re.escape, names[1:])
    expert = re.compile(rf"(.+){place}\.(\d+)\.({'|'.join(leaves)})\.lora_([AB])\.weight")
    layers: dict[str, _Experts] = {}
    rest = {}
    for name, tensor in tensors.items():
        found = expert.fullmatch(name)
        if found is None:
            rest[name] = tensor
        else:
            layer, e, leaf, half = found.groups()
            layers.setdefault(layer, {}).setdefault((leaf, half), {})[int(e)] = tensor
    return layers, rest


def _stack(layer: str, parts: _Experts, leaf: str, half: str) -> Tensor:
    """Return one tensor of every expert, [E, rows, columns]."""
    experts = 1 + max(e for found in parts.values() for e in found)
    found = parts.get((leaf, half), {})
    for e in range(experts):
        if e not in found:
            raise LorakitError(
                f"join_experts: {layer}: lora_{half} of expert {e}'s {leaf} is missing"
            )
        if found[e].shape != found[0].shape:
            raise LorakitError(
                f"join_experts: {layer}: lora_{half} of expert {e}'s {leaf} is "
                f"{tuple(found[e].shape)}, of expert 0's {tuple(found[0].shape)}"
            )
    return torch.stack([found[e] for e in range(experts)])


def _put_fused(result: dict[str, Tensor], key: str, a: Tensor, b: Tensor) -> None:
    """Put A [E, r, in] and B [E, out, r] into `result` as PEFT lays them out."""
    result[f"{key}.lora_A.weight"] = a.flatten(0, 1)
    result[f"{key}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1).contiguous()
