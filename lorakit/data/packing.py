"""Packing: several examples in one row of a fixed number of tokens, with hardly any padding.

    input_ids   a a a a b b b c c          [1, T]
    labels      . a a a . b b . c          the first label of an example is left out: it would be
    cu_seqlens  0 4 7 9                    predicted from the example before it

Rows are filled by first-fit-decreasing: the longest example first, each into the first row that has
room. That takes at most 11/9 of the fewest rows possible and one more. If there are short examples
to fill the gaps, it takes hardly any more than the fewest. A tree holds the largest room below each
of its nodes, so that the first row with room is found in log n steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.data.encode import IGNORE, Example


def pack_rows(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Distribute examples over rows of at most `budget` tokens, by first-fit-decreasing.

    Equal lengths give equal rows.

    Args:
        lengths: The number of tokens of each example.
        budget: The most tokens of a row.

    Returns:
        The numbers of the examples in each row.

    Raises:
        LorakitError: An example is longer than a row.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable: ties by number
    if order and lengths[order[0]] > budget:
        raise LorakitError(
            f"example {order[0]} has {lengths[order[0]]} tokens, more than the {budget} of a row"
        )
    # of two successive rows at most one is half empty, or they would be one row
    most = min(len(lengths), 2 * sum(lengths) // max(budget, 1) + 1)
    leaves = 1 << max(most - 1, 0).bit_length()
    room = [budget] * (2 * leaves)  # a leaf's, or the larger one of node i's children 2i and 2i+1
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
    """Join examples into one row, without padding.

    Args:
        examples: n examples of `encode_rows`, or any objects with lists input_ids and labels.

    Returns:
        input_ids and labels, int64 [1, T], and cu_seqlens, int32 [n + 1]. Example i lies at
        input_ids[0, cu_seqlens[i] : cu_seqlens[i + 1]]. Its first label is -100.
    """
    ids = [token for e in examples for token in e.input_ids]
    labels = [label for e in examples for label in [IGNORE, *e.labels[1:]]]
    ends = torch.tensor([0, *(len(e.input_ids) for e in examples)]).cumsum(0)
    return torch.tensor([ids]), torch.tensor([labels]), ends.to(torch.int32)


def padding_share(
    lengths: Sequence[int], rows: Sequence[Sequence[int]], budget: int | None = None
) -> float:
    """Return the share of places that hold no token, from 0 to 1.

    Args:
        lengths: The number of tokens of each example.
        rows: The numbers of the examples in each row or batch.
        budget: The places of a packed row. None takes each of `rows` for a batch, whose examples
            are padded to its longest one.

    Returns:
        The padding as a part of all places; 0 if there are none.
    """
    tokens = sum(lengths[i] for row in rows for i in row)
    if budget is None:
        places = sum(len(row) * max(lengths[i] for i in row) for row in rows)
    else:
        places = budget * len(rows)
    return 1 - tokens / places if places else 0.0
