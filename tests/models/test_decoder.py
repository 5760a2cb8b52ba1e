"""The decoder's losses, whole and by rows."""

import torch

from tests.models.variants import load, variants


@variants
def test_packed_loss_and_gradients_are_the_sum_over_documents(tmp_path, family, options):
    model = load(tmp_path, family, options)
    torch.manual_seed(0)
    documents = [torch.randint(97, (1, n)) for n in (4, 15, 9)]
    packed = torch.cat(documents, 1)
    loss, count = model.loss(packed, packed, cu_seqlens=torch.tensor([0, 4, 19, 28]))
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    losses, counts = zip(*(model.loss(ids, ids) for ids in documents), strict=True)
    sum(losses).backward()
    assert count == sum(counts) == 28 - 3
    # the same sums in fp32 in another order: some units of 2^-24, through two layers and back
    assert abs(loss - sum(losses)) <= 1e-5 * loss
    for name, parameter in model.named_parameters():
        truth = parameter.grad
        if truth is None:
            assert grads[name] is None, name
        else:
            assert (grads[name] - truth).abs().max() <= 1e-4 * truth.abs().max(), name
