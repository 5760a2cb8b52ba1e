"""How many blocks keep gate and up of their MLP for backward, decided once for a run.

Gate and up are the largest activations of a block: for an intermediate size I they take 4 I bytes a
token in 16 bits, 57 KB for an 8B Llama. Where they are not kept, backward computes them again,
which is a fifth of all products of the frozen weights. So a GPU keeps them for as many blocks as
its free memory holds beside the rest:

    what every block keeps     the inputs of its layers and norms, q, k, v and attention's output;
                               where linear attention runs the reference, its states at the starts
                               of chunks too; Triton's kernels compute them again
    the head                   logits and hidden states of one chunk
    weights made dense         those of the largest MLP
    what trains                gradients and the optimizer's state, which the first step makes
"""

import torch

from lorakit.config.training import MLPActivations
from lorakit.models.config import ModelConfig
from lorakit.models.decoder import Decoder
from lorakit.training.kernel_line import linear_kernels

SHARE = 0.8  # of the free memory that is given away; the rest is for what fragments leave unused
HEAD_BYTES = 1 << 30
CHUNK = 64  # tokens between two states of linear attention in the reference


def kept_layers(model: Decoder, tokens: int, choice: MLPActivations, made_later: int = 0) -> int:
    """Return how many blocks of `model` keep gate and up for a batch of so many tokens.

    Args:
        model: The model, with its adapter, on its device.
        tokens: The most tokens of a batch, the padding included.
        choice: "keep" for all blocks, "recompute" for none, or "auto" for as many as the memory of
            a GPU has room for. On a CPU "auto" keeps all of them.
        made_later: The bytes of gradients and state that the first step makes.
    """
    config, device = model.config, model.device
    if choice == "recompute":
        return 0
    if choice == "keep" or device.type != "cuda":  # nor is known of a GPU that is pretended
        return config.num_hidden_layers
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return fitting_layers(model, tokens, free - made_later)


def fitting_layers(model: Decoder, tokens: int, free: int) -> int:
    """Return for how many blocks `free` bytes have room beside all else that a step needs."""
    config, size = model.config, model.dtype.itemsize
    H, layers = config.hidden_size, range(config.num_hidden_layers)
    states = any(config.linear_layers) and linear_kernels(model)["delta_net"] == "reference"
    # per layer: inputs of four layers and norms, and what attention keeps
    per_token = sum(size * 4 * H + _attention_bytes(config, i, size, states) for i in layers)
    widths = [_inner_width(config, layer) for layer in layers]
    dense_weights = 3 * max(widths) * H * size
    left = SHARE * free - HEAD_BYTES - dense_weights
    left -= tokens * per_token
    for layer, width in enumerate(widths):
        left -= tokens * 2 * width * size
        if left < 0:
            return layer
    return config.num_hidden_layers


def _attention_bytes(config: ModelConfig, layer: int, size: int, states: bool) -> float:
    """Return the bytes of a token that attention keeps, whose values have `size` bytes each.

    `states` says whether linear attention keeps those at the starts of chunks.
    """
    if config.is_linear(layer):
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        # q, k and v before and after the convolution; z, the output, its norm, and their product
        kept = 2 * (2 * keys + values) + 4 * values
        return size * kept + states * 4 * config.linear_key_head_dim * values / CHUNK
    queries, keys = config.num_attention_heads, config.layer_kv_heads(layer)
    # q, k, v and the output; with a gate also q beside it, and the product
    heads = 2 * (queries + keys) + (3 * queries if config.attention_gate else 0)
    return size * config.layer_head_dim(layer) * heads


def _inner_width(config: ModelConfig, layer: int) -> int:
    """Return how many numbers of gate, and of up, a layer makes for a token."""
    mlp = config.mlp_width(layer)
    if not config.has_experts(layer):
        return mlp
    experts = config.num_experts_per_tok * config.moe_intermediate_size
    return experts + mlp if config.moe_beside_mlp else experts
