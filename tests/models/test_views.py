"""What positions see: packed documents, padding, windows; and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.models.views import key_mask
from tests.conftest import LOGITS
from tests.models.variants import BY_LENGTH, load, packed_variants


@packed_variants
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(tmp_path, family, options):
    model = load(tmp_path, family, options)
    torch.manual_seed(0)
    documents = [torch.randint(97, (1, n)) for n in (3, 27, 1, 12)]
    cu_seqlens = torch.tensor([0, 3, 30, 31, 43], dtype=torch.int32)
    packed = model(torch.cat(documents, 1), cu_seqlens=cu_seqlens)
    for document, logits in zip(documents, packed.split([3, 27, 1, 12], dim=1), strict=True):
        # each document's own logits, up to 7; products over more rows may sum in another order
        assert (logits - model(document)).abs().max() <= 2e-5
    documents[1] = torch.randint(97, (1, 27))
    changed = model(torch.cat(documents, 1), cu_seqlens=cu_seqlens)
    assert not torch.equal(changed[:, 3:30], packed[:, 3:30])
    for part in (slice(0, 3), slice(30, 43)):
        assert torch.equal(changed[:, part], packed[:, part])


@pytest.mark.parametrize(
    "bounds", [[0, 5], [1, 10], [0, 4, 4, 10], [0, 11], [0], [], [0, 6, 3, 10]]
)
def test_bad_cu_seqlens(tmp_path, bounds):
    model = load(tmp_path, "llama", {})
    with pytest.raises(lk.LorakitError, match="cu_seqlens must rise from 0"):
        model(
            torch.zeros(1, 10, dtype=torch.long), cu_seqlens=torch.tensor(bounds, dtype=torch.long)
        )


@pytest.mark.parametrize("wrong", [[0, 10], torch.tensor(3), torch.tensor([0.0, 10.0]), None])
def test_cu_seqlens_of_the_wrong_type(tmp_path, wrong):
    model = load(tmp_path, "llama", {})
    ids = torch.zeros(1, 10, dtype=torch.long)
    if wrong is None:
        assert torch.equal(model(ids, cu_seqlens=wrong), model(ids))
    else:
        with pytest.raises(lk.LorakitError, match="cu_seqlens must be a tensor of whole numbers"):
            model(ids, cu_seqlens=wrong)


def test_packing_takes_one_row_and_no_padding(tmp_path):
    model = load(tmp_path, "llama", {})
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(lk.LorakitError, match="for 2 rows"):
        model(ids, cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(lk.LorakitError, match="neither a padding mask nor a cache"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 4]), attention_mask=torch.ones(1, 4))


@packed_variants
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit_and_no_loss(tmp_path, family, options, side):
    model = load(tmp_path, family, options)
    torch.manual_seed(0)
    rows = [torch.randint(97, (n,)) for n in (5, 9, 20)]
    ids = torch.zeros(3, 20, dtype=torch.long)
    mask = torch.zeros(3, 20, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(20 - len(row), 20) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, True
    logits = model(ids, attention_mask=mask)
    for i, row in enumerate(rows):
        # another order of sums in fp32; padding itself contributes exact zeros
        assert (logits[i][mask[i]] - model(row[None])[0]).abs().max() <= LOGITS
    labels = ids.masked_fill(~mask, -100)
    if side == "left":  # the first token of a row has nothing before it that could predict it
        labels[torch.arange(3), mask.int().argmax(1)] = -100
    loss, count = model.loss(ids, labels, attention_mask=mask)
    alone = [model.loss(row[None], row[None]) for row in rows]
    assert count == sum(n for _, n in alone)
    assert abs(loss - sum(value for value, _ in alone)) <= 1e-5 * loss


by_length = pytest.mark.parametrize(("family", "options"), BY_LENGTH.values(), ids=BY_LENGTH)


@by_length
@pytest.mark.parametrize("prompt", [0, 4])
def test_a_row_has_its_own_length_without_a_mask_too(tmp_path, family, options, prompt):
    """The loss of rows below and beyond the original context, which is 24: alone, padded, packed.

    Without a mask, tokens 0 without labels at the end of a row are padding.
    """
    model = load(tmp_path, family, options)
    if prompt:
        lk.attach(model, lk.PrefixTuningConfig(num_virtual_tokens=prompt))
    model.eval()
    torch.manual_seed(0)
    rows = [torch.randint(1, 97, (n,)) for n in (5, 40, 26)]
    labels = [row.clone() for row in rows]
    for row, own in zip(rows, labels, strict=True):
        row[2] = own[2] = 0  # a token 0 within a row is part of it, with a label and without
        row[3], own[3] = 0, -100
        own[-1] = -100  # a row may end without a label

    def padded(parts, filler):
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=filler)

    ids, targets = padded(rows, 0), padded(labels, -100)
    mask = padded([torch.ones_like(row) for row in rows], 0)
    expected = torch.stack(
        [model.loss(i[None], t[None])[0] for i, t in zip(rows, labels, strict=True)]
    )
    for told in (mask, None):
        found, counts = model.row_losses(ids, targets, attention_mask=told)
        # sums of up to 38 losses of some 4 nats, in fp32
        assert torch.allclose(found, expected, rtol=1e-5)
        loss, count = model.loss(ids, targets, attention_mask=told)
        assert loss.item() == pytest.approx(expected.sum().item(), rel=1e-5)
        assert count == counts.sum()
    if not prompt:  # packed documents take none
        bounds = torch.tensor([0, 5, 45, 71])
        found, _ = model.row_losses(
            torch.cat(rows)[None], torch.cat(labels)[None], cu_seqlens=bounds
        )
        assert torch.allclose(found, expected, rtol=1e-5)
    together = model(ids)[0, :5]  # nothing says that this row is short: it counts as long as it is
    assert (together - model(rows[0][None])[0]).abs().max() > 1e-3


@by_length
def test_gradient_checkpointing_of_rows_of_many_lengths(tmp_path, family, options):
    """They have the same bits with it and without."""
    model = load(tmp_path, family, options)
    torch.manual_seed(0)
    ids = torch.randint(1, 97, (3, 40))
    mask = torch.arange(40) < torch.tensor([[5], [40], [26]])
    grads = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        model.loss(ids, ids.masked_fill(~mask, -100), attention_mask=mask)[0].backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *grads))


@given(
    past=st.integers(0, 9),
    new=st.integers(1, 6),
    window=st.none() | st.integers(1, 8),
    padding=st.none() | st.lists(st.integers(0, 8), min_size=1, max_size=3),
)
def test_a_query_sees_the_keys_that_the_definition_names(past, new, window, padding):
    """All positions q and k have k <= q, q - k < window, and k is real; or k is q."""
    positions = torch.arange(past, past + new)
    seen = torch.arange(past + new)
    real = None
    if padding is not None:
        real = torch.stack([torch.arange(past + new) >= n for n in padding])
    expected = torch.zeros(1 if real is None else len(real), new, past + new, dtype=torch.bool)
    for row in range(len(expected)):
        for i, q in enumerate(positions.tolist()):
            for k in range(past + new):
                near = k <= q and (window is None or q - k < window)
                expected[row, i, k] = (near and (real is None or bool(real[row, k]))) or k == q
    mask = key_mask(positions, seen, window, real)
    if mask is None and new > 1:  # causal attention with the window, which attention is told of
        mask = torch.ones(new, past + new).tril(past).triu(past + 1 - (window or past + new)).bool()
    if mask is None:  # one query: the cache hands over what it may see, and no more
        return
    assert torch.equal(mask.expand(len(expected), 1, new, past + new)[:, 0], expected)
