"""Adapters of experts that are fused, and of single ones: the two layouts of PEFT.

transformers 5 keeps the experts of a layer in two parameters, and PEFT adapts each as one:

    A [E r, in]    expert-major: row e r + k is row k of expert e
    B [out, r E]   expert-minor: column k E + e is column k of expert e

`experts.base_layer` is gate_up_proj and `experts` down_proj, one wrapped around the other; the
shapes tell them apart, since gate_up writes twice what down reads. transformers 4, the published
checkpoints, lorakit and most servers have a linear layer for each expert's gate, up and down.
"""

import json
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError

FUSED = ".experts"
MOE_NAMES = ("mlp", "gate_proj", "up_proj", "down_proj")  # as ModelConfig.moe_names


def is_fused(key: str) -> bool:
    """Whether `key`, a name up to .lora_A, is that of the fused experts of a layer."""
    return key.removesuffix(".base_layer").endswith(FUSED)


def which_fused(shapes: Mapping[str, tuple[int, int]], targets: Sequence[str]) -> dict[str, str]:
    """gate_up_proj or down_proj for each of one layer's wrappers, by (in, out) of each: gate_up is
    (h, 2 i), down (i, h). One wrapper alone goes by `targets`, the adapted parameters.
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


def per_expert(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A [E r, in] and B [out, r E] as [E, r, in] and [E, out, r]."""
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)


def split_experts(
    tensors: Mapping[str, Tensor],
    experts: int,
    names: Sequence[str] = MOE_NAMES,
    target_parameters: Sequence[str] = ("gate_up_proj", "down_proj"),
) -> dict[str, Tensor]:
    """PEFT's adapters of fused experts as adapters of each expert's layers.

    tensors: of an adapter file. `….mlp.experts[.base_layer].lora_A.weight` [E r, in] and
        `.lora_B.weight` [out, r E] are split, the others are returned as they are.
    experts: how many experts a layer has, E.
    names: what the MoE block, gate, up and down are to be called: `ModelConfig.moe_names`.
    target_parameters: the adapted parameters, which tell what a layer's only pair belongs to.

    Returns `….<block>.experts.<e>.<gate|up|down>.lora_A.weight` [r, in] and `.lora_B.weight`
    [out, r], to be scaled as before. Gate and up get the same A, unless B is block-diagonal as
    `join_experts` makes it: then each gets its own half of the rank. Raises LorakitError for a
    tensor without its counterpart or whose rank is no multiple of `experts`.
    """
    if type(experts) is not int or experts < 1:
        raise LorakitError(
            f"split_experts: experts must be a whole number from 1 on, not {experts}"
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    result = {}
    for name, tensor in tensors.items():
        key, part = _fused_part(name)
        if part:
            pairs.setdefault(key, {})[part] = tensor
        else:
            result[name] = tensor
    for key, pair in pairs.items():
        if pair.keys() != {"a", "b"}:
            raise LorakitError(f"split_experts: {key} has only one of lora_A and lora_B")
        a, b = pair["a"], pair["b"]
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or not len(a) or len(a) % experts:
            raise LorakitError(
                f"split_experts: {key}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are "
                f"not those of {experts} experts"
            )
    block, gate, up, down = names
    for key, pair in pairs.items():
        outer = key.removesuffix(".base_layer")
        shapes = {
            k: (pairs[k]["a"].shape[1], pairs[k]["b"].shape[0])
            for k in (outer, outer + ".base_layer")
            if k in pairs
        }
        kind = which_fused(shapes, target_parameters)[key]
        a, b = per_expert(pair["a"], pair["b"], experts)
        prefix = re.sub(r"\.mlp\.experts$", f".{block}.experts", outer)
        both = {gate: (a, b[:, : b.shape[1] // 2]), up: (a, b[:, b.shape[1] // 2 :])}
        if kind == "down_proj":
            both = {down: (a, b)}
        elif _block_diagonal(b):
            half = b.shape[2] // 2
            both = {
                gate: (a[:, :half], both[gate][1][:, :, :half]),
                up: (a[:, half:], both[up][1][:, :, half:]),
            }
        for leaf, (every_a, every_b) in both.items():
            for e in range(experts):
                result[f"{prefix}.{e}.{leaf}.lora_A.weight"] = every_a[e].contiguous()
                result[f"{prefix}.{e}.{leaf}.lora_B.weight"] = every_b[e].contiguous()
    return result


def _fused_part(name: str) -> tuple[str, str | None]:
    for suffix, part in ((".lora_A.weight", "a"), (".lora_B.weight", "b")):
        if name.endswith(suffix) and is_fused(name.removesuffix(suffix)):
            return name.removesuffix(suffix), part
    return name, None


def _block_diagonal(b: Tensor) -> bool:
    """Whether B [E, 2 i, r] is blocks of [i, r / 2], neither of them zero in all experts."""
    if b.shape[1] % 2 or b.shape[2] % 2:
        return False
    (g, no), (nothing, u) = (rows.chunk(2, dim=2) for rows in b.chunk(2, dim=1))
    return bool(g.any() and u.any() and not no.any() and not nothing.any())


def join_experts(
    tensors: Mapping[str, Tensor], names: Sequence[str] = MOE_NAMES
) -> dict[str, Tensor]:
    """The inverse of `split_experts`: adapters of single experts as PEFT keeps them with
    transformers 5. `names` are the given ones; other tensors are returned as they are.

    Gate and up have an A each, so gate_up_proj gets both, rank 2 r, and a block-diagonal B; its
    alpha must be 2 alpha then (with rsLoRA sqrt(2) alpha): set rank_pattern and alpha_pattern for
    gate_up_proj, and target_parameters. Raises LorakitError where an expert, or gate or up of one,
    is missing, or their shapes differ.
    """
    block, gate, up, down = names
    expert = re.compile(
        rf"(.+)\.{re.escape(block)}\.experts\.(\d+)\.({'|'.join(map(re.escape, names[1:]))})"
        r"\.lora_([AB])\.weight"
    )
    result: dict[str, Tensor] = {}
    layers: dict[str, dict[tuple[str, str], dict[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        found = expert.fullmatch(name)
        if found:
            layer, e, leaf, part = found.groups()
            layers.setdefault(layer, {}).setdefault((leaf, part), {})[int(e)] = tensor
        else:
            result[name] = tensor
    for layer, parts in layers.items():
        experts = 1 + max(e for found in parts.values() for e in found)
        leaves = {leaf for leaf, _ in parts}
        if (gate in leaves) != (up in leaves):
            raise LorakitError(
                f"join_experts: {layer}: {gate} and {up} can only be joined together"
            )
        wanted = [(leaf, part) for leaf in (gate, up, down) if leaf in leaves for part in "AB"]
        stacks = {(leaf, part): _stack(layer, parts, leaf, part, experts) for leaf, part in wanted}
        outer = f"{layer}.mlp.experts"
        if gate in leaves:
            a = torch.cat([stacks[gate, "A"], stacks[up, "A"]], dim=1)
            b = torch.stack(
                [
                    torch.block_diag(g, u)
                    for g, u in zip(stacks[gate, "B"], stacks[up, "B"], strict=True)
                ]
            )
            _put_fused(result, f"{outer}.base_layer" if down in leaves else outer, a, b)
        if down in leaves:
            _put_fused(result, outer, stacks[down, "A"], stacks[down, "B"])
    return result


def _stack(layer: str, parts: Mapping, leaf: str, part: str, experts: int) -> Tensor:
    """One tensor of every expert, [E, rows, columns]."""
    found = parts.get((leaf, part), {})
    for e in range(experts):
        if e not in found:
            raise LorakitError(
                f"join_experts: {layer}: lora_{part} of expert {e}'s {leaf} is missing"
            )
        if found[e].shape != found[0].shape:
            raise LorakitError(
                f"join_experts: {layer}: lora_{part} of expert {e}'s {leaf} is "
                f"{tuple(found[e].shape)}, of expert 0's {tuple(found[0].shape)}"
            )
    return torch.stack([found[e] for e in range(experts)])


def _put_fused(result: dict[str, Tensor], key: str, a: Tensor, b: Tensor) -> None:
    result[f"{key}.lora_A.weight"] = a.flatten(0, 1)
    result[f"{key}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1).contiguous()
