"""Adapters converted to plain LoRA, against peft and against sums in fp64."""

import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorakit as lk
from tests.adapters.common import edit_config, edit_tensors, hugging_face
from tests.adapters.peft_files.adapters_of_peft import (
    CONFIG,
    IDS,
    KEY,
    LOGITS,
    MOE,
    PREFIX,
    WEIGHTS,
    deltas,
    moe_adapter,
    peft_adapter,
    peft_logits,
)
from tests.conftest import tiny, tiny_llama

FEATURES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"down_proj": 3, "self_attn.v_proj": 40}},
    "all": {
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 8, "q_proj": 2},
        "alpha_pattern": {r"layers\.0\..*": 11},
    },
    "some layers": {"layers_to_transform": [1], "exclude_modules": ["v_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "a bias setting without biases": {"bias": "all"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_peft_computes_the_same_with_the_converted_adapter(tiny_dir, tmp_path, feature):
    theirs = peft_adapter(hugging_face(tiny_dir), tmp_path / "in", **FEATURES[feature])
    with torch.no_grad():
        before, truth = hugging_face(tiny_dir)(IDS).logits, theirs(IDS).logits
    report = lk.convert_adapter(tmp_path / "in", tmp_path / "out")
    assert (truth - before).abs().max() > 0.1
    after = peft_logits(hugging_face(tiny_dir), tmp_path / "out")
    assert (after - truth).abs().max() <= LOGITS
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert type(config["lora_alpha"]) is int
    assert not {"rank_pattern", "alpha_pattern", "use_dora"} & config.keys()
    assert config["use_rslora"] is False
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    names = {name.rpartition(".lora_")[0].removeprefix(PREFIX) for name in tensors}
    chosen = config["target_modules"]  # short, and none of them in vain
    assert all(any(name.endswith(short) for short in chosen) for name in names)
    if feature != "some layers":  # there the other layers have the same last parts
        assert {name.rpartition(".")[2] for name in names} == set(chosen)
    assert not any("base_layer" in name for name in tensors)
    assert (report.layers, report.r) == (len(names), config["r"])
    model = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), tmp_path / "out")
    assert (model(IDS) - truth).abs().max() <= LOGITS


def test_an_embedding_and_its_tied_head(tmp_path):
    base = tmp_path / "base"
    tiny("llama", tie_word_embeddings=True).save_pretrained(base)
    ours = lk.load_model(base, dtype="float32")
    config = lk.LoraConfig(
        target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True, init_lora_weights=False
    )
    lk.attach(ours, config)
    lk.save_adapter(ours, tmp_path / "in")
    lk.convert_adapter(tmp_path / "in", tmp_path / "out")
    again = lk.load_adapter(lk.load_model(base, dtype="float32"), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(IDS), ours(IDS))
        theirs = peft_logits(hugging_face(base), tmp_path / "out")
        assert (theirs - ours(IDS)).abs().max() <= LOGITS


def test_names_are_short_only_where_they_surely_select_the_same(tiny_dir, tmp_path):
    """Only a list in the source tells which other layers there are, if there is no base."""
    some = {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["layers.0.self_attn.v_proj"],
    }
    peft_adapter(hugging_face(tiny_dir), tmp_path / "in", **some)
    written = {}
    for out, base in (("alone", None), ("with base", tiny_dir)):
        lk.convert_adapter(tmp_path / "in", tmp_path / out, base_model=base)
        written[out] = json.loads((tmp_path / out / CONFIG).read_text())["target_modules"]
    q = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert sorted(written["alone"]) == sorted([*q, "model.layers.1.self_attn.v_proj"])
    assert sorted(written["with base"]) == ["model.layers.1.self_attn.v_proj", "q_proj"]
    truth = peft_logits(hugging_face(tiny_dir), tmp_path / "in")
    for out in written:
        after = peft_logits(hugging_face(tiny_dir), tmp_path / out)
        assert (after - truth).abs().max() <= LOGITS


def test_a_plain_adapter_stays_as_it_is(tiny_dir, tmp_path):
    peft_adapter(hugging_face(tiny_dir), tmp_path / "in")
    report = lk.convert_adapter(tmp_path / "in", tmp_path / "out")
    assert (report.r, report.lora_alpha, report.changes) == (4, 6, [])
    assert str(report).startswith("14 layers, r=4, lora_alpha=6, exact")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("in", "out"))
    assert all(torch.equal(after.pop(name), tensor) for name, tensor in before.items())
    assert not after
    # a larger rank is filled with zeros, and a whole s r' needs no rounding
    report = lk.convert_adapter(tmp_path / "in", tmp_path / "wide", rank=8)
    assert (report.r, report.lora_alpha) == (8, 12)
    wide = load_file(tmp_path / "wide" / WEIGHTS)
    for name, tensor in before.items():
        rows, columns = tensor.shape
        assert torch.equal(wide[name][:rows, :columns], tensor)
        assert wide[name].count_nonzero() == tensor.count_nonzero()
    with pytest.raises(lk.LorakitError, match="rank=2 cannot hold a layer of rank 4"):
        lk.convert_adapter(tmp_path / "in", tmp_path / "narrow", rank=2)
    assert not (tmp_path / "narrow").exists()


PIECES = ["q_proj", "v_proj", "self_attn.q_proj", "layers.1.mlp.up_proj", r"layers\.0\..*", "proj"]
PIECES += [r".*_proj", r"\d+.mlp.up_proj", "up_proj|q_proj", "model.layers.0.self_attn.v_proj"]
NAMES = [f"model.layers.{i}.{n}" for i in (0, 1, 10) for n in ("self_attn.q_proj", "mlp.up_proj")]
NAMES += ["model.layers.0.self_attn.v_proj"]


@settings(max_examples=60)
@given(
    ranks=st.dictionaries(st.sampled_from(PIECES), st.integers(1, 9), max_size=4),
    alphas=st.dictionaries(
        st.sampled_from(PIECES),
        st.integers(-3, 40) | st.floats(0.01, 100),
        max_size=4,
    ),
    r=st.integers(1, 9),
    alpha=st.integers(0, 64),
    rslora=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_folded_scalings_have_the_same_delta(
    tmp_path_factory, ranks, alphas, r, alpha, rslora, dtype
):
    from peft.utils.other import get_pattern_key

    path = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    tensors = {}
    for name in NAMES:
        rank = ranks.get(get_pattern_key(ranks, name), r)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, 12, dtype=dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(10, rank, dtype=dtype)
    (path / "in").mkdir()
    save_file(tensors, path / "in" / WEIGHTS)
    values = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "use_rslora": rslora}
    values |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    (path / "in" / CONFIG).write_text(json.dumps(values))
    shown = lk.describe_adapter(path / "in")
    report = lk.convert_adapter(path / "in", path / "out")
    truth, ours = deltas(path / "in"), deltas(path / "out")
    assert ours.keys() == truth.keys()
    for name, (delta, terms) in truth.items():
        # One rounding to fp32 of each value of B, so of each term of the sum: 2^-24 of its size.
        # The sums are fp64. Products below fp32's normal numbers do not occur with these values.
        assert ((ours[name][0] - delta).abs() <= 2**-23 * terms).all()
    assert report.r == max(layer.rank for layer in shown.layers)
    for layer in shown.layers:
        # the trace of rank-sized products in fp64 against the dense product
        dense = truth[layer.name][0].norm().item()
        assert layer.norm_delta == pytest.approx(dense, rel=1e-6, abs=1e-9)
    assert not shown.warnings
    shutil.rmtree(path)


# ---- experts ----

RANKS = {"rank_pattern": {"experts.gate_up_proj": 6}, "alpha_pattern": {"experts.down_proj": 16}}


@pytest.mark.parametrize("kind", MOE)
@pytest.mark.parametrize(
    ("parameters", "config"),
    [
        (("experts.gate_up_proj", "experts.down_proj"), RANKS),
        (("experts.gate_up_proj", "experts.down_proj"), {"use_rslora": True, "lora_alpha": 3}),
        (("experts.down_proj",), {"target_modules": ["q_proj"]}),
        (("mlp.experts.gate_up_proj",), {}),
    ],
    ids=["patterns", "rslora", "down alone", "gate and up alone"],
)
def test_adapters_of_fused_experts(kind, parameters, config, tmp_path):
    logits, truth = moe_adapter(kind, tmp_path, parameters, **config)
    with pytest.raises(lk.LorakitError, match=r"names experts: give base_model"):
        lk.convert_adapter(tmp_path / "in", tmp_path / "out")
    lk.convert_adapter(tmp_path / "in", tmp_path / "out", base_model=tmp_path / "base")
    ours = deltas(tmp_path / "out")
    changed = {name for name, delta in truth.items() if delta.any()}
    assert changed == {f"{name}.weight" for name in ours if ".experts." in name}
    for name in changed:
        # as above; folding s into B adds one rounding, far below that of the merged weights
        assert (ours[name.removesuffix(".weight")][0] - truth[name]).abs().max() <= 1e-6
    model = lk.load_adapter(lk.load_model(tmp_path / "base", dtype="float32"), tmp_path / "out")
    assert (model(IDS) - logits).abs().max() <= LOGITS
    shown = lk.describe_adapter(tmp_path / "in")
    for layer in shown.layers:
        prefix, _, leaf = layer.name.rpartition(".")
        if leaf in ("gate_up_proj", "down_proj"):
            inner = prefix.split(".mlp.")[0]
            leaves = MOE[kind][1:3] if leaf == "gate_up_proj" else MOE[kind][3:]
            squares = [
                delta.norm() ** 2
                for name, delta in truth.items()
                if name.startswith(inner + ".") and name.split(".")[-2] in leaves
            ]
            # of differences of fp32 weights
            assert layer.norm_delta == pytest.approx(math.sqrt(sum(squares)), rel=1e-4)


def test_peft_reads_the_experts_we_write(tmp_path):
    """transformers 5 has Mixtral's experts fused again: peft joins ours on loading."""
    from transformers import AutoModelForCausalLM

    logits, _ = moe_adapter("mixtral", tmp_path)
    lk.convert_adapter(tmp_path / "in", tmp_path / "out", base_model=tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    assert (peft_logits(base, tmp_path / "out") - logits).abs().max() <= LOGITS


# ---- what is refused ----


def cut(path):
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-9])


def set_value(name, value):
    def change(tensors):
        tensors[name][0] = value

    return lambda path: edit_tensors(path, change)


DAMAGED = [
    (shutil.rmtree, r"adapter_config\.json does not exist"),
    (lambda p: (p / WEIGHTS).unlink(), "does not exist"),
    (lambda p: (p / WEIGHTS).rename(p / "adapter_model.bin"), "pickled, which is not read"),
    (lambda p: (p / CONFIG).write_text("[]"), "must hold a JSON object"),
    (lambda p: edit_config(p, peft_type="IA3"), "peft_type is 'IA3'"),
    (lambda p: edit_config(p, r=0), "r must be a positive whole number"),
    (lambda p: edit_config(p, lora_alpha="8"), "lora_alpha must be int or float"),
    (lambda p: edit_config(p, rank_pattern={"q_proj": "4"}), "rank_pattern of 'q_proj'"),
    (lambda p: edit_config(p, alpha_pattern={"q": [1]}), "alpha_pattern of 'q' must be a number"),
    (lambda p: edit_config(p, alpha_pattern={"(": 1}), r"'\(' is no valid regex"),
    (lambda p: edit_config(p, rank_pattern={"(?i)Q_PROJ": 1}), "is no valid regex"),
    (lambda p: edit_config(p, lora_alpha=10**400), "lora_alpha must be int or float, not 1000"),
    (lambda p: edit_config(p, r=10**400), "r must be int, not 1000"),
    (cut, "damaged or cut off"),
    (lambda p: edit_tensors(p, lambda t: t.pop(KEY + ".lora_A.weight")), "lora_A.weight is missi"),
    (
        lambda p: edit_tensors(p, lambda t: t.update({KEY + ".lora_A.weight": torch.ones(3)})),
        r"is \(3,\); adapters of linear layers",
    ),
    (
        lambda p: edit_tensors(p, lambda t: t.update({KEY + ".lora_A.weight": torch.ones(3, 32)})),
        "no one rank",
    ),
]
REFUSED = [
    (lambda p: edit_config(p, modules_to_save=["lm_head"]), "modules_to_save=.*merge it into"),
    (lambda p: edit_config(p, trainable_token_indices=[1, 2]), "trainable_token_indices="),
    (lambda p: edit_config(p, use_qalora=True), "use_qalora=true does not fit in plain LoRA"),
    (lambda p: edit_config(p, init_lora_weights="pissa"), 'init_lora_weights="pissa" changed the'),
    (lambda p: edit_config(p, use_dora=True), "lora_magnitude_vector is missing"),
    (lambda p: edit_config(p, r=3), "is of rank 4, adapter_config.json gives 3"),
    (
        lambda p: edit_tensors(p, lambda t: t.update({KEY + ".lora_B.bias": torch.ones(32)})),
        r"lora_B.bias \(lora_bias\) does not fit in plain LoRA unless it is zero",
    ),
    (
        lambda p: edit_tensors(
            p, lambda t: t.update({KEY + ".lora_magnitude_vector": torch.ones(32)})
        ),
        "does not go with use_dora=false",
    ),
    (lambda p: edit_tensors(p, lambda t: t.update(x=torch.ones(1))), "tensor x is of no kind"),
    (set_value(KEY + ".lora_B.weight", math.inf), "holds NaN or infinite values"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED + REFUSED)
def test_what_cannot_be_converted(saved, tmp_path, damage, message):
    damage(saved)
    with pytest.raises(lk.LorakitError, match=message):
        lk.convert_adapter(saved, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if p.name != "in"] == []
    if (damage, message) in DAMAGED:
        with pytest.raises(lk.LorakitError, match=message):
            lk.describe_adapter(saved)
    else:
        assert len(lk.describe_adapter(saved).layers) == 14


def test_biases_are_refused(tiny_dir, tmp_path):
    base = tiny_llama(attention_bias=True)
    peft_adapter(base, tmp_path / "in", bias="lora_only")
    assert lk.describe_adapter(tmp_path / "in").biases == 8
    with pytest.raises(lk.LorakitError, match=r"base_layer.bias does not fit in plain LoRA"):
        lk.convert_adapter(tmp_path / "in", tmp_path / "out")
    # a lora_bias that was never trained is zero: exact without it
    peft_adapter(hugging_face(tiny_dir), tmp_path / "zero", lora_bias=True)
    zero = {n: 0 for n in load_file(tmp_path / "zero" / WEIGHTS) if n.endswith(".bias")}
    edit_tensors(tmp_path / "zero", lambda t: [t[name].zero_() for name in zero])
    report = lk.convert_adapter(tmp_path / "zero", tmp_path / "out")
    assert report.changes == ["lora_bias left out: it is zero"]


def test_targets_are_never_overwritten(saved, tmp_path, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    for same in (saved, saved / ".." / "in"):
        with pytest.raises(lk.LorakitError, match="is the adapter to be converted"):
            lk.convert_adapter(saved, same)
    shutil.copytree(saved, tmp_path / "other")
    with pytest.raises(lk.LorakitError, match="holds another adapter already: remove it first"):
        lk.convert_adapter(saved, tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(lk.LorakitError, match="is not empty"):
        lk.convert_adapter(saved, tmp_path / "full")
    with pytest.raises(lk.LorakitError, match="is a file"):
        lk.convert_adapter(saved, tmp_path / "full" / "notes.txt")
    with pytest.raises(lk.LorakitError, match=r"none/adapter_config\.json does not exist"):
        lk.convert_adapter(tmp_path / "none", tmp_path / "missing")
    assert before == {p.name: p.read_bytes() for p in saved.iterdir()}
    (tmp_path / "empty").mkdir()
    lk.convert_adapter(saved, tmp_path / "empty")
    # a failure after the weights leaves nothing behind
    known = sorted(p.name for p in tmp_path.iterdir())

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("lorakit.adapters.peft_files.convert.write_json", full_disk)
    with pytest.raises(OSError, match="no space"):
        lk.convert_adapter(saved, tmp_path / "late")
    assert sorted(p.name for p in tmp_path.iterdir()) == known
