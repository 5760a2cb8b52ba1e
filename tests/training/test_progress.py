"""What a run notes of its evaluations."""

import math

from hypothesis import given
from hypothesis import strategies as st

from lorakit.training.progress import Progress


@given(st.lists(st.floats(-10, 10) | st.just(math.nan) | st.just(math.inf), max_size=12))
def test_the_best_is_the_first_least_loss(losses):
    """It keeps the best step, and how many evaluations came after it."""
    progress = Progress()
    best = []
    for step, loss in enumerate(losses, 1):
        progress.step = step
        assert not progress.is_evaluated()
        best.append(progress.add_evaluation({"loss": loss}))
        assert progress.is_evaluated()
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite:
        first = losses.index(min(finite)) + 1
        assert (progress.best_step, progress.best_loss) == (first, min(finite))
        assert progress.worse_in_a_row == len(losses) - first
        assert max(step for step, better in enumerate(best, 1) if better) == first
    else:
        assert (progress.best_step, progress.worse_in_a_row) == (None, len(losses))
    for patience in range(1, 5):
        assert progress.has_lost_patience(patience) == (progress.worse_in_a_row >= patience)
    assert not progress.has_lost_patience(None)
