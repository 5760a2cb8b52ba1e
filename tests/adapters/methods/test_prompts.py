"""Trained prompts: generation, other families, gradients, and how they start."""

import pytest
import torch

import lorakit as lk
from lorakit.inference.decode import Decoding
from tests.adapters.methods.common import IDS, PROMPTS, assert_same, logits_of, ours, theirs
from tests.conftest import tiny


@pytest.mark.parametrize("method", PROMPTS)
def test_generation_is_what_the_forward_pass_predicts(model, tiny_dir, method):
    ours(model, method).eval()
    rows = [[5, 9, 11], [7, 3, 8, 4, 21, 6]]
    decoding = Decoding(model, 2, 12)
    with torch.no_grad():
        lines, logits = decoding.read(rows)
        for _ in range(4):
            expected = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
            # another order of the same fp32 sums, as of any two ways to decode
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
            ids = logits.argmax(-1, keepdim=True)
            rows = [[*row, int(i)] for row, i in zip(rows, ids, strict=True)]
            logits = decoding(lines, ids)
    tok = lk.load_tokenizer(tiny_dir)
    text = lk.generate(model, tok, "What is", max_new_tokens=5)
    with lk.disable_adapters(model):
        assert lk.generate(model, tok, "What is", max_new_tokens=5) != text


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 6}),
        ("gemma", {"head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 12, "num_key_value_heads": 2}),
    ],
)
def test_prompts_of_other_families(tmp_path, family, settings, method):
    import peft

    theirs = tiny(family, **settings)
    theirs.save_pretrained(tmp_path / "model")
    kind, fields = PROMPTS[method]
    torch.manual_seed(0)
    config = getattr(peft, kind)(**fields, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = lk.load_adapter(
        lk.load_model(tmp_path / "model", dtype="float32"), tmp_path / "adapter"
    )
    assert_same(model(IDS), logits_of(theirs, IDS))
    assert_same(model(IDS[:, :1]), logits_of(theirs, IDS[:, :1]))


@pytest.mark.parametrize("method", PROMPTS)
def test_gradients_of_prompts_are_pefts(model, tiny_dir, tmp_path, method):
    peft_model = theirs(tiny_dir, method)
    peft_model.save_pretrained(tmp_path)
    lk.load_adapter(model, tmp_path)  # the finished prompt: that of peft's network trains as it is
    (part,) = model.beginning.adapters.values()
    finished = {}
    encoder = peft_model.prompt_encoder["default"]

    def note(module, inputs, output):
        output.retain_grad()
        finished["prompt"] = output

    encoder.register_forward_hook(note)
    labels = IDS.clone()
    labels[:, :3] = -100
    peft_model(IDS, labels=labels).loss.backward()
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        part.embedding.grad = None
        total, count = model.loss(IDS, labels)
        (total / count).backward()
        expected = finished["prompt"].grad.sum(0)
        # fp32, through two layers
        assert (part.embedding.grad - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def test_prompt_inits(model, tiny_dir):
    start = lk.attach(
        model, lk.PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB")
    ).beginning
    found = start.adapters["default"].embedding
    weight = model.model.embed_tokens.weight
    assert (torch.cdist(found, weight).min(1).values == 0).all()
    text = lk.PromptTuningConfig(
        num_virtual_tokens=5,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="ab",
        tokenizer_name_or_path=str(tiny_dir),
    )
    lk.attach(model, text, name="text")
    ids = lk.load_tokenizer(tiny_dir).encode("ab")
    assert torch.equal(start.adapters["text"].embedding, weight[(ids * 5)[:5]])
    zero = lk.PrefixTuningConfig(num_virtual_tokens=3, init_weights="zero")
    lk.attach(model, zero, name="zero")
    assert start.adapters["zero"].embedding.abs().max() == 0


def test_refused_uses_of_a_prompt(model):
    lk.attach(model, lk.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(lk.LorakitError, match="merge: a prompt is no part"):
        lk.merge(model)
    with pytest.raises(lk.LorakitError, match="packed documents take no prompt"):
        model(IDS[:1], cu_seqlens=torch.tensor([0, 5, 12]))
    with lk.adapter_rows(model, ["default", None]), pytest.raises(lk.LorakitError, match="prompt"):
        model(IDS)
    with pytest.raises(lk.LorakitError, match="lorakit Decoder"):
        lk.attach(torch.nn.Linear(2, 2), lk.PrefixTuningConfig(num_virtual_tokens=2))


def test_a_finished_prompt_has_no_network(model):
    """What the network makes is trained itself, as a file holds it."""
    config = lk.PromptEncoderConfig(num_virtual_tokens=3, inference_mode=True)
    part = lk.attach(model, config).beginning.adapters["default"]
    assert part.encoder is None
    assert part.embedding.shape == (3, model.config.hidden_size)
    wide = lk.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, inference_mode=True)
    part = lk.attach(model, wide, name="prefix").beginning.adapters["prefix"]
    assert part.encoder is None
    keys = model.config.num_key_value_heads * model.config.head_dim
    assert part.embedding.shape == (3, 2 * model.config.num_hidden_layers * keys)
