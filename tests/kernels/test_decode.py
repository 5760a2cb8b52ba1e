"""The decoding step against fp64 and against transformers; its promises about bits and memory."""

import pytest
import torch

from lorakit import kernels
from lorakit.kernels import dispatch
from lorakit.kernels.ops import decode
from lorakit.kernels.ops.decode import (
    DecodeCache,
    DecodeLayer,
    DecodePlan,
    decode_step,
    reference,
)
from tests.instruction_sets import ISAS, on_cpu


def backend(name):
    """Runs what is inside on "reference", or on the kernel for an instruction set."""
    return kernels.use_backend("reference") if name == "reference" else on_cpu(name)


BACKENDS = ["reference", *ISAS]
SHAPE = {"H": 64, "Hq": 4, "Hk": 2, "D": 16, "I": 96, "V": 101, "B": 1}
# slot, count and capacity of the layers: the last slot, one in the middle, the first token of all
SLOTS = [(9, 10, 12), (3, 7, 8), (0, 1, 1)]
# two soft caps are small enough to bend most scores; every option is on in one case at least
GEMMA = {"norm_weight_offset": 1.0, "embedding_scale": 8.0, "attn_softcap": 2.0, "final_softcap": 3}
CASES = {
    "llama": {},
    "three rows": {"B": 3},
    "five rows, odd sizes": {"B": 5, "H": 33, "D": 10, "I": 43, "V": 67},  # 4 rows, then 1
    "two rows, tiny": {"B": 2, "H": 3, "Hq": 1, "Hk": 1, "D": 2, "I": 1, "V": 5},
    "seven heads to one": {"Hq": 7, "Hk": 1, "D": 12},
    "biases": {"biases": True, "B": 2},
    "q/k norm": {"qk_norm": True, "D": 12},
    "gemma 2": {"sandwich": True, "activation": "gelu_pytorch_tanh", **GEMMA, "B": 2},
    "gemma 3": {
        "sandwich": True, "qk_norm": True, "activation": "gelu", "ropes": 2, **GEMMA,
        "attention_scale": 0.3,
    },
    "left padding": {"masked": True, "B": 3},
    # 16 pieces of 40, and 3 pieces of which the mask hides whole ones
    "long contexts": {"slots": [(17, 601, 640), (70, 71, 90), (599, 600, 600)], "masked": True},
    "the longest pieces": {"slots": [(5, 5000, 5000), (4600, 4601, 4602), (0, 33, 33)], "D": 8},
}  # fmt: skip


def build(dtype, **case):
    """A plan and the arguments of one step, all random; masked slots of the caches hold NaN."""
    random = torch.Generator().manual_seed(0)
    size = {k: case.pop(k, default) for k, default in SHAPE.items()}
    H, Hq, Hk, D, I, V, B = size.values()  # noqa: E741
    slots, ropes = case.pop("slots", SLOTS), case.pop("ropes", 1)
    masked, biases = case.pop("masked", False), case.pop("biases", False)
    qk_norm, sandwich = case.pop("qk_norm", False), case.pop("sandwich", False)

    def weight(*shape):
        spread = 1.5 * shape[-1] ** -0.5 if len(shape) == 2 else 1.0
        return (torch.randn(shape, generator=random) * spread).to(dtype)

    layers = []
    for i in range(len(slots)):
        extra = {"rope": i % ropes}
        if sandwich:
            extra |= {f"{name}_feedforward_norm": weight(H) for name in ("pre", "post")}
        if qk_norm:
            extra |= {"q_norm": weight(D), "k_norm": weight(D)}
        if biases:
            sizes = {"q": Hq * D, "k": Hk * D, "v": Hk * D, "o": H, "gate": I, "up": I, "down": H}
            extra |= {f"{name}_bias": weight(n) for name, n in sizes.items()}
        qkv = weight(Hq * D, H), weight(Hk * D, H), weight(Hk * D, H)
        mlp = weight(I, H), weight(I, H), weight(H, I)
        layers.append(DecodeLayer(weight(H), *qkv, weight(H, Hq * D), *mlp, weight(H), **extra))
    case = {"activation": "silu", "eps": 1e-5} | case
    plan = DecodePlan(
        weight(V, H), layers, weight(H), weight(V, H),
        num_heads=Hq, num_kv_heads=Hk, head_dim=D, **case,
    )  # fmt: skip
    angles = [torch.rand(B, D // 2, generator=random) * 6 for _ in range(ropes)]
    ids = torch.randint(V, (B,), generator=random)
    cache, visible = [], []
    for slot, count, capacity in slots:
        keys, values = (torch.randn(B, capacity, Hk, D, generator=random) for _ in "kv")
        seen = torch.rand(B, capacity, generator=random) < 0.5
        seen[0], seen[-1, : count // 2] = True, False  # a row that sees all; a stretch unseen
        seen[-1, slot] = False  # the new token sees itself whatever the mask says
        if masked:
            keys[~seen], values[~seen] = torch.nan, torch.nan
        cache.append((keys.to(dtype), values.to(dtype), slot, count))
        visible.append(seen if masked else None)
    tables = [(a.cos(), a.sin()) for a in angles]
    return plan, ids, tables, cache, visible


def step_on(plan, ids, tables, cache, visible=None):
    """decode_step on layers given as (keys, values, slot, count)."""
    held = DecodeCache(plan, [layer[0] for layer in cache], [layer[1] for layer in cache])
    return decode_step(plan, ids, tables, held, [layer[2:] for layer in cache], visible)


def copied(cache, dtype=None):
    return [(k.to(dtype, copy=True), v.to(dtype, copy=True), *rest) for k, v, *rest in cache]


def in_double(plan, ids, tables, cache, visible, cache_dtype):
    """The step in fp64 on a copy of the cache; the new keys and values rounded to cache_dtype."""
    caches = copied(cache, cache_dtype)
    return reference.decode_step(plan, ids, tables, caches, visible, wide=torch.float64), caches


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_fp32_against_fp64(case, name):
    step = build(torch.float32, **CASES[case])
    truth, caches = in_double(*step, torch.float64)
    with backend(name):
        logits = step_on(*step)
    assert logits.dtype == torch.float32
    # sums of at most a few hundred products in fp32, a dozen of them one after the other: errors of
    # some 10 units of 2^-24 relative to the largest value; 1e-5 is 170 units
    assert (logits - truth).abs().max() <= 1e-5 * truth.abs().max()
    for (keys, values, slot, _), (true_keys, true_values, *_) in zip(step[3], caches, strict=True):
        for ours, true in ((keys, true_keys), (values, true_values)):
            assert (ours[:, slot] - true[:, slot]).abs().max() <= 1e-5 * true[:, slot].abs().max()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_bf16_against_fp64(case, name):
    """The rounding of the new keys and values is the only one there is."""
    step = build(torch.bfloat16, **CASES[case])
    truth, _ = in_double(*step, torch.bfloat16)
    unrounded, _ = in_double(*step, torch.float64)
    with backend(name):
        logits = step_on(*step)
    # Where fp32 and fp64 fall on two sides of a tie, a new key or value differs by a unit of bf16.
    # That happens to about one in 2^15, so what all roundings together do to the logits bounds it.
    allowed = (truth - unrounded).abs().max() + 1e-5 * truth.abs().max()
    assert (logits - truth).abs().max() <= allowed


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_the_cache_and_of_repeated_calls(dtype, name):
    plan, ids, tables, cache, visible = build(dtype, B=3, slots=[(40, 95, 128), (3, 7, 8)])
    guarded = []  # every cache lies between two zones that nothing may touch
    for keys, values, slot, count in cache:
        pair = []
        for tensor in (keys, values):
            memory = torch.full((tensor.numel() + 128,), 7.0, dtype=dtype)
            view = memory[64:-64].view(tensor.shape)
            pair.append((memory, view.copy_(tensor)))
        guarded.append((*pair, slot, count))
    inner = [(k[1], v[1], slot, count) for k, v, slot, count in guarded]
    with backend(name):
        logits = step_on(plan, ids, tables, inner, visible)
        first = copied(inner)
        for _ in range(3):
            assert torch.equal(step_on(plan, ids, tables, inner, visible), logits)
    for (k, v, slot, _), before, after in zip(guarded, cache, first, strict=True):
        for (memory, now), was, once in zip((k, v), before[:2], after[:2], strict=True):
            assert (memory[:64] == 7).all()
            assert (memory[-64:] == 7).all()
            assert torch.equal(now, once)
            assert not torch.equal(now[:, slot], was[:, slot])
            now[:, slot] = was[:, slot]
            assert torch.equal(now, was)


@pytest.mark.parametrize("name", BACKENDS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_batch_size_change_a_bit(dtype, name):
    case = {"B": 7, "H": 40, "slots": [(3, 601, 640), (33, 34, 40)], "qk_norm": True}
    plan, ids, tables, cache, visible = build(dtype, **case)
    threads = torch.get_num_threads()
    with backend(name):
        logits = step_on(plan, ids, tables, copied(cache), visible)
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                again = step_on(plan, ids, tables, copied(cache), visible)
                assert torch.equal(again, logits), n
        finally:
            torch.set_num_threads(threads)
        for rows in (slice(0, 1), slice(1, 3), slice(3, 6)):
            some = [(cos[rows], sin[rows]) for cos, sin in tables]
            part = [(k[rows].clone(), v[rows].clone(), *rest) for k, v, *rest in cache]
            assert torch.equal(step_on(plan, ids[rows], some, part, visible), logits[rows])


# ---- transformers -------------------------------------------------------------------------------

TINY = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 43, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention"] * 2
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {"head_dim": 8},  # biases on q, k, v
    "qwen3": {},
    "gemma": {"num_key_value_heads": 1},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 20, "layer_types": ALTERNATING},
    "gemma3_text": {
        "sliding_window": 6, "query_pre_attn_scalar": 20, "layer_types": ALTERNATING,
        "rope_local_base_freq": 10.0,
    },
}  # fmt: skip


def transformers_model(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**TINY, **FAMILIES[family]})
    config._attn_implementation = "eager"  # the only one with soft caps
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_(0.0 if "gemma" in family or "bias" in name else 1.0, 0.2)
    return model


def plan_of(model):
    """The plan of a transformers model, whose attributes say what its family has."""
    config, gemma = model.config, model.config.model_type.startswith("gemma")
    layers = []
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        tensors = {
            "input_norm": block.input_layernorm.weight,
            "post_attention_norm": block.post_attention_layernorm.weight,
        }
        for module, names in ((attention, "qkvo"), (mlp, ("gate", "up", "down"))):
            for name in names:
                linear = getattr(module, f"{name}_proj")
                tensors |= {name: linear.weight, f"{name}_bias": linear.bias}
        for name in ("q_norm", "k_norm"):
            if hasattr(attention, name):
                tensors[name] = getattr(attention, name).weight
        for side in ("pre", "post"):
            if hasattr(block, f"{side}_feedforward_layernorm"):
                norm = getattr(block, f"{side}_feedforward_layernorm")
                tensors[f"{side}_feedforward_norm"] = norm.weight
        layers.append(DecodeLayer(**tensors, rope=0 if windows(model)[len(layers)] is None else 1))
    return DecodePlan(
        model.model.embed_tokens.weight, layers, model.model.norm.weight, model.lm_head.weight,
        num_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim if hasattr(config, "head_dim") else 8,
        eps=config.rms_norm_eps,
        activation=getattr(config, "hidden_activation", None) or config.hidden_act,
        norm_weight_offset=float(gemma),
        embedding_scale=config.hidden_size**0.5 if gemma else 1.0,
        attention_scale=model.model.layers[0].self_attn.scaling,
        attn_softcap=getattr(config, "attn_logit_softcapping", None),
        final_softcap=getattr(config, "final_logit_softcapping", None),
    )  # fmt: skip


def windows(model):
    """Each layer's sliding window, or None."""
    config = model.config
    everywhere = config.sliding_window if config.model_type == "mistral" else None
    attentions = [block.self_attn for block in model.model.layers]
    return [getattr(attention, "sliding_window", everywhere) for attention in attentions]


def tables_of(model, position):
    """(cos, sin) of the layers without a window, and of those with one, by transformers' own."""
    x, position = torch.zeros(1, 1, 1), torch.tensor([[position]])
    rotary, pairs = model.model.rotary_emb, []
    for kind in ("full_attention", "sliding_attention"):
        if hasattr(rotary, f"{kind}_inv_freq"):
            cos, sin = rotary(x, position, layer_type=kind)
        else:
            cos, sin = rotary(x, position)
        half = cos.shape[-1] // 2
        pairs.append((cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()))
    return pairs


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_equals_transformers(family, name):
    """Layers with a sliding window have a ring buffer of just its size as their cache."""
    pytest.importorskip("transformers")
    model = transformers_model(family)
    config, T = model.config, 20
    ids = torch.randint(1, 97, (1, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth = model(ids).logits[0]
    plan = plan_of(model)
    sizes = [window or T for window in windows(model)]
    shapes = [(1, size, config.num_key_value_heads, plan.head_dim) for size in sizes]
    memory = [(torch.full(s, torch.nan), torch.full(s, torch.nan)) for s in shapes]
    with backend(name):
        for t in range(T):
            cache = [
                (*pair, t % size, min(t + 1, size))
                for pair, size in zip(memory, sizes, strict=True)
            ]
            logits = step_on(plan, ids[:, t], tables_of(model, t), cache)
            # fp32 against fp32, both some units of 2^-24 off, over the steps that share a cache
            assert (logits - truth[t]).abs().max() <= 2e-5 * truth.abs().max(), t


# ---- what does not fit --------------------------------------------------------------------------


def small_plan(layer=None, **changes):
    plan, *_ = build(torch.float32)
    layers = list(plan.layers)
    if layer is not None:
        layers[1] = layers[1]._replace(**layer)
    arguments = {
        "embedding": plan.embedding, "layers": layers, "norm": plan.norm, "head": plan.head,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "eps": 1e-5, "activation": "silu",
    }  # fmt: skip
    return DecodePlan(**{**arguments, **changes})


def test_a_plan_names_the_tensor_that_does_not_fit():
    for name in DecodeLayer._fields[:-1]:
        with pytest.raises(ValueError, match=rf"layers\[1\]\.{name} is \[5, 3\]"):
            small_plan({name: torch.zeros(5, 3)})
    shape = small_plan().layers[1].gate.shape
    with pytest.raises(ValueError, match=r"layers\[1\]\.gate is torch.bfloat16"):
        small_plan({"gate": torch.zeros(shape, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match=r"layers\[1\]\.gate must be contiguous"):
        small_plan({"gate": torch.zeros(shape[::-1]).t()})
    with pytest.raises(ValueError, match=r"layers\[1\]\.gate must be .* in host memory"):
        small_plan({"gate": torch.zeros(shape, device="meta")})
    with pytest.raises(ValueError, match=r"layers\[1\]\.o is missing"):
        small_plan({"o": None})
    with pytest.raises(ValueError, match=r"layers\[1\] needs both of q_norm and k_norm"):
        small_plan({"q_norm": torch.zeros(16)})
    with pytest.raises(ValueError, match=r"layers\[1\] needs both of pre_feedforward_norm"):
        small_plan({"post_feedforward_norm": torch.zeros(64)})
    for name, value in {
        "embedding": torch.zeros(7), "head": torch.zeros(5, 64), "norm": torch.zeros(3),
        "activation": "relu", "head_dim": 15, "num_kv_heads": 3,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=name.removeprefix("num_").replace("_", ".")):
            small_plan(**{name: value})
    with pytest.raises(ValueError, match="embedding is torch.float16"):
        small_plan(embedding=torch.zeros(101, 64, dtype=torch.float16))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama", "gemma 2", "gemma 3", "left padding", "q/k norm"])
def test_a_prompt_is_the_same_as_its_tokens_one_by_one(case, dtype, name):
    """A prompt of 23 tokens a row comes in two pieces, after 40 slots that are filled already."""
    shape = {**CASES[case], "B": 2, "slots": [(40, 63, 80)] * 3}
    plan, _, tables, cache, visible = build(dtype, **shape)
    ids = torch.randint(plan.vocab_size, (2, 23))
    angles = torch.rand(2, 23, plan.head_dim // 2) * 6
    tables = [(angles.cos(), angles.sin())] * len(tables)
    for layer in cache:  # only what lies before the prompt
        layer[0][:, 40:], layer[1][:, 40:] = torch.nan, torch.nan
    truth_cache = copied(cache, torch.float64 if dtype == torch.float32 else dtype)
    for t in range(23):
        at = [(cos[:, t], sin[:, t]) for cos, sin in tables]
        layers = [(k, v, 40 + t, 41 + t) for k, v, *_ in truth_cache]
        truth = reference.decode_step(plan, ids[:, t], at, layers, visible, wide=torch.float64)
    held = DecodeCache(plan, [layer[0] for layer in cache], [layer[1] for layer in cache])
    with backend(name):
        for start, end in ((0, 14), (14, 23)):
            part = [
                (cos[:, start:end].contiguous(), sin[:, start:end].contiguous())
                for cos, sin in tables
            ]
            slots = [(40 + start, 40 + end)] * 3
            piece = ids[:, start:end].contiguous()
            logits = decode_step(plan, piece, part, held, slots, visible)
    # fp32: as for one token. bf16: keys and values that fp32 and fp64 round to two sides of a tie
    # differ by 2^-8 of themselves, and later ones are computed from them
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert (logits - truth).abs().max() <= bound * truth.abs().max()
    for layer in cache:
        assert layer[0][:, :63].isfinite().all() or visible is not None
        assert layer[0][:, 63:].isnan().all()


@pytest.mark.parametrize("name", ["reference", BACKENDS[-1]])
def test_a_step_names_the_argument_that_does_not_fit(name):
    plan, ids, tables, cache, visible = build(torch.float32, masked=True)
    before = copied(cache)
    (keys, values, slot, count), seen = cache[1], visible[1]

    def second(keys=keys, values=values, slot=slot, count=count):
        return {"cache": [cache[0], (keys, values, slot, count), cache[2]]}

    swapped = torch.zeros(1, 2, 8, 16).transpose(1, 2)  # the right shape, the wrong strides
    wrong = [
        ("ids is torch.int32", {"ids": ids.int()}),
        ("ids is", {"ids": ids[None, None]}),
        (r"tables\[0\] cos", {"ids": ids[:, None]}),
        ("ids is", {"ids": ids[:0]}),
        ("outside", {"ids": ids + 101}),
        ("outside", {"ids": -1 - ids}),
        ("tables are 0", {"tables": []}),
        (r"tables\[0\] sin is torch.float64", {"tables": [(tables[0][0], tables[0][1].double())]}),
        (r"tables\[0\] cos", {"tables": [(tables[0][0][:, 1:], tables[0][1])]}),
        (r"tables\[0\] cos must", {"tables": [(torch.zeros(8, 2).t()[:1], tables[0][1])]}),
        ("each of 3 layers", {"cache": cache[:2]}),
        ("each of 3 layers", {"visible": visible[:2]}),
        (r"cache\[1\] keys are \[1, 7", second(keys=keys[:, :7])),
        (r"cache\[1\] keys are .* values \[1, 7", second(values=values[:, :7])),
        (r"cache\[1\] keys are \[8, 2, 16\]", second(keys=keys[0], values=values[0])),
        (r"cache\[1\] values are torch.float64", second(values=values.double())),
        (r"cache\[1\] keys must be contiguous", second(keys=swapped)),
        (r"slots\[1\] are slot -1", second(slot=-1)),
        (r"slots\[1\] are slot 7, count 7", second(slot=7)),
        (r"slots\[1\] are slot 3, count 9, of a capacity of 8", second(count=9)),
        (r"visible\[1\] is torch.uint8", {"visible": [visible[0], seen.byte(), seen]}),
        (r"visible\[1\] is torch.bool \[8\]", {"visible": [visible[0], seen[0], seen]}),
        (r"visible\[1\] must", {"visible": [visible[0], seen[:, :6].clone(), seen]}),
    ]  # fmt: skip
    for message, change in wrong:
        arguments = {"ids": ids, "tables": tables, "cache": cache, "visible": visible, **change}
        with backend(name), pytest.raises(ValueError, match=message):
            step_on(plan, **arguments)
    held = DecodeCache(plan, [layer[0] for layer in cache], [layer[1] for layer in cache])
    with pytest.raises(ValueError, match="each of 3 layers"):
        decode_step(plan, ids, tables, held, [(0, 1)] * 2)
    with pytest.raises(ValueError, match="ids hold 2 rows, the cache 1"):
        decode_step(
            plan,
            ids.repeat(2),
            [(t.repeat(2, 1), t.repeat(2, 1)) for t, _ in tables],
            held,
            [(0, 1)] * 3,
        )
    for now, was in zip(cache, before, strict=True):
        assert torch.equal(now[0].nan_to_num(9), was[0].nan_to_num(9))


def test_the_best_backend_is_chosen(monkeypatch):
    plan, *rest = build(torch.float32)
    called = []
    truth = reference.decode_step
    monkeypatch.setattr(reference, "decode_step", lambda *a: called.append(1) or truth(*a))
    step_on(plan, *rest)
    assert bool(called) == (dispatch.library() is None)
    with kernels.use_backend("reference"):
        step_on(plan, *rest)
    assert called
    assert decode.decode_step is decode_step
