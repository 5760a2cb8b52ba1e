"""Tiny models with vision towers, as transformers makes and saves them."""

import torch

from tests.conftest import FAMILY_VARIANTS, GEMMA3, GEMMA4_SMALL, QWEN_LINEAR, TINY, randomize

SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA4_VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 2,
    "position_embedding_size": 8,
}
GEMMA4_AUDIO = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [4, 4],
    "output_proj_dims": 16,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_heads": 2,
    "out_hidden_size": TINY["hidden_size"],
    "patch_size": 14,
}


def mrope(*sections, **more):
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}


# name -> (model_type, settings of the text model, of the vision tower, of the whole)
WRAPPED = {
    "gemma3": ("gemma3", GEMMA3, SIGLIP, {"image_token_index": 96}),
    "gemma4": (
        "gemma4",
        GEMMA4_SMALL,
        GEMMA4_VISION,
        {"audio_config": GEMMA4_AUDIO},
    ),
    "gemma4_unified": (
        "gemma4_unified",
        FAMILY_VARIANTS["gemma4_unified_text"][1],
        {"mm_embed_dim": 16, "mm_posemb_size": 8, "patch_size": 2},
        {"audio_config": {"audio_embed_dim": 8}},
    ),
    "mistral3": (
        "mistral3",
        {"model_type": "mistral", "head_dim": 12, "sliding_window": None},
        {**SIGLIP, "model_type": "pixtral", "head_dim": 8},
        {"image_token_index": 96, "tie_word_embeddings": False},
    ),
    "mistral3 around ministral3": (
        "mistral3",
        {"model_type": "ministral3", **FAMILY_VARIANTS["ministral3"][1]},
        {**SIGLIP, "model_type": "pixtral", "head_dim": 8},
        {"image_token_index": 96, "tie_word_embeddings": False},
    ),
    "mistral3 tied": (
        "mistral3",
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
        {**SIGLIP, "model_type": "pixtral", "head_dim": 8},
        {"image_token_index": 96, "tie_word_embeddings": True},
    ),
    "qwen2_vl": (
        "qwen2_vl",
        {"num_key_value_heads": 2, "rope_parameters": mrope(1, 1, 2)},
        {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
        {},
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "rope_parameters": mrope(1, 1, 2),
        },
        {**QWEN_VISION, "fullatt_block_indexes": [0]},
        {"tie_word_embeddings": True},
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {"head_dim": 12, "rope_parameters": mrope(2, 2, 2, mrope_interleaved=True)},
        {**QWEN_VISION, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
        {},
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        {
            "head_dim": 12,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "mlp_only_layers": [1],
            "rope_parameters": mrope(2, 2, 2, mrope_interleaved=True),
        },
        {**QWEN_VISION, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
        {},
    ),
    "qwen3_5": (
        "qwen3_5",
        QWEN_LINEAR,
        {**QWEN_VISION, "num_position_embeddings": 4},
        {"tie_word_embeddings": True},
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        FAMILY_VARIANTS["qwen3_5_moe_text"][1],
        {**QWEN_VISION, "num_position_embeddings": 4},
        {"tie_word_embeddings": False},
    ),
}


def wrapped(name):
    """Return a random model in fp32; its biases and norms are random too."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    model_type, text, vision, whole = WRAPPED[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, text_config={**TINY, **text}, vision_config=vision, **whole
    )
    model = AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    randomize(model, model_type)
    return model
