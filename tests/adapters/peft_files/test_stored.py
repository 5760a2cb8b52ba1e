"""Files of adapters of any content."""

import json
import shutil

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lorakit as lk
from tests.adapters.peft_files.adapters_of_peft import CONFIG, PREFIX, WEIGHTS

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)
NUMBERS = st.integers() | st.floats() | st.integers(1, 4)
PATTERNS = ["rank_pattern", "alpha_pattern"]
SETTINGS = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"]
SETTINGS += ["modules_to_save", "target_parameters", "lora_dropout", "task_type", "arrow_config"]
SETTINGS += ["init_lora_weights", "base_model_name_or_path", "peft_type"]
ENDS = [".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".lora_embedding_A", ".bias"]
ENDS += [".lora_B.bias", ".base_layer.weight", ".token_adapter.trainable_tokens_delta", ".lora_C"]
KEYS = ["model.layers.0.mlp.experts", "model.layers.0.mlp.experts.base_layer", "layers.٣.q_proj"]


@settings(max_examples=150)
@given(
    values=st.dictionaries(st.sampled_from(SETTINGS), JSON, max_size=4)
    | st.fixed_dictionaries({n: st.dictionaries(st.text(), NUMBERS) for n in PATTERNS})
    | st.fixed_dictionaries({"r": NUMBERS, "lora_alpha": NUMBERS}),
    tensors=st.dictionaries(
        st.builds(
            str.__add__, st.sampled_from([*KEYS, "model.embed_tokens", ""]), st.sampled_from(ENDS)
        ),
        st.lists(st.integers(0, 4), max_size=3),
        max_size=5,
    ),
)
def test_any_files_are_read_or_refused_in_one_sentence(tmp_path_factory, values, tensors):
    path = tmp_path_factory.mktemp("any")
    (path / "in").mkdir()
    (path / "in" / CONFIG).write_text(json.dumps({"peft_type": "LORA"} | values))
    tensors = {PREFIX + name: torch.ones(shape) for name, shape in tensors.items()}
    save_file(tensors, path / "in" / WEIGHTS)
    try:
        str(lk.describe_adapter(path / "in"))
        lk.convert_adapter(path / "in", path / "out")
    except lk.LorakitError as error:
        assert str(error)
        assert not (path / "out").exists()
    shutil.rmtree(path)
