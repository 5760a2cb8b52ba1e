"""The cache of keys and values: any cut of a sequence gives what the whole gives."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.inference.kv_cache import KVCache
from tests.conftest import LOGITS
from tests.models.variants import load, variants


@variants
@torch.no_grad()
def test_cache_in_pieces_equals_the_whole(tmp_path, family, options):
    """Any cut of a sequence gives the same logits, and a sliding layer holds its window only."""
    model = load(tmp_path, family, options)
    ids = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    whole = model(ids)
    for cut in ([30], [4, 1, 6, 1, 3, 15], [1] * 30, [20, 2, 1, 7], [3, 3, 3, 3, 3, 3, 3, 9]):
        cache = KVCache(model.config, 2, 30, torch.float32, torch.device("cpu"))
        pieces = [model(part, cache=cache) for part in ids.split(cut, dim=1)]
        # fp32 in another order of sums; logits reach 7
        assert (torch.cat(pieces, 1) - whole).abs().max() <= LOGITS, cut
        assert cache.length == 30
    for layer, keys in enumerate(cache.keys):
        assert keys.shape[1] == (model.config.window(layer) or 30)


@given(window=st.integers(1, 7), pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_the_cache_returns_what_new_positions_may_look_at(window, pieces):
    """Each layer gets these positions and no others, each once, with the keys that were stored."""
    config = lk.ModelConfig(
        "mistral", 9, 8, 8, 2, 1, 1, 2, sliding_window=window, sliding_layers=[False, True]
    )
    cache = KVCache(config, 1, sum(pieces), torch.float32, torch.device("cpu"))
    past = 0
    for new in pieces:
        now = torch.arange(past, past + new)
        expected = [cache.positions(new, config.window(layer)).tolist() for layer in range(2)]
        for layer in range(2):
            keys = now.float().view(1, new, 1, 1).expand(1, new, 1, 2)
            k, v = cache.append(layer, keys, -keys)
            found = k[0, :, 0, 0].tolist()
            assert found == expected[layer]
            assert torch.equal(v, -k)
            assert len(set(found)) == len(found)
            reach = config.window(layer) or past + new
            visible = set(range(max(0, past - reach + 1), past + new))
            assert set(found) == visible
        past += new
        assert cache.length == past
