"""The decoding step against fp64 and against transformers; its promises about bits and memory."""

from array import array

import pytest
import torch

from lorakit import kernels
from lorakit.kernels import dispatch
from lorakit.kernels.ops import decode
from lorakit.kernels.ops.decode import (
    DecodeCache,
    DecodeLayer,
    DecodePlace,
    DecodePlan,
    DecodeUpdate,
    decode_step,
    reference,
)
from tests.instruction_sets import ISAS, on_cpu


def backend(name):
    """Runs what is inside on "reference", or on the kernel for an instruction set."""
    return kernels.use_backend("reference") if name == "reference" else on_cpu(name)


QUANTIZE = {
    "nf4": kernels.quantize_nf4,
    "nf4, 32": lambda w: kernels.quantize_nf4(w, block_size=32),
    "nf4, 128": lambda w: kernels.quantize_nf4(w, block_size=128),
    "fp4": lambda w: kernels.quantize_fp4(w, double_quant=False),
    "int8": kernels.quantize_int8,
}
BACKENDS = ["reference", *ISAS]
SHAPE = {"H": 64, "Hq": 4, "Hk": 2, "D": 16, "I": 96, "V": 101, "B": 1}
# The position of the first row, one less for each further row, and the windows of the layers: all
# before it; some of these.
POSITION, WINDOWS = 9, [None, 7, None]
# two soft caps are small enough to bend most scores; every option is on in one case at least
GEMMA = {"norm_weight_offset": 1.0, "embedding_scale": 8.0, "attn_softcap": 2.0, "final_softcap": 3}
CASES = {
    "llama": {},
    "three rows": {"B": 3},
    "five rows, odd sizes": {"B": 5, "H": 33, "D": 10, "I": 43, "V": 67},  # 4 rows, then 1
    "two rows, tiny": {"B": 2, "H": 3, "Hq": 1, "Hk": 1, "D": 2, "I": 1, "V": 5},
    "adapters": {"B": 4, "ranks": (3, 16, 9), "I": 43, "biases": True},
    "nf4": {"packed": "nf4", "B": 3, "I": 128, "ranks": (4,)},
    "fp4 beside dense": {"packed": "fp4", "I": 70, "windows": [None]},  # down has odd blocks
    "nf4, blocks of 32": {"packed": "nf4, 32", "ends": True, "B": 5, "H": 96, "I": 160},
    "nf4, blocks of 128": {"packed": "nf4, 128", "ends": True, "H": 128, "D": 32, "I": 384},
    "int8 throughout": {"packed": "int8", "ends": True, "B": 6, "I": 75},
    "int8": {"packed": "int8", "B": 5, "H": 33, "D": 10, "I": 43, "biases": True},
    "seven heads to one": {"Hq": 7, "Hk": 1, "D": 12},
    "biases": {"biases": True, "B": 2},
    "q/k norm": {"qk_norm": True, "D": 12},
    "gemma 2": {"sandwich": True, "activation": "gelu_pytorch_tanh", **GEMMA, "B": 2},
    "gemma 3": {
        "sandwich": True, "qk_norm": True, "activation": "gelu", "ropes": 2, **GEMMA,
        "attention_scale": 0.3,
    },
    "itself alone": {"windows": [1, 7], "B": 2},
    "pages of one position": {"windows": [7, None], "page": 1, "B": 2},
    # 16 pieces of 40 beside rows of fewer, and 3 pieces
    "long contexts": {"position": 600, "B": 3, "windows": [None, 71], "page": 32},
    "a long window": {"position": 600, "windows": [600], "page": 256},
    "long beside short": {"position": [600, 3, 70], "B": 3, "windows": [None, 71], "page": 64},
    "the longest pieces": {"position": 4999, "windows": [None, 4601], "D": 8, "page": 64},
}  # fmt: skip


def build(dtype, **case):
    """A plan and the arguments of one step, all random.

    A row's pages lie anywhere. Slots that nobody sees hold NaN, and what a window has left behind
    has no page.
    """
    random = torch.Generator().manual_seed(0)
    size = {k: case.pop(k, default) for k, default in SHAPE.items()}
    H, Hq, Hk, D, I, V, B = size.values()  # noqa: E741
    windows, ropes = case.pop("windows", WINDOWS), case.pop("ropes", 1)
    page, tokens = case.pop("page", 4), case.pop("tokens", 1)
    ranks, packed = case.pop("ranks", ()), case.pop("packed", None)
    position, biases = case.pop("position", POSITION), case.pop("biases", False)
    qk_norm, sandwich = case.pop("qk_norm", False), case.pop("sandwich", False)

    def weight(*shape):
        spread = 1.5 * shape[-1] ** -0.5 if len(shape) == 2 else 1.0
        return (torch.randn(shape, generator=random) * spread).to(dtype)

    def matrix(*shape):
        w = weight(*shape)
        if packed is None or (packed in ("nf4", "fp4") and shape[-1] % 64):
            return w
        return QUANTIZE[packed](w)

    end = matrix if case.pop("ends", False) else weight
    layers = []
    for i in range(len(windows)):
        extra = {"rope": i % ropes}
        if sandwich:
            extra |= {f"{name}_feedforward_norm": weight(H) for name in ("pre", "post")}
        if qk_norm:
            extra |= {"q_norm": weight(D), "k_norm": weight(D)}
        if biases:
            sizes = {"q": Hq * D, "k": Hk * D, "v": Hk * D, "o": H, "gate": I, "up": I, "down": H}
            extra |= {f"{name}_bias": weight(n) for name, n in sizes.items()}
        qkv = matrix(Hq * D, H), matrix(Hk * D, H), matrix(Hk * D, H)
        mlp = matrix(I, H), matrix(I, H), matrix(H, I)
        layers.append(DecodeLayer(weight(H), *qkv, matrix(H, Hq * D), *mlp, weight(H), **extra))

    def update(of, r):
        A, B = (torch.randn(n, generator=random) for n in ((r, of.shape[1]), (of.shape[0], r)))
        return DecodeUpdate(A * of.shape[1] ** -0.5, B * r**-0.5, 0.7)

    # the first adapter has updates everywhere, the next ones leave one layer out, and so on
    names = ("q", "k", "v", "o", "gate", "up", "down")
    case["adapters"] = [
        [{n: update(getattr(layer, n), r) for n in names[number:]} for layer in layers]
        for number, r in enumerate(ranks)
    ]
    case = {"activation": "silu", "eps": 1e-5} | case
    plan = DecodePlan(
        end(V, H), layers, weight(H), end(V, H),
        num_heads=Hq, num_kv_heads=Hk, head_dim=D, **case,
    )  # fmt: skip
    angles = [torch.rand(B, D // 2, generator=random) * 6 for _ in range(ropes)]
    ids = torch.randint(V, (B,), generator=random)
    if isinstance(position, int):
        position = [position - b for b in range(B)]
    kinds, tables = list(dict.fromkeys(windows)), [[] for _ in position]
    ends = [at + tokens for at in position]
    free = torch.randperm(sum(-(-end // page) for end in ends) + 2, generator=random).tolist()
    count, hidden = len(free), torch.ones(len(kinds), len(free), page, dtype=torch.bool)
    for table, at, end in zip(tables, position, ends, strict=True):
        pages = [free.pop() for _ in range(-(-end // page))]
        for kind, window in enumerate(kinds):
            first = 0 if window is None else max(0, at + 1 - window)
            for p in range(first, at):
                hidden[kind, pages[p // page], p % page] = False
            behind = first // page
            table.append(array("q", [-1] * behind + pages[behind:]))
    cache, places = [], list(map(DecodePlace, position, map(tuple, tables)))
    for window in windows:
        keys, values = (torch.randn(count, page, Hk, D, generator=random) for _ in "kv")
        unseen = hidden[kinds.index(window)]
        keys[unseen], values[unseen] = torch.nan, torch.nan
        cache.append((keys.to(dtype), values.to(dtype), window))
    tables = [(a.cos(), a.sin()) for a in angles]
    numbers = [*range(len(ranks)), *[None] * B][:B] if ranks else None
    return plan, ids, tables, cache, places, numbers


def held(plan, cache):
    return DecodeCache(plan, *zip(*cache, strict=True))


def step_on(plan, ids, tables, cache, places, adapters=None):
    """decode_step on layers given as (keys, values, window)."""
    return decode_step(plan, ids, tables, held(plan, cache), places, adapters)


def kinds_of(cache):
    """Which of a row's tables each layer uses."""
    windows = [window for _, _, window in cache]
    return [list(dict.fromkeys(windows)).index(window) for window in windows]


def copied(cache, dtype=None):
    return [(k.to(dtype, copy=True), v.to(dtype, copy=True), window) for k, v, window in cache]


def in_double(plan, ids, tables, cache, places, adapters, cache_dtype):
    """The step in fp64 on a copy of the cache; the new keys and values rounded to cache_dtype."""
    wide = held(plan, cache)
    wide.keys, wide.values = (
        tuple(t.to(cache_dtype, copy=True) for t in tensors) for tensors in (wide.keys, wide.values)
    )
    logits = reference.decode_step(plan, ids, tables, wide, places, adapters, torch.float64)
    return logits, list(zip(wide.keys, wide.values, strict=True))


def new_ones(tensor, places, kind):
    """The keys or values of the new tokens, [B, Hk, D]."""
    size = tensor.shape[1]
    return torch.stack(
        [
            tensor[place.pages[kind][at // size], at % size]
            for place in places
            for at in [place.position]
        ]
    )


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
    for layer, true_layer, kind in zip(step[3], caches, kinds_of(step[3]), strict=True):
        for ours, true in zip(layer[:2], true_layer, strict=True):
            ours, true = new_ones(ours, step[4], kind), new_ones(true, step[4], kind)
            assert (ours - true).abs().max() <= 1e-5 * true.abs().max()


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
    layout = {"position": 40, "windows": [None, 7], "page": 8}
    plan, ids, tables, cache, places, _ = build(dtype, B=3, **layout)
    guarded = []  # every cache lies between two zones that nothing may touch
    for keys, values, window in cache:
        pair = []
        for tensor in (keys, values):
            memory = torch.full((tensor.numel() + 128,), 7.0, dtype=dtype)
            view = memory[64:-64].view(tensor.shape)
            pair.append((memory, view.copy_(tensor)))
        guarded.append((*pair, window))
    inner = [(k[1], v[1], window) for k, v, window in guarded]
    with backend(name):
        logits = step_on(plan, ids, tables, inner, places)
        first = copied(inner)
        for _ in range(3):
            assert torch.equal(step_on(plan, ids, tables, inner, places), logits)
    kinds = kinds_of(cache)
    for (k, v, _), before, after, kind in zip(guarded, cache, first, kinds, strict=True):
        for (memory, now), was, once in zip((k, v), before[:2], after[:2], strict=True):
            assert (memory[:64] == 7).all()
            assert (memory[-64:] == 7).all()
            assert torch.equal(now.nan_to_num(9), once.nan_to_num(9))
            assert new_ones(now, places, kind).isfinite().all()
            for place in places:
                slot = place.pages[kind][place.position // 8], place.position % 8
                now[slot] = was[slot]
            assert torch.equal(now.nan_to_num(9), was.nan_to_num(9))


@pytest.mark.parametrize("name", BACKENDS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [None, "nf4, 32", "nf4, 128", "int8"])
def test_neither_threads_nor_other_rows_change_a_bit(packed, dtype, name):
    case = {"B": 15, "H": 40, "windows": [None, 34], "page": 16, "qk_norm": True}
    if packed is not None:
        case |= {"packed": packed, "ends": True, "H": 128, "D": 32, "I": 384, "V": 101}
    case["position"] = [600, 2, 599, 31, 32, 300, 0, *range(8)]
    case["ranks"] = (3, 16)
    plan, ids, tables, cache, places, _ = build(dtype, **case)
    adapters = [0, None, 1, 1, 0, None, 1, *[None] * 8]
    threads = torch.get_num_threads()
    with backend(name):
        logits = step_on(plan, ids, tables, copied(cache), places, adapters)
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                again = step_on(plan, ids, tables, copied(cache), places, adapters)
                assert torch.equal(again, logits), n
        finally:
            torch.set_num_threads(threads)
        for rows in (slice(0, 1), slice(1, 3), slice(3, 6), slice(6, 15)):
            some = [(cos[rows], sin[rows]) for cos, sin in tables]
            found = step_on(plan, ids[rows], some, copied(cache), places[rows], adapters[rows])
            assert torch.equal(found, logits[rows])


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
    """What a window leaves behind loses its page, which the row's next positions get."""
    pytest.importorskip("transformers")
    model = transformers_model(family)
    config, T = model.config, 20
    ids = torch.randint(1, 97, (1, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth = model(ids).logits[0]
    plan = plan_of(model)
    reach, size = windows(model), 4
    kinds = list(dict.fromkeys(reach))
    counts = [-(-(T if window is None else window + size) // size) + 1 for window in kinds]
    shapes = [(counts[kinds.index(window)], size, config.num_key_value_heads, plan.head_dim)
              for window in reach]  # fmt: skip
    cache = [
        (torch.full(shape, torch.nan), torch.full(shape, torch.nan), window)
        for shape, window in zip(shapes, reach, strict=True)
    ]
    pages, free = [array("q") for _ in kinds], [list(range(count)) for count in counts]
    with backend(name):
        for t in range(T):
            for table, window, left in zip(pages, kinds, free, strict=True):
                if t % size == 0:
                    table.append(left.pop(0))
                behind = (t + 1 - (window or T)) // size - 1
                if behind >= 0 and table[behind] >= 0:
                    left.append(table[behind])
                    table[behind] = -1
            place = DecodePlace(t, tuple(pages))
            logits = step_on(plan, ids[:, t], tables_of(model, t), cache, [place])
            # fp32 against fp32, both some units of 2^-24 off, over the steps that share a cache
            assert (logits - truth[t]).abs().max() <= 2e-5 * truth[t].abs().max(), t


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_may_share_pages(name):
    """A row whose first pages are another's gets the bits that copies of them give it."""
    step = build(torch.float32, B=2, position=[21, 18], windows=[None, None])
    plan, ids, tables, cache, places, _ = step
    first, second = (place.pages[0] for place in places)
    for keys, values, _ in cache:
        for tensor in (keys, values):
            tensor[list(second[:4])] = tensor[list(first[:4])]
    with backend(name):
        apart = step_on(plan, ids, tables, copied(cache), places)
        places[1] = DecodePlace(18, (first[:4] + second[4:],))
        assert torch.equal(step_on(plan, ids, tables, cache, places), apart)


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
    with pytest.raises(ValueError, match=r"layers\[1\]\.gate has rows that are no multiple"):
        small_plan({"gate": kernels.quantize_nf4(torch.zeros(shape), block_size=256)})
    with pytest.raises(ValueError, match=r"layers\[1\]\.gate is \[64, 64\]"):
        small_plan({"gate": kernels.quantize_int8(torch.zeros(64, 64))})
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
@pytest.mark.parametrize("case", ["llama", "adapters", "gemma 2", "gemma 3", "q/k norm"])
def test_a_prompt_is_the_same_as_its_tokens_one_by_one(case, dtype, name):
    """A prompt of 23 tokens a row comes in two pieces, after tokens that are there already."""
    shape = {**CASES[case], "B": 2, "position": [40, 5], "windows": [None, 20], "tokens": 23}
    plan, _, tables, cache, places, adapters = build(dtype, **shape)
    ids = torch.randint(plan.vocab_size, (2, 23))
    angles = torch.rand(2, 23, plan.head_dim // 2) * 6
    tables = [(angles.cos(), angles.sin())] * len(tables)
    truth_cache, wide = held(plan, copied(cache)), torch.float64
    if dtype == torch.float32:
        truth_cache.keys = tuple(keys.double() for keys in truth_cache.keys)
        truth_cache.values = tuple(values.double() for values in truth_cache.values)
    for t in range(23):
        at = [(cos[:, t], sin[:, t]) for cos, sin in tables]
        now = [DecodePlace(position + t, pages) for position, pages in places]
        truth = reference.decode_step(plan, ids[:, t], at, truth_cache, now, adapters, wide)
    with backend(name):
        for start, end in ((0, 14), (14, 23)):
            part = [
                (cos[:, start:end].contiguous(), sin[:, start:end].contiguous())
                for cos, sin in tables
            ]
            now = [DecodePlace(position + start, pages) for position, pages in places]
            piece = ids[:, start:end].contiguous()
            logits = step_on(plan, piece, part, cache, now, adapters)
    # fp32: as for one token. bf16: keys and values that fp32 and fp64 round to two sides of a tie
    # differ by 2^-8 of themselves, and later ones are computed from them
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert (logits - truth).abs().max() <= bound * truth.abs().max()
    unseen = torch.ones(cache[0][0].shape[:2], dtype=torch.bool)
    for position, pages in places:
        for p in range(position + 23):
            unseen[pages[0][p // 4], p % 4] = False
    assert cache[0][0][~unseen].isfinite().all()
    assert cache[0][0][unseen].isnan().all()


@pytest.mark.parametrize("name", ["reference", BACKENDS[-1]])
def test_a_step_names_the_argument_that_does_not_fit(name):
    plan, ids, tables, cache, places, _ = build(torch.float32, B=1, ranks=(2,))
    before = copied(cache)
    keys, values, window = cache[1]

    def second(keys=keys, values=values, window=window):
        return {"cache": [cache[0], (keys, values, window), cache[2]]}

    def place(position=9, table=places[0].pages[0], other=places[0].pages[1]):
        return {"places": [DecodePlace(position, (table, other))]}

    count, pages = len(keys), places[0].pages[0]
    swapped = torch.zeros(count, 2, 4, 16).transpose(1, 2)  # the right shape, the wrong strides
    two = {"ids": ids.repeat(2), "tables": [(t.repeat(2, 1), t.repeat(2, 1)) for t, _ in tables]}
    long = {"ids": ids.repeat(1, 3), "tables": [(torch.zeros(1, 3, 8),) * 2]}
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
        (rf"cache\[1\] keys are \[{count}, 3", second(keys=keys[:, :3])),
        (r"cache\[1\] values are", second(values=values[1:])),
        (r"cache\[1\] keys are \[4, 2, 16\]", second(keys=keys[0])),
        (r"cache\[1\] values are torch.float64", second(values=values.double())),
        (r"cache\[1\] keys must be contiguous", second(keys=swapped)),
        (r"cache\[1\] has a window of 0", second(window=0)),
        ("at most 2 may differ", {"cache": [cache[0], cache[1], (keys, values, 3)]}),
        ("which must be 2\\^n", {"cache": [(k[:, :3], v[:, :3], w) for k, v, w in cache]}),
        ("places are 0, expected 1", {"places": []}),
        ("places are 1, expected 2", {"places": places, **two}),
        ("two rows write to one page", {"places": places * 2, **two}),
        ("at position 9 with 1 tables", {"places": [DecodePlace(9, (pages,))]}),
        ("a place is at position -1", place(-1)),
        ("up to 13 need pages 0 to 3 of 4", place(12)),
        ("need pages 0 to 2 of 4", place(table=pages[:2])),
        ("need pages 0 to 2 of 4", place(table=array("q", [-1, *pages[1:]]))),
        ("need pages 0 to 2 of 4", place(table=array("q", [*pages[:2], count]))),
        ("need pages 0 to 2 of 4", place(other=pages[:2])),
        ("up to 14 need pages 0 to 3", {**long, **place(11)}),
        ("expected 1 numbers below 1", {"adapters": [1]}),
        ("expected 1 numbers below 1", {"adapters": [None, 0]}),
    ]  # fmt: skip
    for message, change in wrong:
        arguments = {"ids": ids, "tables": tables, "cache": cache, "places": places, **change}
        with backend(name), pytest.raises(ValueError, match=message):
            step_on(plan, **arguments)
    other = build(torch.float32, windows=[None])
    with pytest.raises(ValueError, match="the cache has 1 layers, the plan 3"):
        decode_step(plan, ids, tables, held(other[0], other[3]), places)
    for now, was in zip(cache, before, strict=True):
        assert torch.equal(now[0].nan_to_num(9), was[0].nan_to_num(9))


def test_a_plan_names_the_update_that_does_not_fit():
    plan, *_ = build(torch.float32, ranks=(2,))

    def refused(message, **parts):
        layers = list(plan.adapters[0])
        layers[1] = {**layers[1], "up": layers[1]["up"]._replace(**parts)}
        with pytest.raises(ValueError, match=message):
            small_plan(adapters=[layers])

    refused(r"adapters\[0\]\[1\].up is torch.float32 \[2, 5\]", A=torch.zeros(2, 5))
    refused(r"adapters\[0\]\[1\].up is torch.float32 \[96, 3\]", B=torch.zeros(96, 3))
    refused("torch.bfloat16", B=torch.zeros(96, 2).bfloat16())
    refused("expected float32", A=torch.zeros(0, 64), B=torch.zeros(96, 0))
    refused("must be contiguous", B=torch.zeros(2, 96).t())
    with pytest.raises(ValueError, match=r"adapters\[0\] has not 3 layers"):
        small_plan(adapters=[[{}]])
    with pytest.raises(ValueError, match=r"adapters\[0\]\[0\].norm is none of q, k"):
        small_plan(adapters=[[{"norm": plan.adapters[0][0]["q"]}, {}, {}]])


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
