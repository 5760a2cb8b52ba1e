"""Fewer points of a curve, which look like all of them.

The points are divided into buckets of neighbours, and of each bucket the lowest and the highest
value stay, in their order. So no spike is lost, wherever it is; the first and the last point stay
as they are.
"""

import numpy as np
from numpy.typing import NDArray

LEAST = 4  # points: the two ends, and a bucket


def downsample(values: NDArray[np.float64], points: int) -> NDArray[np.int64]:
    """Return which points of a curve to show.

    Args:
        values: The values of the curve, [N]; those that are not finite are no extremes.
        points: How many points to show at most, at least LEAST.

    Returns:
        Their indices, rising, at most `points` of them: the first, the last, and the lowest and the
        highest finite value of each bucket. Of a bucket without any, its first.
    """
    count = len(values)
    if count <= points:
        return np.arange(count, dtype=np.int64)
    finite = np.isfinite(values)
    low, high = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
    buckets = (points - 2) // 2
    edges = np.linspace(1, count - 1, buckets + 1).astype(np.int64)
    kept = [0, count - 1]
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        kept.append(start + int(low[start:end].argmin()))
        kept.append(start + int(high[start:end].argmax()))
    return np.unique(np.array(kept, dtype=np.int64))
