"""Adapters looked at and converted, against peft and against sums in fp64."""

import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.adapters.peft_files.experts import join_experts, split_experts
from tests.adapters.test_peft_files import edit_config, edit_tensors, hugging_face
from tests.conftest import published, tiny, tiny_llama

IDS = torch.arange(24).view(2, 12)
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Two fp32 implementations of the same adapted tiny model, as in tests/test_adapter.py.
LOGITS = 1e-4


def peft_adapter(base, path, **config):
    """A peft adapter of a transformers model with a random B (and DoRA magnitudes), saved."""
    import peft

    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 6, "target_modules": LEAVES, **config}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(0, 0.1)
            if "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2))
    model.save_pretrained(path)
    return model


def peft_logits(base, path):
    from peft import PeftModel

    with torch.no_grad():
        return PeftModel.from_pretrained(base, path).eval()(IDS).logits


def deltas(path):
    """s B A of every layer in fp64 by peft's rules, with |s| |B| |A|, which bounds its terms."""
    from peft.utils.other import get_pattern_key

    config, tensors = json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)
    found = {}
    for key in [name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]:
        name = key.removeprefix(PREFIX)
        ranks, alphas = config.get("rank_pattern", {}), config.get("alpha_pattern", {})
        r = ranks.get(get_pattern_key(ranks, name), config["r"])
        alpha = alphas.get(get_pattern_key(alphas, name), config["lora_alpha"])
        s = alpha / (math.sqrt(r) if config["use_rslora"] else r)
        a, b = (tensors[f"{key}.lora_{part}.weight"].double() for part in "AB")
        assert a.shape[0] == r
        found[name] = s * b @ a, abs(s) * b.abs() @ a.abs()
    return found


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
    assert set(config["target_modules"]) == names
    assert not any("base_layer" in name for name in tensors)
    assert (report.layers, report.r) == (len(names), config["r"])
    if feature != "embedding and head":  # load_adapter reads linear layers
        model = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), tmp_path / "out")
        assert (model(IDS) - truth).abs().max() <= LOGITS


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


# ---- DoRA ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dora(tiny_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("dora")
    model = peft_adapter(
        hugging_face(tiny_dir), path, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2}
    )
    with torch.no_grad():
        logits = model(IDS).logits
    before = {n: p.clone() for n, p in hugging_face(tiny_dir).named_parameters()}
    merged = dict(model.merge_and_unload().named_parameters())
    return path, logits, {n: merged[n] - before[n] for n in before if n.split(".")[-2] in LEAVES}


def test_dora_of_full_rank(dora, tiny_dir, tmp_path):
    path, truth, _ = dora
    report = lk.convert_adapter(path, tmp_path / "out", base_model=tiny_dir, rank=48)
    # the layers are at most 32 wide on one side: nothing is lost but fp32 roundings
    assert report.relative_error < 1e-5
    after = peft_logits(hugging_face(tiny_dir), tmp_path / "out")
    assert (after - truth).abs().max() <= LOGITS
    assert (hugging_face(tiny_dir)(IDS).logits - truth).abs().max() > 0.1


@pytest.mark.parametrize("rank", [None, 1, 12])
def test_dora_is_approximated_as_well_as_can_be(dora, tiny_dir, tmp_path, rank):
    path, _, truth = dora
    report = lk.convert_adapter(path, tmp_path / "out", base_model=tiny_dir, rank=rank)
    kept = rank or 8  # twice the largest
    ours, missed, whole = deltas(tmp_path / "out"), 0.0, 0.0
    assert {f"{name}.weight" for name in ours} == truth.keys()
    for name, error in report.errors.items():
        delta = truth[f"{name}.weight"].double()
        values = torch.linalg.svdvals(delta)
        best = (values[kept:].norm() / values.norm()).item()
        real = ((ours[name][0] - delta).norm() / delta.norm()).item()
        # peft's merged weight less its base is a difference of fp32 numbers: 1e-6 of the delta
        assert error == pytest.approx(real, abs=1e-5)
        # subspace iteration with twice the vectors: within a percent of the optimum
        assert best - 1e-5 <= real <= 1.01 * best + 1e-5
        missed += real**2 * delta.norm().item() ** 2
        whole += delta.norm().item() ** 2
    assert report.relative_error == pytest.approx(math.sqrt(missed / whole), abs=1e-5)
    assert report.r == report.lora_alpha == kept
    assert f"approximated by rank {kept}" in str(report)
    assert str(report).count("\n") >= len(ours)


def test_dora_is_the_same_again(dora, tiny_dir, tmp_path):
    torch.manual_seed(1)
    lk.convert_adapter(dora[0], tmp_path / "a", base_model=tiny_dir)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    lk.convert_adapter(dora[0], tmp_path / "b", base_model=tiny_dir)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn from it


def test_dora_on_a_packed_base(tiny_dir, tmp_path):
    """The magnitudes belong to the weights that were trained on, as they are stored."""
    packed = lk.load_model(tiny_dir, dtype="float32", quantize="nf4", device="cpu")
    lk.save_model(packed, tmp_path / "packed", packed=True)
    base = hugging_face(tiny_dir)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.split(".")[-2] in LEAVES:
                module = packed.get_submodule(name.removesuffix(".weight"))
                parameter.copy_(module.dequantize())
    base.save_pretrained(tmp_path / "dense")
    truth = peft_adapter(base, tmp_path / "in", use_dora=True)(IDS).logits.detach()
    lk.convert_adapter(tmp_path / "in", tmp_path / "out", base_model=tmp_path / "packed", rank=48)
    after = peft_logits(hugging_face(tmp_path / "dense"), tmp_path / "out")
    assert (after - truth).abs().max() <= LOGITS


@pytest.mark.parametrize("outer", ["model.language_model.", "language_model.model."])
def test_dora_finds_a_text_model_by_its_other_names(dora, tiny_dir, tmp_path, outer):
    """As adapters of Gemma 3 with its vision tower name the layers."""
    plain = lk.convert_adapter(dora[0], tmp_path / "plain", base_model=tiny_dir)
    shutil.copytree(dora[0], tmp_path / "in")

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace(f"{PREFIX}model.", PREFIX + outer)] = tensors.pop(name)

    edit_tensors(tmp_path / "in", rename)
    report = lk.convert_adapter(tmp_path / "in", tmp_path / "out", base_model=tiny_dir)
    assert list(report.errors.values()) == list(plain.errors.values())
    names = json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"]
    assert all(name.startswith(outer + "layers.") for name in names)


def test_dora_of_a_tied_head(tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    weight = base.lm_head.weight.detach().clone()
    model = peft_adapter(base, tmp_path / "in", use_dora=True, target_modules=["lm_head"])
    lk.convert_adapter(tmp_path / "in", tmp_path / "out", base_model=tmp_path / "base", rank=32)
    layer = model.base_model.model.lm_head
    m, s = layer.lora_magnitude_vector["default"].weight.double(), layer.scaling["default"]
    adapted = weight + s * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    truth = (m / adapted.double().norm(dim=1))[:, None] * adapted.double() - weight.double()
    # of full rank: only fp32 roundings of a weight of some 1
    assert (deltas(tmp_path / "out")["lm_head"][0] - truth).abs().max() < 1e-5


def test_dora_with_rows_of_zeros(dora, tiny_dir, tmp_path):
    """A pruned row that the adapter does not touch stays zero; peft divides 0 by 0."""
    shutil.copytree(dora[0], tmp_path / "in")
    key = f"{PREFIX}model.layers.0.mlp.up_proj"

    def prune(tensors):
        tensors[f"{key}.lora_B.weight"][3] = 0
        tensors[f"{key}.lora_magnitude_vector"][3] = 0

    edit_tensors(tmp_path / "in", prune)
    model = lk.load_model(tiny_dir, dtype="float32", device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0
    lk.save_model(model, tmp_path / "base")
    lk.convert_adapter(tmp_path / "in", tmp_path / "out", base_model=tmp_path / "base", rank=32)
    assert deltas(tmp_path / "out")["model.layers.0.mlp.up_proj"][0][3].abs().max() < 1e-6


# ---- experts ------------------------------------------------------------------------------------

MOE = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
SIZES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
}


def moe_adapter(kind, path, parameters=("experts.gate_up_proj", "experts.down_proj"), **config):
    """A peft adapter of fused experts, and the weights' changes under their published names."""
    base = tiny(kind, **SIZES[kind])
    before = published({n: p.clone() for n, p in base.named_parameters()}, kind)
    base.save_pretrained(path / "base")
    config = {"target_modules": [], "target_parameters": list(parameters), **config}
    model = peft_adapter(base, path / "in", **config)
    with torch.no_grad():
        logits = model(IDS).logits
    after = published(dict(model.merge_and_unload().named_parameters()), kind)
    return logits, {n: (after[n] - before[n]).detach() for n in before if ".experts." in n}


RANKS = {"rank_pattern": {"experts.gate_up_proj": 6}, "alpha_pattern": {"experts.down_proj": 16}}


@pytest.mark.parametrize("kind", MOE)
def test_split_experts_as_peft_computes_them(kind, tmp_path):
    _, truth = moe_adapter(kind, tmp_path, lora_alpha=8)
    tensors = load_file(tmp_path / "in" / WEIGHTS)
    assert {".".join(name.split(".")[-4:-2]) for name in tensors} == {
        "mlp.experts",
        "experts.base_layer",
    }
    experts = 4 if kind == "mixtral" else 5
    split = split_experts(tensors, experts, MOE[kind])
    assert len(split) == 2 * len(truth)
    for name, delta in truth.items():
        key = PREFIX + name.removesuffix(".weight")
        ours = 2 * split[f"{key}.lora_B.weight"] @ split[f"{key}.lora_A.weight"]
        # the truth is a difference of fp32 weights, whose largest are some 1.5: 2^-24 of that
        assert (ours - delta).abs().max() <= 1e-6
        assert delta.abs().max() > 0.01
    # joined again: the same update from twice the rank, and that is taken apart again
    joined = join_experts(split, MOE[kind])
    assert joined.keys() == tensors.keys()
    for name in tensors:
        e_r = 2 if ".base_layer." in name else 1
        assert joined[name].numel() == e_r * tensors[name].numel()
        assert e_r == 2 or torch.equal(joined[name], tensors[name])
    again = split_experts(joined, experts, MOE[kind])
    assert again.keys() == split.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in split.items())


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


def test_peft_joins_experts_as_we_do(tmp_path):
    """What peft itself makes of single experts, saved again, is join_experts of them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    moe_adapter("mixtral", tmp_path)
    lk.convert_adapter(tmp_path / "in", tmp_path / "out", base_model=tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    PeftModel.from_pretrained(base, tmp_path / "out").save_pretrained(tmp_path / "joined")
    theirs = load_file(tmp_path / "joined" / WEIGHTS)
    ours = join_experts(load_file(tmp_path / "out" / WEIGHTS), MOE["mixtral"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_wrong_experts():
    a, b = torch.ones(8, 6), torch.ones(10, 8)
    key = "model.layers.0.mlp.experts"
    pair = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    with pytest.raises(lk.LorakitError, match="are not those of 3 experts"):
        split_experts(pair, 3)
    with pytest.raises(lk.LorakitError, match="experts must be a whole number from 1 on, not 0"):
        split_experts(pair, 0)
    with pytest.raises(lk.LorakitError, match="only one of lora_A and lora_B"):
        split_experts({f"{key}.lora_A.weight": a}, 2)
    with pytest.raises(lk.LorakitError, match="follows neither from its shape nor"):
        split_experts(pair, 2)
    split = split_experts({**pair, "other": a}, 2, target_parameters=["down_proj"])
    assert split.pop("other") is a
    assert f"{key}.1.down_proj.lora_B.weight" in split
    missing = split.pop(f"{key}.0.down_proj.lora_B.weight")
    with pytest.raises(lk.LorakitError, match="lora_B of expert 0's down_proj is missing"):
        join_experts(split)
    split[f"{key}.0.down_proj.lora_B.weight"] = missing[:, :2]
    with pytest.raises(lk.LorakitError, match=r"of expert 0's \(10, 2\)"):
        join_experts(split)
    halves = split_experts(pair, 2, target_parameters=["gate_up_proj"])
    with pytest.raises(lk.LorakitError, match="gate_proj and up_proj can only be joined together"):
        join_experts({name: t for name, t in halves.items() if "gate_proj" in name})


# ---- what is refused, and what is shown ---------------------------------------------------------


@pytest.fixture(scope="module")
def made(tiny_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("made")
    peft_adapter(hugging_face(tiny_dir), path)
    return path


@pytest.fixture
def saved(made, tmp_path):
    shutil.copytree(made, tmp_path / "in")
    return tmp_path / "in"


KEY = f"{PREFIX}model.layers.0.self_attn.q_proj"


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


def test_dora_needs_its_base(dora, tiny_dir, tmp_path):
    with pytest.raises(lk.LorakitError, match=r"weights of the base: give base_model \(--base-m"):
        lk.convert_adapter(dora[0], tmp_path / "out")
    tiny_llama(num_hidden_layers=1, vocab_size=300).save_pretrained(tmp_path / "short")
    with pytest.raises(lk.LorakitError, match=r"has \(32, 32\)"):
        lk.convert_adapter(dora[0], tmp_path / "out", base_model=tmp_path / "short")
    tiny_llama(num_hidden_layers=1, num_key_value_heads=2).save_pretrained(tmp_path / "short")
    with pytest.raises(lk.LorakitError, match=r"layer model\.layers\.1\S* is none of"):
        lk.convert_adapter(dora[0], tmp_path / "out", base_model=tmp_path / "short")
    with pytest.raises(lk.LorakitError, match="rank must be a positive"):
        lk.convert_adapter(dora[0], tmp_path / "out", base_model=tiny_dir, rank=0)
    assert not (tmp_path / "out").exists()


def test_what_is_shown(saved):
    report = lk.describe_adapter(saved)
    tensors = load_file(saved / WEIGHTS)
    assert len(report.layers) == 14
    assert report.warnings == []
    squares = 0.0
    for layer in report.layers:
        a, b = (tensors[f"{PREFIX}{layer.name}.lora_{part}.weight"].double() for part in "AB")
        assert (layer.rank, layer.alpha, layer.scaling) == (4, 6, 1.5)
        assert (layer.dtype, layer.bytes) == ("float32", 4 * (a.numel() + b.numel()))
        # fp64 sums in another order
        assert layer.norm_a == pytest.approx(a.norm().item(), rel=1e-12)
        assert layer.norm_b == pytest.approx(b.norm().item(), rel=1e-12)
        assert layer.norm_delta == pytest.approx((1.5 * b @ a).norm().item(), rel=1e-12)
        squares += (1.5 * b @ a).norm().item() ** 2
    assert report.norm_delta == pytest.approx(math.sqrt(squares), rel=1e-12)
    text = str(report)
    assert f"14 layers, rank 4, {report.bytes:,} bytes" in text
    assert "warning" not in text

    def spoil(tensors):
        tensors[KEY + ".lora_B.weight"].zero_()
        tensors[KEY.replace("q_proj", "k_proj") + ".lora_B.weight"][0, 0] = math.nan
        tensors["base_model.model.vera_A"] = torch.ones(2)

    edit_tensors(saved, spoil)
    edit_config(saved, rank_pattern={"layers.1.self_attn.v_proj": 3})
    broken, untrained, wrong, unknown = lk.describe_adapter(saved).warnings
    assert broken == "NaN or infinite values: model.layers.0.self_attn.k_proj"
    assert untrained.endswith("changes nothing: model.layers.0.self_attn.q_proj")
    assert wrong.endswith("adapter_config.json gives: model.layers.1.self_attn.v_proj")
    assert unknown == "tensors of no known kind: base_model.model.vera_A"
    assert str(lk.describe_adapter(saved)).count("\nwarning: ") == 4
    save_file({}, saved / WEIGHTS)
    assert lk.describe_adapter(saved).warnings == ["no layer is adapted"]


def test_what_is_counted(tiny_dir, tmp_path):
    base = hugging_face(tiny_dir)
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5]}}
    peft_adapter(base, tmp_path / "a", use_dora=True, modules_to_save=["lm_head"], **settings)
    report = lk.describe_adapter(tmp_path / "a")
    assert (report.modules_to_save, report.trainable_tokens, report.magnitudes) == (1, 2, 2)
    assert "2 with a magnitude (DoRA)" in str(report)
    peft_adapter(hugging_face(tiny_dir), tmp_path / "b", target_modules=["embed_tokens", "q_proj"])
    report = lk.describe_adapter(tmp_path / "b")
    assert (report.embeddings, report.copies, len(report.layers)) == (1, 1, 3)
    assert report.warnings == []
