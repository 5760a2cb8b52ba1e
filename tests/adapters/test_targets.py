"""Which layers target_modules selects."""

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.adapters.manage import attached
from lorakit.adapters.targets import is_saved_whole, match_targets, short_names
from tests.adapters.common import SHORT_IDS, filled, hugging_face

NAMES = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(12) for p in "qkvo"] + ["lm_head"]


def test_targets():
    assert len(match_targets(NAMES, "all-linear")) == 48
    assert len(match_targets(NAMES, ["q_proj", "v_proj"])) == 24
    assert match_targets(NAMES, ["1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]
    assert match_targets(NAMES, r".*\.(1|2)\.self_attn\.q_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
    ]
    assert match_targets(NAMES, ["lm_head"]) == ["lm_head"]


@given(
    st.lists(
        st.sampled_from([*NAMES, "q_proj", "self_attn.k_proj", "3.self_attn.o_proj"]), min_size=1
    )
)
def test_targets_by_the_rule_of_peft(targets):
    """A name is selected iff it equals an entry or ends with '.' + entry."""
    expected = [n for n in NAMES if any(n == t or n.endswith("." + t) for t in targets)]
    assert match_targets(NAMES, targets) == expected


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_short_names_select_the_same(places):
    """An adapter on some layers is written so that exactly these are read."""
    written = short_names(sorted(places), set(NAMES) - places)
    assert set(match_targets(NAMES, written)) == places
    assert all(name in places or name.count(".") == 0 for name in written)


def test_short_names_are_the_last_parts_where_these_are_clear():
    places = [name for name in NAMES if name.endswith(("q_proj", "v_proj"))]
    assert short_names(places, set(NAMES) - set(places)) == ["q_proj", "v_proj"]
    others = {*NAMES, "vision_tower.layers.0.self_attn.q_proj"} - set(places)
    written = short_names(places, others)
    assert len(written) == 13
    assert "v_proj" in written
    assert "q_proj" not in written


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_prj"], "'v_prj' matches no layer .did you mean 'v_proj'"),
        (["proj"], "'proj' matches no layer"),
        ("q_proj", "regex 'q_proj' matches no layer .did you mean 'q_proj'.*a list"),
        (r"(.*q_proj", "no valid regex"),
        ("", "target_modules is empty"),
        ([], "target_modules is empty"),
    ],
)
def test_a_target_that_matches_nothing(model, targets, message):
    before = dict(model.named_parameters())
    with pytest.raises(lk.LorakitError, match=message):
        lk.attach(model, lk.LoraConfig(target_modules=targets))
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p.requires_grad for p in model.parameters())


def test_whole_names_stay_whatever_the_layers(tmp_path, tiny_dir):
    """PEFT's rule: layers_to_transform is not asked about a layer that is named whole."""
    options = {"r": 2, "target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}
    theirs = peft.get_peft_model(hugging_face(tiny_dir), peft.LoraConfig(**options)).eval()
    filled(theirs).save_pretrained(tmp_path)
    model = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), tmp_path)
    assert sorted(attached(model)) == ["lm_head", "model.layers.1.self_attn.q_proj"]
    # of logits up to 3, through two layers: fp32 sums in another order
    assert (model(SHORT_IDS) - theirs(SHORT_IDS).logits).abs().max() < 1e-4


def test_a_module_lies_in_one_that_is_saved():
    config = lk.LoraConfig(modules_to_save=["layers.1", "head"])
    assert is_saved_whole("model.layers.1.mlp", config)
    assert is_saved_whole("head", config)
    assert not is_saved_whole("model.layers.11.mlp", config)
    assert not is_saved_whole("head", lk.LoraConfig())


def test_all_linear_leaves_out_what_decides():
    """Routers, by their own name or their module's, and the small layers of linear attention."""
    kept = ["mlp.gate_proj", "mlp.experts.3.down_proj", "linear_attn.in_proj_z", "self_attn.o_proj"]
    small = ["mlp.gate", "mlp.shared_expert_gate", "router.proj", "linear_attn.in_proj_ba"]
    names = [f"model.layers.0.{name}" for name in [*small, *kept]]
    assert match_targets([*names, "lm_head"], "all-linear") == names[len(small) :]
