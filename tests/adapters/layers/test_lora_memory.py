"""What a QLoRA step holds, counted in bytes: the formula of docs/lora.md, and no dense weight."""

import pytest
import torch

import lorakit as lk
from lorakit.kernels import dispatch
from lorakit.models.decoder import Decoder
from tests.allocations import counted

H, I, L, HEADS, KV_HEADS, D, V, R = 2048, 5632, 2, 16, 4, 128, 4096, 16  # noqa: E741


@pytest.fixture(scope="module")
def model():
    """Two layers of a Llama of 1B parameters, NF4 with double quantization, LoRA on all of them."""
    config = lk.ModelConfig.from_hf(
        {
            "model_type": "llama",
            "hidden_size": H,
            "intermediate_size": I,
            "num_hidden_layers": L,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "vocab_size": V,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
        }
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1)
    return lk.attach(lk.quantize(model), lk.LoraConfig(r=R))


def formula(tokens: int, checkpointing: bool) -> int:
    """docs/lora.md, in bytes, over what the model and the adapters' values take."""
    bf16, fp32 = 2, 4
    attention = bf16 * (2 * HEADS + 2 * KV_HEADS) * D + fp32 * HEADS
    block = bf16 * 2 * H + attention + 2 * fp32
    plain = L * (block + bf16 * (2 * I + 7 * R))
    kept = block + L * bf16 * (H + 4 * R) if checkpointing else plain
    kept += bf16 * 2 * H + 2 * fp32 * D
    if dispatch.product_dtype(torch.empty(0, dtype=torch.bfloat16)) == torch.float32:
        kept += 2 * fp32 * H - bf16 * H  # the head's copy and gradient
    backward = bf16 * (3 * I + 4 * H)
    rank = L * R * (2 * (H + HEADS * D) + 2 * (H + KV_HEADS * D) + 3 * (H + I))
    return tokens * (kept + backward) + fp32 * rank + (4 << 20)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tokens", [256, pytest.param(1024, marks=pytest.mark.slow)])
def test_a_step_stays_under_the_formula(model, tokens, checkpointing):
    ids = torch.arange(tokens)[None]
    model.gradient_checkpointing = checkpointing

    def step():
        loss, count = model.loss(ids, ids)
        (loss / count).backward()

    step()  # workspaces, once
    model.zero_grad(set_to_none=True)
    peak, left = counted(step)
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing = False
    assert peak <= formula(tokens, checkpointing)
    assert peak >= 0.7 * formula(tokens, checkpointing)  # the formula is not an empty promise
    adapters = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert left <= adapters + (1 << 20)  # the gradients


def test_no_dense_weight_is_alive_between_forward_and_backward(model):
    """All that autograd keeps beside the parameters; few tokens, so that a weight would stand out:
    the smallest one of the layers has a million values.
    """
    tokens = 64
    ids = torch.arange(tokens)[None]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def forward():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses.append(model.loss(ids, ids)[0])

    losses = []
    _, live = counted(forward)
    smallest = 2 * H * KV_HEADS * D
    assert max(kept.values()) <= 2 * tokens * I < smallest
    # and nothing that autograd does not know of, but 64 KB
    assert live <= sum(kept.values()) + (1 << 16)
    losses.pop().backward()
    model.zero_grad(set_to_none=True)
