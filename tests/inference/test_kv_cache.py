"""The cache of keys and values: any cut of a sequence gives what the whole gives."""

import torch

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
