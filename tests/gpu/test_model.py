"""A model on the GPU: training steps, files, text."""

import pytest
import torch

import lorakit as lk
from lorakit import kernels
from tests.conftest import ROWS
from tests.gpu.operations import same_bits

CPU = torch.device("cpu")
DTYPES = ["float32", "bfloat16"]


def adapted(path, device, dtype):
    """NF4, with an adapter whose B is not zero."""
    model = lk.load_model(path, dtype=dtype, quantize="nf4", device=device)
    torch.manual_seed(1)
    lk.attach(model, lk.LoraConfig(r=4))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def some_ids(device, rows=2, length=9):
    ids = torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(0))
    return ids.to(device)


def trained(model, ids, steps):
    """The losses of some steps, and the first one's gradients."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = lk.optim.AdamW(parameters.values(), lr=1e-2)
    losses, grads = [], None
    for _ in range(steps):
        loss, count = model.loss(ids, ids)
        (loss / count).backward()
        losses.append((loss / count).detach())
        grads = grads or {name: p.grad.clone() for name, p in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), grads


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_steps(dtype, tiny_dir, device, size):
    """QLoRA: the losses of some steps and every gradient of the first, kernel against reference."""
    ids, steps = some_ids(device), size(5, 2)
    losses, grads = trained(adapted(tiny_dir, device, dtype), ids, steps)
    with kernels.use_backend("reference"):
        expected, expected_grads = trained(adapted(tiny_dir, device, dtype), ids, steps)
    # the reference rounds after every operation, the kernels once: a few roundings of the dtype,
    # and the GPU's exponentials and roots are off by some units in the last place of fp32. AdamW's
    # first steps divide a gradient by its own size, which makes the errors of small ones large.
    tolerance = {"float32": 1e-4, "bfloat16": 0.05}[dtype]
    assert torch.allclose(losses[0], expected[0], rtol=tolerance)
    assert torch.allclose(losses, expected, rtol=max(tolerance, 1e-2))
    assert losses[-1] < losses[0]
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        difference = (grad - expected_grads[name]).norm() / expected_grads[name].norm()
        assert difference < tolerance, name


def test_logits_are_the_cpus(tiny_dir, device):
    ids = some_ids(CPU)
    with kernels.use_backend("reference"):
        model = lk.load_model(tiny_dir, dtype="float32", device=CPU)
        expected = model(ids)
    found = lk.load_model(tiny_dir, dtype="float32", device=device)(ids.to(device))
    # fp32 products summed in another order, through two layers: tf32 would be off by 1e-2
    assert (found.to(CPU) - expected).abs().max() <= 1e-3


def test_text(tiny_dir, device, size):
    """Greedy text is the CPU's; drawn with a seed it is the same every time."""
    tok, prompts = lk.load_tokenizer(tiny_dir), ["hello", "a longer one", "x"]
    count = size(24, 3)
    # double quantization may differ by a code (test_nf4.py), and that by a token
    options = {"dtype": "float32", "quantize": {"quant_type": "nf4", "double_quant": False}}
    model = lk.load_model(tiny_dir, **options, device=device)
    texts = lk.generate_batch(model, tok, prompts, max_new_tokens=count)
    drawn = [
        lk.generate(model, tok, "hi", max_new_tokens=count, temperature=1.0, seed=3)
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    with kernels.use_backend("reference"):
        model = lk.load_model(tiny_dir, **options, device=CPU)
        assert lk.generate_batch(model, tok, prompts, max_new_tokens=count) == texts


def test_files(tiny_dir, device, tmp_path):
    """An adapter, packed weights and merged weights come back as they were."""
    ids = some_ids(device)
    model = adapted(tiny_dir, device, "bfloat16")
    expected = model(ids).detach()
    lk.save_adapter(model, tmp_path / "adapter")
    fresh = lk.load_model(tiny_dir, dtype="bfloat16", quantize="nf4", device=device)
    assert same_bits(lk.load_adapter(fresh, tmp_path / "adapter")(ids).detach(), expected)

    lk.merge(model)
    merged = model(ids).detach()
    lk.save_model(model, tmp_path / "merged")
    loaded = lk.load_model(tmp_path / "merged", dtype="bfloat16", device=device)
    assert same_bits(loaded(ids).detach(), merged)

    lk.unmerge(model)
    lk.detach(model)
    lk.save_model(model, tmp_path / "packed", packed=True)
    packed = lk.load_model(tmp_path / "packed", dtype="bfloat16", device=device)
    assert same_bits(packed(ids).detach(), model(ids).detach())


def test_a_run(tiny_dir, device, tmp_path, size):
    """lk.train from the rows to the saved adapter; the same seed gives the same bits."""
    tok, found = lk.load_tokenizer(tiny_dir), []
    for i in range(2):
        torch.manual_seed(0)
        model = lk.load_model(tiny_dir, dtype="bfloat16", quantize="nf4", device=device)
        lk.attach(model, lk.LoraConfig(r=4))
        config = lk.TrainConfig(
            output_dir=str(tmp_path / str(i)), max_steps=size(6, 1), learning_rate=1e-2,
            per_device_train_batch_size=4,
        )  # fmt: skip
        result = lk.train(model, tok, ROWS[: size(24, 4)], config)
        assert result.peak_memory_mb > 0
        found.append((tmp_path / str(i) / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]
