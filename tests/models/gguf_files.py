"""GGUF files for tests: transformers' models as llama.cpp's converter writes them."""

from types import SimpleNamespace

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import lorakit as lk
from tests.conftest import published as unfused
from tests.conftest import tiny_llama

TOKENS = ["<unk>", "<s>", "</s>", "t", "o", "k", "to", "tok", *[f"tok{i}" for i in range(89)]]

ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "mistral": "mistral3",  # of Small 3, within a wrapper
    "ministral3": "mistral3",
    "smollm3": "smollm3",
    "granite": "granite",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "seed_oss": "seed_oss",
    "qwen2_moe": "qwen2moe",
    "gemma4_text": "gemma4",
    "gpt_oss": "gpt-oss",
    "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
}
PERMUTED = ("llama", "mistral3", "smollm3", "granite")


def permute(weight, heads):
    """Hugging Face -> llama.cpp: the two halves of each head interleaved."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)


def stored(published, config):
    """Published tensors as llama.cpp's converter stores them, its names taken from gguf."""
    arch = ARCHITECTURES[config.model_type]
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[arch], config.num_hidden_layers)
    experts, arrays = {}, {}
    if arch == "gpt-oss":
        published = unfused(published, "gpt_oss")
    for name, tensor in published.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if arch in PERMUTED and "q_proj" in name:
            array = permute(array, config.num_attention_heads)
        if arch in PERMUTED and "k_proj" in name:
            array = permute(array, config.num_key_value_heads)
        offset = arch.startswith(("gemma", "qwen35", "qwen3next")) and arch != "gemma4"
        if offset and name.endswith("norm.weight") and "linear_attn" not in name:
            array = array + 1
        if "linear_attn." in name:
            arrays |= of_linear_attention(name, array, config, names)
            continue
        if "shared_expert_gate" in name:
            array = array[0]
        if arch == "gemma4" and "router." in name and "proj" not in name:
            layer = name.split(".")[2]
            stem = "ffn_gate_inp" if name.endswith("router.scale") else "ffn_down_exps"
            arrays[f"blk.{layer}.{stem}.scale"] = array
            continue
        if name.endswith(("layer_scalar", "sinks")):
            name += ".weight"
        before, found, after = name.partition(".experts.")
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            name += ".weight"
        elif found:  # ...experts.3.w1.weight
            number, _, rest = after.partition(".")
            name = f"{before}.experts.{rest}"
            experts.setdefault(name, {})[int(number)] = array
            array = np.stack([experts[name][i] for i in sorted(experts[name])])
        arrays[names.get_name(name, (".weight", ".bias"))] = array
    return arrays


def of_linear_attention(name, array, config, names):
    """A tensor of linear attention as it is stored, or the two that it becomes."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    dk, dv, each = config.linear_key_head_dim, config.linear_value_head_dim, values // keys
    before, _, leaf = name.rpartition("linear_attn.")
    leaf = leaf.removesuffix(".weight")

    def tiled(rows, width):  # over the heads of keys
        return rows.reshape(keys, each, width, -1).swapaxes(0, 1).reshape(rows.shape)

    if leaf == "in_proj_qkvz":
        q, k, v, z = np.split(
            array.reshape(keys, 2 * (dk + each * dv), -1),
            [dk, 2 * dk, 2 * dk + each * dv],
            axis=1,
        )
        rows = array.shape[1]
        qkv = np.concatenate([part.reshape(-1, rows) for part in (q, k, v)])
        parts = {"in_proj_qkv": qkv, "in_proj_z": z.reshape(-1, rows)}
        of = {f"{before}linear_attn.{part}.weight": value for part, value in parts.items()}
        return {names.get_name(n, (".weight",)): value for n, value in of.items()}
    if leaf == "A_log":
        array = -np.exp(array)
    if leaf == "conv1d":
        array = array[:, 0]
    if config.model_type != "qwen3_next":
        if leaf in ("A_log", "dt_bias", "in_proj_a", "in_proj_b"):
            array = tiled(array, 1)
        elif leaf == "in_proj_z":
            array = tiled(array, dv)
        elif leaf in ("in_proj_qkv", "conv1d"):
            array = np.concatenate([array[: 2 * keys * dk], tiled(array[2 * keys * dk :], dv)])
        elif leaf == "out_proj":
            array = tiled(array.T, dv).T
    name = name.replace("dt_bias", "dt_proj.bias")
    return {names.get_name(name, (".weight", ".bias")): array}


def write_gguf(
    path, model, kind=gguf.GGMLQuantizationType.F32, metadata=None, skip=(), tensors=None
):
    """A transformers model as llama.cpp's converter writes it."""
    config = model.config
    if config.model_type == "gemma4_text":  # transformers' own asks for a layer's number
        values = config.to_dict()
        values |= lk.ModelConfig.from_hf(values).to_hf() | {
            "rope_parameters": config.rope_parameters
        }
        config = SimpleNamespace(**values)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    if config.model_type not in ("qwen3_5_moe_text", "gemma4_text"):
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type != "gemma4_text":
        writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    if config.model_type != "gemma4_text":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "gemma4_text":
        add_gemma4(writer, config)
    else:
        add_rope(writer, config, head_dim)
    add_of_family(writer, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * 94)
    writer.add_token_merges(["t o", "to k"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    add = {str: writer.add_string, int: writer.add_uint32}
    add |= {float: writer.add_float32, bool: writer.add_bool}
    for key, value in (metadata or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    if tensors is None:
        published = published_tensors(model, path.parent)
        tensors = stored({n: t for n, t in published.items() if n not in skip}, config)
    for name, array in tensors.items():
        its = kind if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(array), its)
        writer.add_tensor(name, data, raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_of_family(writer, config):
    """Add the keys that some families alone have."""
    kind = config.model_type
    with_shared = kind in ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text")
    if kind in ("mixtral", "qwen3_moe", "gpt_oss") or with_shared:
        writer.add_expert_count(config.num_experts if with_shared else config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if kind == "qwen3_moe" or with_shared:
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if with_shared:
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"):
        values = config.linear_num_value_heads
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(values)
        writer.add_ssm_inner_size(config.linear_value_head_dim * values)
        writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)
    if kind in ("qwen3_5_text", "qwen3_5_moe_text"):
        writer.add_rope_dimension_sections([1, 1, 0, 0])
    if kind in ("gemma2", "gemma3_text", "olmo3"):
        writer.add_sliding_window(config.sliding_window)
    if kind == "olmo3":
        writer.add_sliding_window_pattern([k == "sliding_attention" for k in config.layer_types])
    if kind == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if kind == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def add_gemma4(writer, config):
    """Add what differs from layer to layer, and the rotary embeddings."""
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    shared, width = config.num_kv_shared_layers, config.intermediate_size
    first = len(slides) - shared
    if config.use_double_wide_mlp:
        width = [width * (1 + (i >= first)) for i in range(len(slides))]
    writer.add_feed_forward_length(width)
    heads, full = config.num_key_value_heads, config.num_global_key_value_heads
    writer.add_head_count_kv(heads if full is None else [heads if s else full for s in slides])
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(slides)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    size, wide = config.head_dim, config.global_head_dim
    writer.add_key_length(wide)
    writer.add_value_length(wide)
    writer.add_key_length_swa(size)
    writer.add_value_length_swa(size)
    writer.add_rope_dimension_count(wide)
    writer.add_rope_dimension_count_swa(size)
    ropes = config.rope_parameters
    writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    turning = int(wide * ropes["full_attention"]["partial_rotary_factor"] / 2)
    divisors = np.array([1.0] * turning + [1e30] * (wide // 2 - turning), np.float32)
    writer.add_tensor("rope_freqs.weight", divisors)
    if config.enable_moe_block:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def add_rope(writer, config, head_dim):
    rope = config.rope_parameters
    if "sliding_attention" in rope:
        if config.model_type != "olmo3":
            writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "llama3":  # as divisors of the frequencies
        exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
        plain = 1.0 / rope["rope_theta"] ** exponents
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    elif rope["rope_type"] == "longrope":
        for name in ("short", "long"):
            divisors = np.array(rope[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", divisors)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")[1])
    elif rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow", 1.0))
        if config.model_type == "ministral3":
            writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
            writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def published_tensors(model, folder):
    """The tensors under the names of published files, as transformers saves them."""
    model.save_pretrained(folder / "published")
    return load_file(folder / "published" / "model.safetensors")


def write_vocabulary(path, metadata):
    """A model just large enough for llama.cpp to load the vocabulary in `metadata`."""
    size = len(metadata["tokenizer.ggml.tokens"])
    one = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = tiny_llama(vocab_size=size, hidden_size=8, tie_word_embeddings=True, **one)
    return write_gguf(path, model, metadata=metadata)
