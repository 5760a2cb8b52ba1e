"""Logits, gradients and text against transformers, in fp32."""

import pytest
import torch

import lorakit as lk
from lorakit.inference.generate import continue_text
from lorakit.inference.sampling import Sampling
from lorakit.models.families import FAMILIES, WRAPPERS
from lorakit.models.per_layer import host_tables
from tests.conftest import FAMILY_VARIANTS, LOGITS, TINY_VARIANTS, published
from tests.models.variants import WITHIN, make
from tests.models.wrappers import WRAPPED


def ours_and_theirs(tmp_path, family, options):
    theirs = make(family, options)
    theirs.save_pretrained(tmp_path)
    return lk.load_model(tmp_path, dtype="float32"), theirs


def read_by_transformers(path, family):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if family in WITHIN else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def greedy(model, prompts, count):
    with torch.no_grad():
        steps = list(continue_text(model, prompts, count, Sampling(), None))
    return [list(row) for row in zip(*steps, strict=True)]


VARIANTS = [("llama", options) for options in TINY_VARIANTS.values()]
VARIANTS += [*FAMILY_VARIANTS.values(), *WITHIN.values()]
variants = pytest.mark.parametrize(
    ("family", "options"), VARIANTS, ids=[*TINY_VARIANTS, *FAMILY_VARIANTS, *WITHIN]
)


def compare(ours, theirs, family, differences, label):
    """Logits within LOGITS, the gradient of every parameter within 1e-4 of its largest entry."""
    ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    logits, expected = ours(ids), theirs(ids).logits
    # the same formulas in fp32, in another order of sums (torch's attention beside a spelled-out
    # one); logits reach 7
    difference = (logits - expected).abs().max().item()
    differences(family, f"{label}: logits", difference)
    assert difference <= LOGITS
    assert expected.abs().max() > 1  # the comparison means something

    labels = ids.masked_fill(torch.rand(2, 40) < 0.5, -100)
    loss, count = ours.loss(ids, labels)
    (loss / count).backward()
    theirs(ids, labels=labels).loss.backward()
    truths = {
        name.replace("model.language_model.", "model."): parameter.grad
        for name, parameter in theirs.named_parameters()
        if not name.startswith("model.visual.")
    }
    truths = published(truths, family)
    largest = 0.0
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            continue
        truth = truths[name]
        grad = torch.zeros_like(truth) if parameter.grad is None else parameter.grad
        unvisited = parameter.grad is None and ".experts." in name
        assert truth.abs().max() > 0 or unvisited, name
        if not unvisited:
            relative = ((grad - truth).abs().max() / truth.abs().max()).item()
            assert relative <= 1e-4, name
            largest = max(largest, relative)
    differences(family, f"{label}: gradients, relative", largest)
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    return trained, set(truths) - set(host_tables(ours))


def test_every_family_is_compared():
    assert {WRAPPERS.get(family, family) for family, _ in VARIANTS} == set(FAMILIES)
    assert {wrapper for wrapper, *_ in WRAPPED.values()} == set(WRAPPERS)


@variants
def test_tiny_logits_and_every_gradient(tmp_path, family, options, differences):
    ours, theirs = ours_and_theirs(tmp_path, family, options)
    names, expected = compare(ours, theirs, family, differences, "fp32")
    assert names == expected
    # transformers does not train these either: they are its buffers
    frozen = {name for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in theirs.named_buffers() if name.endswith("layer_scalar")}


@variants
def test_nf4_equals_the_dequantized_model(tmp_path, family, options, differences):
    """A quantized model computes what transformers computes with the dequantized weights."""
    original = make(family, options)
    original.save_pretrained(tmp_path)
    packed = lk.load_model(tmp_path, dtype="float32", quantize="nf4")
    lk.save_model(packed, tmp_path / "dense")
    theirs = read_by_transformers(tmp_path / "dense", family)
    compare(packed, theirs, family, differences, "NF4")
    dense = lk.load_model(tmp_path / "dense", dtype="float32")
    ids = torch.arange(40)[None]
    # not the same bits: products with packed weights may run in another order
    assert (packed(ids) - dense(ids)).abs().max() <= LOGITS
    assert (packed(ids) - original(ids).logits).abs().max() > 1e-3


@variants
def test_greedy_tokens_equal_transformers(tmp_path, family, options):
    """64 greedy tokens: with the cache, without it, beside a longer row, and by transformers."""
    ours, theirs = ours_and_theirs(tmp_path, family, options)
    prompts = [
        torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 17)
    ]
    # these two turn a key by angles that depend on the length of the sequence when it comes in:
    # cached keys keep theirs, so that the two ways differ from one another
    by_length = ours.config.rope.rope_type in ("dynamic", "longrope")

    def expected(ids, use_cache):
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = theirs.generate(ids, max_new_tokens=64, use_cache=use_cache, **options)
        return out[0, ids.shape[1] :].tolist()

    alone = []
    with torch.no_grad():
        for prompt in prompts:
            ids = prompt[None]
            alone.append(expected(ids, use_cache=True))
            for _ in range(64):
                ids = torch.cat([ids, ours(ids)[:, -1:].argmax(-1)], 1)
            uncached = expected(prompt[None], use_cache=False) if by_length else alone[-1]
            assert ids[0, len(prompt) :].tolist() == uncached
    for prompt, tokens in zip(prompts, alone, strict=True):
        assert greedy(ours, [prompt.tolist()], 64) == [tokens]
    assert greedy(ours, [p.tolist() for p in prompts], 64) == alone


@variants
def test_saved_model_loads_in_transformers(tmp_path, family, options):
    ours, theirs = ours_and_theirs(tmp_path, family, options)
    lk.save_model(ours, tmp_path / "again")
    back = read_by_transformers(tmp_path / "again", family)
    ids = torch.arange(40)[None]
    assert type(back) is type(theirs)
    assert torch.equal(back(ids).logits, theirs(ids).logits)
    again = lk.load_model(tmp_path / "again", dtype="float32")
    assert again.config == ours.config
    assert torch.equal(again(ids), ours(ids))


@pytest.mark.parametrize("variant", ["gqa", "llama3_rope"])
def test_gradient_checkpointing_changes_nothing(tmp_path, variant):
    ours, _ = ours_and_theirs(tmp_path, "llama", TINY_VARIANTS[variant])
    ids = torch.randint(97, (2, 20))
    grads = []
    for checkpointing in (False, True):
        ours.gradient_checkpointing = checkpointing
        ours.zero_grad()
        loss, _ = ours.loss(ids, ids)
        loss.backward()
        grads.append([p.grad for p in ours.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def real(smollm2):
    """SmolLM2, read from GGUF by transformers' own reader and by ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": smollm2.name}
    theirs = AutoModelForCausalLM.from_pretrained(smollm2.parent, dtype=torch.float32, **where)
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, **where)
    ours = lk.load_model(smollm2, dtype="float32")
    return ours, lk.load_tokenizer(smollm2), theirs.eval(), tokenizer


TEXT = "The Roman Empire was the post-Republican period of ancient Rome. As a polity, it included "


def test_smollm2_logits(real):
    ours, tok, theirs, _ = real
    ids = torch.tensor([tok.encode(TEXT * 10)])
    with torch.no_grad():
        expected = theirs(ids).logits
        # the bound of 30 layers in fp32; logits reach 30
        assert (ours(ids) - expected).abs().max() <= 2e-4
        assert expected.abs().max() > 10


def test_smollm2_greedy_text_and_tokens(real):
    ours, tok, theirs, tokenizer = real
    messages = [{"role": "user", "content": "Write three sentences about the sea."}]
    ids = tok.apply_chat_template(messages, add_generation_prompt=True)
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[
        0, len(ids) :
    ]
    text = lk.generate(ours, tok, messages, max_new_tokens=64)
    assert text == tokenizer.decode(expected, skip_special_tokens=True)
    # beside a longer prompt, so padded on the left: the same text
    both = lk.generate_batch(ours, tok, [messages, TEXT * 2], max_new_tokens=64)
    assert both[0] == text
