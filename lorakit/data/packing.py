"""Several examples in one row of a fixed number of tokens.

    input_ids   a a a a b b b c c          [1, T]
    labels      . a a a . b b . c          a label of an example's first token would be predicted
    cu_seqlens  0 4 7 9                    from the example before it: it is left out

Rows are filled by first-fit-decreasing: the longest example first, each into the first row that has
room. That takes at most 11/9 of the fewest rows possible and one more; where short examples are
left to fill the gaps, hardly any. A tree holds the largest room below each of its nodes, so that
the first row with room is found in log n steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.data.encode import IGNORE, Example


def pack_rows(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Numbers of the examples in each row, no row over `budget` tokens.

    The same lengths give the same rows. Raises LorakitError for an example that fits in none.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable: ties by number
    if order and lengths[order[0]] > budget:
        raise LorakitError(
            f"example {order[0]} has {lengths[order[0]]} tokens, more than the {budget} of a row"
        )
    # of two rows in succession at most one is half empty, or they would be one
    most = min(len(lengths), 2 * sum(lengths) // max(budget, 1) + 1)
    leaves = 1 << max(most - 1, 0).bit_length()
    room = [budget] * (2 * leaves)  # of node i's children 2i and 2i+1 the larger
    rows: list[list[int]] = []
    for example in order:
        length, node = lengths[example], 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(example)
        room[node] -= length
        while node > 1:
            node //= 2
            largest = max(room[2 * node], room[2 * node + 1])
            if room[node] == largest:
                break
            room[node] = largest
    return rows


def collate_packed(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Examples one after another: input_ids and labels, int64 [1, T]; cu_seqlens, int32 [n + 1].

    Example i is input_ids[0, cu_seqlens[i] : cu_seqlens[i + 1]].
    """
    ids = [token for e in examples for token in e.input_ids]
    labels = [label for e in examples for label in [IGNORE, *e.labels[1:]]]
    ends = torch.tensor([0, *(len(e.input_ids) for e in examples)]).cumsum(0)
    return torch.tensor([ids]), torch.tensor([labels]), ends.to(torch.int32)


def padding_share(
    lengths: Sequence[int], rows: Sequence[Sequence[int]], budget: int | None = None
) -> float:
    """Of all places the share that holds no token.

    With a budget each of `rows` is a packed row of so many places; without, a batch whose examples
    are padded to its longest.
    """
    tokens = sum(lengths[i] for row in rows for i in row)
    if budget is None:
        places = sum(len(row) * max(lengths[i] for i in row) for row in rows)
    else:
        places = budget * len(rows)
    return 1 - tokens / places if places else 0.0
