"""A second embedding of the tokens, of which every layer takes a part (Gemma 4 E2B and E4B).

With x the embedding [H] of a token, L layers and P numbers for each of them:

    e = (norm(W x / sqrt(H)) + sqrt(P) table[token]) / sqrt(2)        [L, P]
    x += norm(project(act(gate(x)) * e[layer]))                       at the end of each layer

The table is large (2.3 of E2B's 5.1 billion numbers), a token needs one of its rows, and nobody
trains it. So it is no parameter: it stays in host memory whatever device the model is on, and a
loaded model's stays in its file, which is mapped. Memory holds the rows that were looked up, as
long as the system has room for them. Rows of a GGUF file stay quantized there, and those that are
looked up are made dense.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import kernels
from lorakit.files.safetensors import LazyTensor
from lorakit.models.bitsandbytes import LazyWeight


class HostTable(nn.Module):
    """Rows that are looked up by number in host memory.

    Attributes:
        weight: The rows [V, N], of any floating-point dtype; no parameter, so that nothing trains,
            moves or packs it. It has no values where a file has them.
        file: The rows in a file that reads them by their numbers, or None.
    """

    weight: Tensor

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.file: LazyTensor | None = None
        self.weight = torch.empty(rows, width)
        if not self.weight.is_meta:
            nn.init.normal_(self.weight)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows of ids, int64 [...], as [..., N] in a dtype, on the device of ids."""
        numbers = ids.cpu()
        if self.file is None or self.file.read_rows is None:
            rows = F.embedding(numbers, self.weight)
        else:  # each of them once
            different, places = numbers.unique(return_inverse=True)
            rows = self.file.read_rows(different)[places]
        return kernels.dispatch.sent(rows.to(dtype), ids.device)

    def read(self) -> Tensor:
        """Return all rows [V, N]."""
        return self.weight if self.file is None else self.file.read()


def host_tables(model: nn.Module) -> dict[str, HostTable]:
    """Return the tables of a model, by the names of their weights."""
    tables = {name: each for name, each in model.named_modules() if isinstance(each, HostTable)}
    return {f"{name}.weight": table for name, table in tables.items()}


def left_in_file(model: nn.Module, weights: Mapping[str, LazyWeight]) -> dict[str, LazyWeight]:
    """Let tables look their rows up in a file that reads them by number; return other weights."""
    rest = dict(weights)
    for name, table in host_tables(model).items():
        found = weights.get(name)
        if isinstance(found, LazyTensor) and found.read_rows is not None:
            table.file = found
            del rest[name]
    return rest
