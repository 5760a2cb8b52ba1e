"""The cache of keys and values: rows at positions of their own give what each gives alone."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.inference.decode import Decoding
from lorakit.inference.kv_cache import PART, KVCache, NewPositions
from tests.conftest import LOGITS
from tests.models.variants import load, variants


def by_modules(model, lines, capacity):
    """A decoding whose steps are passes through the model's modules."""
    decoding = Decoding(model, lines, capacity)
    decoding.compiled = None
    return decoding


@variants
@torch.no_grad()
def test_rows_at_positions_of_their_own_equal_whole_rows(tmp_path, family, options):
    """Rows that begin together and apart, in parts of any length, and token by token."""
    model = load(tmp_path, family, options)
    ids = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))
    whole = model(ids)
    decoding = by_modules(model, 4, 40)
    first = decoding.read([row[:n].tolist() for row, n in zip(ids, (5, 17, 9), strict=True)])
    found = {(b, n): first[b] for b, n in enumerate((5, 17, 9))}
    at = [5, 17, 9]
    for rows, n in [([1], 1), ([2, 0], 4), ([0, 1, 2], 1), ([0, 2], 1), ([2], 11), ([1, 0], 6)]:
        new = torch.stack([ids[b, at[b] : at[b] + n] for b in rows])
        logits = decoding(rows, new)
        for b, row in zip(rows, logits, strict=True):
            at[b] += n
            found[b, at[b]] = row
    assert decoding.cache.lengths == [*at, 0]
    for (b, n), logits in found.items():
        # fp32 in another order of sums; logits reach 7
        assert (logits - whole[b, n - 1]).abs().max() <= LOGITS, (b, n)


@torch.no_grad()
def test_a_ring_wraps_round(tmp_path):
    """A row of more positions than a sliding layer has slots, by parts and by whole prompts."""
    model = load(tmp_path, "mistral", {"sliding_window": 6, "max_position_embeddings": 1024})
    ids = torch.randint(97, (2, 700), generator=torch.Generator().manual_seed(1))
    whole = model(ids)
    decoding = by_modules(model, 3, 700)
    assert decoding.cache.sizes[0] == 6 + PART - 1
    parts = [0, 250, 500, 501, 600, 699, 700]
    for start, end in pairwise(parts):
        logits = decoding([1], ids[:1, start:end])
        assert (logits[0] - whole[0, end - 1]).abs().max() <= LOGITS
    logits = decoding.read([ids[1, :600].tolist()])
    assert (logits[0] - whole[1, 599]).abs().max() <= LOGITS
    decoding.cache.copy(0, 2, 600)
    for t in range(600, 604):
        logits = decoding([2, 0], ids[[1, 1], t : t + 1])
        assert (logits - whole[1, t]).abs().max() <= LOGITS
    assert [decoding.cache.holds(1, n) for n in (700, 500, 444, 443, 100)] == [
        True, True, True, False, False,
    ]  # fmt: skip
    decoding.cache.copy(1, 0, 444)
    logits = decoding([0], ids[:1, 444:460])
    assert (logits[0] - whole[0, 459]).abs().max() <= LOGITS


@given(window=st.integers(1, 7), pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_new_positions_look_at_those_before_them_in_the_window(window, pieces):
    """Each looks at these positions and no others, each once, with the keys that were stored."""
    config = lk.ModelConfig(
        "mistral", 9, 8, 8, 2, 1, 1, 2, sliding_window=window, sliding_layers=[False, True]
    )
    total = sum(pieces)
    cache = KVCache(config, 2, total, torch.float32, torch.device("cpu"))
    cache.sizes[1] = size = min(total, window + max(pieces[1:], default=1) - 1)  # it wraps soon
    past = 0
    for new in pieces:
        call = NewPositions(cache, [1], [new])
        views = call.views(config, new)
        now = torch.arange(past, past + new)
        for layer, reach in ((0, total), (1, window)):
            keys = now.float().view(1, new, 1, 1).expand(1, new, 1, 2)
            k, v = call.append(layer, keys, -keys)
            assert torch.equal(v, -k)
            mask = views[layer].mask
            if past == 0:
                assert mask is None
                assert torch.equal(k, keys)
                continue
            assert k.shape[1] <= (total if layer == 0 else size)
            for query, sees in zip(now.tolist(), mask[0, 0], strict=True):
                found = sorted(k[0, sees, 0, 0].tolist())
                assert found == list(range(max(0, query - reach + 1), query + 1))
        call.commit()
        past += new
        assert cache.lengths == [0, past]
