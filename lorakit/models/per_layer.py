"""A second embedding of the tokens, of which every layer takes a part (Gemma 4 E2B and E4B).

With x the embedding [H] of a token, L layers and P numbers for each of them:

    e = (norm(W x / sqrt(H)) + sqrt(P) table[token]) / sqrt(2)        [L, P]
    x += norm(project(act(gate(x)) * e[layer]))                       at the end of each layer

The table is large (2.3 of E2B's 5.1 billion numbers), a token needs one of its rows, and nobody
trains it. So it is no parameter: it stays in host memory whatever device the model is on, and a
loaded model's stays in its file, which is mapped. Memory holds the rows that were looked up, as
long as the system has room for them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import kernels


class HostTable(nn.Module):
    """Rows that are looked up by number in host memory.

    Attributes:
        weight: The rows [V, N], of any floating-point dtype; no parameter, so that nothing trains,
            moves or packs it.
    """

    weight: Tensor

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = torch.empty(rows, width)
        if not self.weight.is_meta:
            nn.init.normal_(self.weight)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows of ids, int64 [...], as [..., N] in a dtype, on the device of ids."""
        rows = F.embedding(ids.cpu(), self.weight).to(dtype)
        return kernels.dispatch.sent(rows, ids.device)


def host_tables(model: nn.Module) -> dict[str, HostTable]:
    """Return the tables of a model, by the names of their weights."""
    tables = {name: each for name, each in model.named_modules() if isinstance(each, HostTable)}
    return {f"{name}.weight": table for name, table in tables.items()}
