"""The cache of keys and values: rows at positions of their own give what each gives alone."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.inference import kv_cache
from lorakit.inference.decode import Decoding
from lorakit.inference.kv_cache import PAGE, PART, KVCache, NewPositions
from tests.conftest import LOGITS
from tests.models.variants import VARIANTS, load, variants


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
    lines, first = decoding.read([row[:n].tolist() for row, n in zip(ids, (5, 17, 9), strict=True)])
    found = {(b, n): first[b] for b, n in enumerate((5, 17, 9))}
    at = [5, 17, 9]
    for rows, n in [([1], 1), ([2, 0], 4), ([0, 1, 2], 1), ([0, 2], 1), ([2], 11), ([1, 0], 6)]:
        new = torch.stack([ids[b, at[b] : at[b] + n] for b in rows])
        logits = decoding([lines[b] for b in rows], new)
        for b, row in zip(rows, logits, strict=True):
            at[b] += n
            found[b, at[b]] = row
    assert [line.length for line in lines] == at
    for (b, n), logits in found.items():
        # fp32 in another order of sums; logits reach 7
        assert (logits - whole[b, n - 1]).abs().max() <= LOGITS, (b, n)


@torch.no_grad()
def test_a_window_leaves_pages_behind(tmp_path):
    """A row of more positions than its layers have pages for, by parts and by whole prompts."""
    model = load(tmp_path, "mistral", {"sliding_window": 6, "max_position_embeddings": 1024})
    ids = torch.randint(97, (2, 700), generator=torch.Generator().manual_seed(1))
    whole = model(ids)
    decoding = by_modules(model, 2, 700)
    (pool,) = decoding.cache.pools
    assert pool.count * PAGE <= 2 * (6 + PART + 2 * PAGE) < 2 * 700
    line = decoding.begin()
    for start, end in pairwise([0, 250, 500, 501, 600, 699, 700]):
        logits = decoding([line], ids[:1, start:end])
        assert (logits[0] - whole[0, end - 1]).abs().max() <= LOGITS
        assert sum(page >= 0 for page in line.pages[0]) <= (6 + PART) // PAGE + 2
    (other,), logits = decoding.read([ids[1, :600].tolist()])
    assert (logits[0] - whole[1, 599]).abs().max() <= LOGITS
    assert sum(page >= 0 for page in other.pages[0]) == 1
    for t in range(600, 660):
        logits = decoding([other], ids[1:, t : t + 1])
        assert (logits[0] - whole[1, t]).abs().max() <= LOGITS
    for each in (line, other):
        decoding.cache.release(each)
    assert pool.room == pool.count


@settings(max_examples=60)
@given(
    window=st.integers(1, 9),
    pieces=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    size=st.sampled_from([1, 2, 4]),
)
def test_new_positions_look_at_those_before_them_in_the_window(window, pieces, size):
    """Each looks at these positions and no others, each once, with the keys that were stored."""
    config = lk.ModelConfig(
        "mistral", 9, 8, 8, 2, 1, 1, 2, sliding_window=window, sliding_layers=[False, True]
    )
    total = sum(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "PAGE", size)
        patch.setattr(kv_cache, "PART", 8)
        cache = KVCache(config, total + size, 1, torch.float32, torch.device("cpu"))
        line, past = cache.line(), 0
        for new in pieces:
            assert cache.grow(line, new)
            call = NewPositions(cache, [line], [new])
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
                for query, sees in zip(now.tolist(), mask[0, 0], strict=True):
                    found = sorted(k[0, sees, 0, 0].tolist())
                    assert found == list(range(max(0, query - reach + 1), query + 1))
            call.commit()
            past += new
            assert line.length == past


@settings(max_examples=60, deadline=None)
@given(data=st.data(), window=st.none() | st.integers(1, 9), pages=st.integers(6, 14))
def test_pages_hold_what_their_names_say(data, window, pages):
    """Lines come, share, grow and go: every page that a line can see holds its own tokens.

    A page is written to by nobody who shares it, and no page is lost.
    """
    layers = [False, True] if window else [False, False]
    config = lk.ModelConfig(
        "mistral", 9, 8, 8, 2, 1, 1, 2, sliding_window=window, sliding_layers=layers
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "PAGE", 2)
        patch.setattr(kv_cache, "PART", 4)
        unit = data.draw(st.sampled_from([2, 4]))
        cache = KVCache(config, 2 * pages, 4, torch.float32, torch.device("cpu"))
        rows, ahead = {}, {}  # what a row holds, and what follows in it
        for _ in range(data.draw(st.integers(1, 25))):
            ended = rows and data.draw(st.integers(0, 3)) == 0
            if ended:
                line = data.draw(st.sampled_from(list(rows)))
                cache.release(line, forget=data.draw(st.booleans()))
                del rows[line]
            elif rows and data.draw(st.booleans()):
                line = data.draw(st.sampled_from(list(rows)))
                ids = rows[line]
                more = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=4))
                new = [*ahead[line], *more][: len(more)]
                before = [list(table) for table in line.pages], [pool.room for pool in cache.pools]
                if cache.grow(line, len(new)):
                    _write(cache, line, ids, new)
                    ahead[line] = ahead[line][len(new) :]
                    cache.name(line, ids, unit)
                else:
                    assert [pool.room for pool in cache.pools] >= before[1]
            else:
                root = data.draw(st.sampled_from([b"a", b"b"]))
                wanted = data.draw(st.lists(st.integers(0, 1), min_size=0, max_size=8))
                line = cache.line(root)
                gained = cache.adopt(line, wanted, unit)
                assert gained % unit == 0
                rows[line], ahead[line] = wanted[:gained], wanted[gained:]
            for line, ids in rows.items():
                _check(cache, line, ids)
        for line in rows:
            cache.release(line)
        assert [pool.room for pool in cache.pools] == [pool.count for pool in cache.pools]


def _told(line, ids, position):
    """A number that says what a row has at a position: all before it, and what it went through."""
    return float(hash((line.root, tuple(ids[: position + 1]))) % 2**20)


def _write(cache, line, ids, new):
    call = NewPositions(cache, [line], [len(new)])
    start = len(ids)
    ids += new
    told = torch.tensor([_told(line, ids, p) for p in range(start, len(ids))])
    keys = told.view(1, -1, 1, 1).expand(1, len(new), 1, 2)
    for layer in range(2):
        call.append(layer, keys, -keys)
    call.commit()


def _check(cache, line, ids):
    assert line.length == len(ids)
    for layer, kind in cache.kind_of.items():
        first = 0 if cache.reach[kind] is None else max(0, line.length + 1 - cache.reach[kind])
        for p in range(first, line.length):
            slot = line.pages[kind][p // 2], p % 2
            assert slot[0] >= 0
            assert cache.keys[layer][slot][0, 0] == _told(line, ids, p)


def test_pages_that_nobody_uses_go_in_the_order_in_which_they_were_left():
    config = lk.ModelConfig("llama", 9, 8, 8, 1, 1, 1, 2)
    cache = KVCache(config, 4 * PAGE, 1, torch.float32, torch.device("cpu"))

    def run(tokens):
        line = cache.line()
        gained = cache.adopt(line, tokens, PAGE)
        assert cache.grow(line, len(tokens) - gained)
        line.length = len(tokens)
        cache.name(line, tokens, PAGE)
        cache.release(line)
        return gained

    a, b, c = [1] * PAGE, [2] * PAGE, [3] * PAGE
    assert [run(a), run(b), run(c)] == [0, 0, 0]
    assert run(a) == PAGE
    assert run([4] * 2 * PAGE) == 0  # one page was free yet, the other was b's
    assert run(c) == PAGE
    assert run(a) == PAGE
    assert run(b) == 0
    line = cache.line()
    assert cache.grow(line, 4 * PAGE)
    assert cache.load == 1
    assert not cache.grow(cache.line(), 1)
    assert cache.adopt(cache.line(), a, PAGE) == 0


@pytest.mark.parametrize("name", ["gemma4_text small", "gemma4_text large"])
@torch.no_grad()
def test_heads_of_two_sizes_and_layers_without_keys(tmp_path, name):
    """Each kind has its pages; a layer that sees others' keys has none. So do rows that go on with
    the pages of others, and give the logits of a call without a cache (fp32, in another order).
    """
    model = load(tmp_path, *VARIANTS[name], device="cpu")
    decoding = Decoding(model, rows=2, capacity=400)
    assert decoding.compiled is None
    shapes = [(len(store), *store.shape[4:]) for store in decoding.cache.stores]
    assert shapes == ([(2, 1, 16), (1, 1, 32)] if "small" in name else [(2, 2, 16), (2, 1, 32)])
    ids = torch.randint(3, 97, (1, 300), generator=torch.Generator().manual_seed(0))
    row, other = decoding.begin(), decoding.begin()
    for part in ids.split(100, dim=1):
        logits = decoding([row], part)
    decoding.cache.name(row, ids[0].tolist(), 64)
    assert decoding.cache.adopt(other, ids[0].tolist(), 64) == 256
    again = decoding([other], ids[:, 256:])
    expected = model(ids)[:, -1]
    assert (logits - expected).abs().max() <= 4e-6
    assert (again - expected).abs().max() <= 4e-6
