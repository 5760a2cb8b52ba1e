"""The contents of config.json files, as tests of their reading start from them."""

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": [128001, 128008, 128009],
}
MISTRAL = {"model_type": "mistral"}
MIXTRAL = {"model_type": "mixtral"}
QWEN3_MOE = {"model_type": "qwen3_moe"}
GEMMA2 = {"model_type": "gemma2"}
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
