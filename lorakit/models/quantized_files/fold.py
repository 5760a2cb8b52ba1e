"""Checkpoints that another tool quantized, as one dense weight for each group of their tensors.

`dequantized` reads what `quantization_config` of config.json says: the tool, which decides how
tensors are named and packed. Which weights are quantized is seen by the tensors beside them, so
that lists of layers that were left out say nothing more. Scales of activations and of the cache are
left aside: lorakit quantizes neither.

Every weight is read as it is asked for and is dense then, in fp32. So it can be kept in 16 bits, or
packed to NF4 or int8 while the model is loaded, as any other.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.files.safetensors import LazyTensor
from lorakit.models.quantized_files import fp4, fp8, integers
from lorakit.models.quantized_files.parts import Parts, Read, Said, config_groups

_IGNORED = (
    *(".activation_scale", ".input_scale", ".input_global_scale", ".input_zero_point"),
    *(".output_scale", ".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_output_scale"),
)
"""Ends of names of tensors that belong to activations or to the cache."""


class _Method(NamedTuple):
    """How the files of one tool are read."""

    readers: Mapping[str, Callable[[Parts, Said], Read]]
    """The end of a tensor's name that shows a quantized weight -> its reader, in this order.

    The first character divides it from the name of the weight."""
    formats: tuple[str | None, ...] = ()
    """The formats that are read, if the tool has several."""
    key: str = ""
    """The key of quantization_config that says the format."""


def _packed(parts: Parts, said: Said) -> Read:
    """Read what compressed-tensors packs: 4-bit floats in bytes, or integers in words."""
    codes = parts.left.get(f"{parts.beginning}weight_packed")
    floats = codes is not None and codes.dtype == "U8"
    return (fp4 if floats else integers).compressed_tensors(parts, said)


METHODS = {
    "fp8": _Method({".weight_scale_inv": fp8.fine_grained, ".weight_scale": fp8.plain}),
    "fbgemm_fp8": _Method({".weight_scale": fp8.plain}),
    "modelopt": _Method({".weight_scale_2": fp4.modelopt, ".weight_scale": fp8.plain}),
    "mxfp4": _Method({"_blocks": fp4.gpt_oss}),
    "gptq": _Method({".qweight": integers.gptq}, (None, "gptq", "gptq_v2"), "checkpoint_format"),
    "awq": _Method({".qweight": integers.awq}, (None, "gemm", "GEMM"), "version"),
    "compressed-tensors": _Method(
        {".weight_packed": _packed, ".weight_scale": fp8.plain},
        (
            *(None, "dense", "naive-quantized", "float-quantized", "int-quantized"),
            *("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"),
            *("mxfp8-quantized", "mixed-precision"),
        ),
        "format",
    ),
}
"""quant_method of a quantization_config -> how such files are read."""


def check_method(quantization: Any, where: str) -> None:
    """Raise LorakitError if files with this quantization_config are not read."""
    said = quantization if isinstance(quantization, Mapping) else {}
    name = said.get("quant_method")
    if name == "bitsandbytes":  # whose packed weights stay packed
        return
    method = METHODS.get(name) if isinstance(name, str) else None
    what = name or "quantization_config"
    if method is not None:
        formats = [said.get(method.key), *_formats_of_groups(said)] if method.key else []
        unread = [each for each in formats if each not in method.formats]
        if not unread:
            return
        what = f"{name}, {method.key} {unread[0]!r}"
    raise LorakitError(
        f"{where}: the model is already quantized ({what}), which is not supported; load its "
        "16-bit original"
    )


def _formats_of_groups(said: Said) -> list[Any]:
    """Return what the parts of a config of compressed-tensors say of formats and transforms."""
    found = [group.get("format") for group in config_groups(said)]
    sparsity, transforms = said.get("sparsity_config"), said.get("transform_config")
    if isinstance(sparsity, Mapping):
        found.append(sparsity.get("format"))
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        found.append("transform_config")
    return found


def dequantized(
    tensors: Mapping[str, LazyTensor], quantization: Any, where: str
) -> tuple[dict[str, LazyTensor], Mapping[str, int]]:
    """Return the tensors of files with each quantized weight as one dense weight.

    Args:
        tensors: All tensors of the files, by name.
        quantization: The quantization_config of config.json; None if the files have none.
        where: The files' place, for messages.

    Returns:
        The weights by name, still on disk, of which quantized ones are read as fp32; and how many
        of these there are of each kind, such as "GPTQ (4 bits, groups of 128)".

    Raises:
        LorakitError: A quantized weight is not whole, or its tensors do not fit together.
    """
    if quantization is None or quantization["quant_method"] == "bitsandbytes":
        return dict(tensors), {}
    kept = {name: each for name, each in tensors.items() if not name.endswith(_IGNORED)}
    found: dict[str, LazyTensor] = {}
    kinds: Counter[str] = Counter()
    for mark, reader in METHODS[quantization["quant_method"]].readers.items():
        for name in [name for name in kept if name.endswith(mark)]:
            if name not in kept:  # a part of a weight that was read
                continue
            parts = Parts(kept, name.removesuffix(mark[1:]))
            try:
                kind, weight, dense = reader(parts, quantization)
                if weight in kept:
                    raise ValueError("it is there a second time, as a dense tensor")
            except ValueError as error:
                raise LorakitError(f"{where}: tensor {parts.weight}: {error}") from None
            read, read_at = partial(_read, dense.read, weight, where), dense.read_at
            if read_at is not None:
                read_at = partial(_read, read_at, weight, where)
            found[weight] = dense._replace(read=read, read_at=read_at)
            kinds[kind] += 1
    _check_rest(kept, where)
    return {**kept, **found}, kinds


def _read(read: Callable[..., Tensor], name: str, where: str, *at: int) -> Tensor:
    """Return the values of a weight, or those at an index; its name and place are in an error."""
    try:
        return read(*at)
    except ValueError as error:
        raise LorakitError(f"{where}: tensor {name}: {error}") from None


def _check_rest(rest: Mapping[str, LazyTensor], where: str) -> None:
    """Raise LorakitError if a tensor that is left can be no dense weight."""
    for name, tensor in rest.items():
        if name.endswith(".pre_quant_scale"):
            raise LorakitError(
                f"{where}: tensor {name} scales an input, as AWQ and SmoothQuant of ModelOpt do, "
                "which is not supported; load the 16-bit original"
            )
        if tensor.dtype is not None and tensor.dtype.startswith("F8"):
            raise LorakitError(
                f"{where}: tensor {name} holds {tensor.dtype}, its scales are missing"
            )
