"""The step of one compiled call: taken where it may be, and then as exact as the forward pass."""

import pytest
import torch

import lorakit as lk
from lorakit import kernels
from lorakit.inference.decode import Decoding
from tests.conftest import FAMILY_VARIANTS, LOGITS, TINY_VARIANTS, tiny

if not kernels.decode_compiled(torch.device("cpu")):
    pytest.skip("the CPU library was not built", allow_module_level=True)

VARIANTS = {"llama": ("llama", TINY_VARIANTS["gqa"])} | FAMILY_VARIANTS
VARIANTS |= {"llama yarn": ("llama", TINY_VARIANTS["yarn_rope"])}
NOT_COMPILED = ("mixtral", "qwen3_moe", "qwen2_moe", "phi3", "granite", "olmo2", "olmo3")
NOT_COMPILED += ("gpt_oss", "gemma4_text", "gemma4_unified_text")
NOT_COMPILED += ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
NOT_COMPILED += ("ministral3",)  # beyond the positions where its queries are scaled; see below
DENSE = {name: v for name, v in VARIANTS.items() if v[0] not in NOT_COMPILED}
variants = pytest.mark.parametrize(("family", "options"), DENSE.values(), ids=DENSE.keys())


def load(tmp_path, family="llama", options=TINY_VARIANTS["gqa"], dtype="float32", **how):
    if not (tmp_path / "config.json").exists():
        tiny(family, **options).save_pretrained(tmp_path)
    return lk.load_model(tmp_path, dtype=dtype, **how)


def run(model, rows, steps, shorter, fused):
    """Logits after a prompt and after every following token, [B, 1 + steps, V].

    Row b begins `shorter[b]` tokens later than the first.
    """
    decoding = Decoding(model, len(shorter), rows.shape[1])
    if not fused:
        decoding.compiled = None
    else:
        assert decoding.compiled is not None
    prompt = rows.shape[1] - steps
    with torch.no_grad():
        lines, first = decoding.read(
            [r[n:prompt].tolist() for r, n in zip(rows, shorter, strict=True)]
        )
        found = [first]
        found += [decoding(lines, rows[:, t : t + 1]) for t in range(prompt, rows.shape[1])]
    return torch.stack(found, 1)


@variants
@pytest.mark.parametrize("shorter", [[0], [0, 4, 11]], ids=["one row", "rows of three lengths"])
def test_fp32_logits_equal_the_forward_pass(tmp_path, family, options, shorter):
    model = load(tmp_path, family, options)
    rows = torch.randint(97, (len(shorter), 40), generator=torch.Generator().manual_seed(1))
    plain = run(model, rows, 26, shorter, fused=False)
    fused = run(model, rows, 26, shorter, fused=True)
    assert (fused - plain).abs().max() <= LOGITS
    assert plain.abs().max() > 1


@variants
@pytest.mark.parametrize("shorter", [[0], [0, 2]], ids=["one row", "rows of two lengths"])
def test_bf16_logits_are_at_least_as_near_to_exact_ones(tmp_path, family, options, shorter):
    """The activations of the compiled step stay fp32, while the forward pass rounds them to bf16.

    So the step should be nearer to exact arithmetic on the bf16 weights. Prompts take it too, on a
    processor without AVX-512.
    """
    model = load(tmp_path, family, options, dtype="bfloat16")
    exact = load(tmp_path, family, options).bfloat16().float()  # the same weights, all in fp32
    rows = torch.randint(97, (len(shorter), 14), generator=torch.Generator().manual_seed(2))
    truth = run(exact, rows, 10, shorter, fused=False)
    plain = (run(model, rows, 10, shorter, fused=False) - truth).abs()
    fused = (run(model, rows, 10, shorter, fused=True) - truth).abs()
    assert fused.mean() <= plain.mean()
    assert fused.max() <= 1.5 * plain.max()  # a single logit may be lucky in the forward pass


THROUGHOUT = {"quant_type": "nf4", "embed_tokens": "int8", "lm_head": "nf4"}


@pytest.mark.parametrize("quantize", ["nf4", "int8", THROUGHOUT])
def test_packed_weights_are_decoded_as_the_forward_pass_does(tmp_path, quantize):
    options = {**TINY_VARIANTS["gqa"], "hidden_size": 64, "intermediate_size": 128}
    model = load(tmp_path, options=options, quantize=quantize)
    rows = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(1))
    plain = run(model, rows, 12, [0, 4], fused=False)
    assert (run(model, rows, 12, [0, 4], fused=True) - plain).abs().max() <= LOGITS
    lk.attach(model, lk.LoraConfig(r=2))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, 0.1)
    adapted = run(model, rows, 12, [0, 4], fused=False)
    assert (run(model, rows, 12, [0, 4], fused=True) - adapted).abs().max() <= LOGITS
    assert (adapted - plain).abs().max() > 1e-2


@pytest.mark.parametrize("window", [None, 6])
def test_a_long_prompt_goes_in_parts(tmp_path, window):
    options = {**TINY_VARIANTS["gqa"], "max_position_embeddings": 512, "sliding_window": window}
    model = load(tmp_path, "mistral", options)
    rows = torch.randint(97, (2, 400), generator=torch.Generator().manual_seed(3))
    decoding = Decoding(model, 2, 400)
    decoding.compiled_prompts = True
    plain = run(model, rows, 0, [0, 3], fused=False)
    with torch.no_grad():
        lines, logits = decoding.read([rows[0].tolist(), rows[1, 3:].tolist()])
    assert (logits - plain[:, 0]).abs().max() <= LOGITS
    assert [line.length for line in lines] == [400, 397]


def test_merged_adapters_are_decoded_merged(tmp_path):
    model = load(tmp_path)
    lk.attach(model, lk.LoraConfig(r=2))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, 0.1)
    rows = torch.randint(97, (1, 12))
    adapted = run(model, rows, 8, [0], fused=False)
    assert (run(model, rows, 8, [0], fused=True) - adapted).abs().max() <= LOGITS
    lk.merge(model)
    merged = run(model, rows, 8, [0], fused=True)
    assert (merged - adapted).abs().max() <= LOGITS
    with lk.disable_adapters(model):
        base = run(model, rows, 8, [0], fused=True)
    lk.unmerge(model)
    lk.detach(model)
    assert torch.equal(run(model, rows, 8, [0], fused=True), base)
    assert (base - adapted).abs().max() > 1e-2


QV = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
LORA = ["q_proj", "k_proj", "v_proj", "down_proj"]  # no layer takes two methods
ADAPTERS = {
    "lora": lk.LoraConfig(r=3, lora_alpha=5, target_modules=LORA),
    "rslora": lk.LoraConfig(r=9, target_modules=["q_proj", "down_proj"], use_rslora=True),
    "pissa": lk.LoraConfig(**QV, init_lora_weights="pissa"),
    "vera": lk.VeraConfig(r=4, target_modules=["o_proj"]),
    "miss": lk.MissConfig(r=4, target_modules=["gate_proj"]),
    "dora": lk.LoraConfig(**QV, use_dora=True),
    "ia3": lk.IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"]),
    "embedding": lk.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
}
COMPILED = ("lora", "rslora", "pissa", "vera", "miss")


@pytest.fixture
def adapted(tmp_path):
    """A model with an adapter of every kind, all of random values."""
    model = load(tmp_path)
    for name, config in ADAPTERS.items():
        lk.attach(model, config, name=name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ADAPTERS:
            lk.set_adapter(model, name)
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def test_every_row_may_have_an_adapter_of_its_own(adapted, monkeypatch):
    names = [None, *ADAPTERS, "lora"]
    n = len(names)
    rows = torch.randint(97, (n, 12), generator=torch.Generator().manual_seed(1))
    with lk.adapter_rows(adapted, names), torch.no_grad():
        truth = adapted(rows)
    passes = []
    by_modules = Decoding._by_modules
    monkeypatch.setattr(Decoding, "_by_modules", lambda *a: passes.append(a[1]) or by_modules(*a))
    decoding = Decoding(adapted, n, 12)
    assert set(decoding.compiled.plan.adapters) == set(COMPILED)
    with torch.no_grad():
        lines = [decoding.begin() for _ in range(n)]
        decoding(lines, rows[:, :8], adapters=names)
        several = [i for i, name in enumerate(names) if name is None or name in COMPILED]
        others = [i for i in range(n) if i not in several]
        passes.clear()
        for t in range(8, 12):
            for group in (several, others):
                chosen = [names[i] for i in group]
                now = [lines[i] for i in group]
                logits = decoding(now, rows[group, t : t + 1], adapters=chosen)
                assert (logits - truth[group, t]).abs().max() <= LOGITS
    assert passes == [[lines[i] for i in others]] * 4
    lk.set_adapter(adapted, "dora")
    assert not Decoding(adapted, 1, 8).compiled.plan.numbers(1, None)
    with lk.disable_adapters(adapted):
        assert Decoding(adapted, 1, 8).compiled.plan.numbers(2, None) == [None, None]


def test_what_the_kernel_does_not_know_takes_the_forward_pass(tmp_path):
    assert Decoding(load(tmp_path), 1, 8).compiled is not None
    assert Decoding(load(tmp_path, dtype="float16"), 1, 8).compiled is None
    with kernels.use_backend("reference"):
        assert Decoding(load(tmp_path), 1, 8).compiled is None
    hooked, calls = load(tmp_path), []
    hooked.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    run(hooked, torch.zeros(1, 6, dtype=torch.long), 4, [0], fused=False)
    assert Decoding(hooked, 1, 8).compiled is None
    assert len(calls) == 5
    moe = load(tmp_path / "moe", *FAMILY_VARIANTS["mixtral"])
    assert Decoding(moe, 1, 8).compiled is None
    dynamic = load(tmp_path / "dynamic", options=TINY_VARIANTS["dynamic_rope"])
    assert Decoding(dynamic, 1, 8).compiled is None


def test_what_the_plan_refuses_takes_the_forward_pass(tmp_path):
    assert Decoding(load(tmp_path).double(), 1, 8).compiled is None
    mixed = load(tmp_path, dtype="bfloat16")
    mixed.model.layers[0].input_layernorm.float()
    assert Decoding(mixed, 1, 8).compiled is None
    strided = load(tmp_path)
    strided.lm_head.weight = torch.nn.Parameter(strided.lm_head.weight.t().contiguous().t())
    assert Decoding(strided, 1, 8).compiled is None
    patched = load(tmp_path)
    patched.model.layers[0].mlp.up_proj.forward = lambda x: x @ patched.lm_head.weight[:48].t()
    assert Decoding(patched, 1, 8).compiled is None


@pytest.mark.parametrize("threads", [1, 2])
def test_nan_in_one_row_stays_there(tmp_path, threads):
    family, options = FAMILY_VARIANTS["gemma3_text"]
    model = load(tmp_path, family, options)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decoding = Decoding(model, 2, 20)
        lines, _ = decoding.read([[7, 8], [9, 10]])
        logits = decoding(lines, torch.tensor([[5], [11]]))
    finally:
        torch.set_num_threads(before)
    assert logits[0].isnan().all()
    assert logits[1].isnan().nonzero().tolist() == [[5]]  # the tied head's own row


def test_changed_weights_are_seen_at_once(tmp_path):
    model = load(tmp_path)
    rows = torch.randint(97, (1, 12))
    before = run(model, rows, 8, [0], fused=True)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    after = run(model, rows, 8, [0], fused=True)
    assert (after - before).abs().max() > 1e-2
    assert (after - run(model, rows, 8, [0], fused=False)).abs().max() <= LOGITS


def test_scaled_queries_are_compiled_up_to_the_position_where_they_are_scaled(tmp_path):
    model = load(tmp_path, *FAMILY_VARIANTS["ministral3"])
    assert Decoding(model, 1, 8).compiled is not None
    assert Decoding(model, 1, 9).compiled is None
    rows = torch.arange(8)[None]
    plain = run(model, rows, 5, [0], fused=False)
    assert (run(model, rows, 5, [0], fused=True) - plain).abs().max() <= LOGITS


@pytest.mark.parametrize(
    "name",
    [
        *("phi3", "granite", "olmo2", "olmo3", "qwen2_moe", "gpt_oss", "gemma4_text small"),
        *("gemma4_unified_text", "qwen3_5_text", "qwen3_next"),
    ],
)
def test_families_that_the_step_lacks_go_through_the_modules(tmp_path, name):
    assert Decoding(load(tmp_path, *FAMILY_VARIANTS[name]), 1, 40).compiled is None
