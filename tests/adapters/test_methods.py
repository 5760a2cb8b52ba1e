"""IA3, VeRA, AdaLoRA and the trained prompts, against peft: files in both directions, steps, and
what merging, generating and training make of them.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.adapters.manage import attached
from lorakit.adapters.methods.adalora import AdaLoraLinear
from tests.adapters.test_peft_files import hugging_face
from tests.conftest import ROWS, tiny

IDS = torch.arange(3, 27).view(2, 12)
LAYERS = ["q_proj", "k_proj", "v_proj", "down_proj"]
METHODS = {
    "ia3": ("IA3Config", {"target_modules": LAYERS, "feedforward_modules": ["down_proj"]}),
    "vera": ("VeraConfig", {"target_modules": LAYERS, "r": 6}),
    "vera unsaved": (
        "VeraConfig",
        {"target_modules": LAYERS, "r": 6, "save_projection": False, "projection_prng_key": 7},
    ),
    "adalora": ("AdaLoraConfig", {"target_modules": LAYERS, "init_r": 4, "total_step": 9}),
}
PROMPTS = {
    "prompt": ("PromptTuningConfig", {}),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 20}),
    "p-tuning lstm": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 20, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix projected": (
        "PrefixTuningConfig",
        {"prefix_projection": True, "encoder_hidden_size": 20},
    ),
}
PROMPTS = {
    name: (kind, {**fields, "num_virtual_tokens": 5}) for name, (kind, fields) in PROMPTS.items()
}
EVERY = METHODS | PROMPTS


@pytest.fixture
def model(tiny_dir):
    return lk.load_model(tiny_dir, dtype="float32")


def ours(model, method):
    kind, fields = EVERY[method]
    torch.manual_seed(0)
    return shaken(lk.attach(model, getattr(lk, kind)(**fields)))


def theirs(tiny_dir, method):
    import peft

    kind, fields = EVERY[method]
    torch.manual_seed(0)
    config = getattr(peft, kind)(**fields, task_type="CAUSAL_LM")
    return peft.get_peft_model(hugging_face(tiny_dir), config).eval()


def shaken(model):
    """What trains, moved: most of it starts where nothing is changed."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def logits_of(peft_model, ids):
    """peft returns those of the prompt's own positions too."""
    return peft_model(ids).logits[:, -ids.shape[1] :]


def assert_same(a, b):
    # fp32, and two orders of the same sums: 1e-5 of the largest logit
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("method", EVERY)
def test_we_load_pefts(model, tiny_dir, tmp_path, method):
    before = model(IDS)
    peft_model = shaken(theirs(tiny_dir, method))
    peft_model.save_pretrained(tmp_path)
    lk.load_adapter(model, tmp_path)
    expected = logits_of(peft_model, IDS)
    assert (expected - before).abs().max() > 0.01 * expected.abs().max()
    assert_same(model(IDS), expected)


@pytest.mark.parametrize("method", EVERY)
def test_peft_loads_ours(model, tiny_dir, tmp_path, method):
    from peft import PeftModel

    ours(model, method)
    lk.save_adapter(model, tmp_path / "ours")
    loaded = PeftModel.from_pretrained(hugging_face(tiny_dir), tmp_path / "ours").eval()
    assert_same(logits_of(loaded, IDS), model(IDS))
    theirs(tiny_dir, method).save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {
        k: (v.shape, v.dtype) for k, v in b.items()
    }
    known = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert set(json.loads((tmp_path / "ours" / "adapter_config.json").read_text())) <= set(known)


@pytest.mark.parametrize("method", EVERY)
def test_round_trip(model, tiny_dir, tmp_path, method):
    ours(model, method)
    lk.save_adapter(model, tmp_path / "a")
    other = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), tmp_path / "a")
    assert torch.equal(other(IDS), model(IDS))
    lk.save_adapter(other, tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("method", EVERY)
def test_attach_select_and_detach(model, method):
    before = model(IDS)
    ours(model, method)
    changed = model(IDS)
    with lk.disable_adapters(model):
        assert torch.equal(model(IDS), before)
    lk.attach(model, getattr(lk, EVERY[method][0])(**EVERY[method][1]), name="other")
    assert not torch.equal(model(IDS), changed)
    lk.set_adapter(model, "default")
    assert torch.equal(model(IDS), changed)
    lk.detach(model)
    assert torch.equal(model(IDS), before)
    assert not attached(model)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_merge_and_unmerge(tiny_dir, method, quantize):
    model = ours(lk.load_model(tiny_dir, dtype="float32", quantize=quantize), method)
    adapted = model(IDS)
    lk.merge(model)
    # one rounding of each weight in fp32 instead of one more product
    assert (model(IDS) - adapted).abs().max() <= 1e-4 * adapted.abs().max()
    lk.unmerge(model)
    assert torch.equal(model(IDS), adapted)


def test_biases_merge_too():
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 5))
    config = lk.IA3Config(target_modules=["0", "1"], feedforward_modules=["1"])
    x = torch.randn(3, 6)
    shaken(lk.attach(linear, config))
    adapted = linear(x)
    lk.merge(linear)
    assert (linear(x) - adapted).abs().max() < 1e-6  # fp32 sums of 8 terms


# ---- training ----


@pytest.mark.parametrize("method", ["ia3", "vera"])
def test_ten_steps_of_sgd_are_pefts(model, tiny_dir, tmp_path, method):
    peft_model = theirs(tiny_dir, method).train()
    kind, fields = EVERY[method]
    lk.attach(model, getattr(lk, kind)(**fields))
    for each in (model, peft_model):
        params = [p for p in each.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(params, lr=0.05)
        for _ in range(10):
            if each is model:
                total, count = model.loss(IDS, IDS)
                loss = total / count
            else:
                loss = peft_model(IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    lk.save_adapter(model, tmp_path / "ours")
    peft_model.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    start = {"ia3": 1.0, "vera": 0.0}[method]
    moved = max((v - start).abs().max() for k, v in b.items() if k.endswith(("ia3_l", "lambda_b")))
    assert moved > 1e-2
    for key, value in b.items():
        # gradients in fp32, each summed in another order; ten steps of it
        assert (a[key] - value).abs().max() <= 1e-5 * max(1, value.abs().max()), key


ADALORA = {
    "target_modules": LAYERS,
    "init_r": 4,
    "target_r": 2,
    "total_step": 12,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
}


def test_adalora_allocates_as_peft_does(model, tiny_dir, tmp_path):
    import peft

    torch.manual_seed(0)
    config = peft.AdaLoraConfig(**ADALORA, task_type="CAUSAL_LM")
    peft_model = peft.get_peft_model(hugging_face(tiny_dir), config).train()
    peft_model.save_pretrained(tmp_path / "start")
    lk.load_adapter(model, tmp_path / "start")
    kept = []
    for each in (model, peft_model):
        params = [p for p in each.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(params, lr=0.5)
        for step in range(ADALORA["total_step"]):
            if each is model:
                total, count = model.loss(IDS, IDS)
                loss = total / count + lk.adalora_orthogonality(model)
            else:
                loss = peft_model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            if each is model:
                lk.adalora_allocate(model, step)
            else:
                peft_model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            if each is model:
                layers = [m for m in attached(model).values() if isinstance(m, AdaLoraLinear)]
                kept.append(sum(int(m.part.left.sum()) for m in layers))
    assert kept[2] == len(layers) * 4  # none goes until tinit
    assert kept[-1] == len(layers) * 2 < kept[5] < len(layers) * 4
    lk.save_adapter(model, tmp_path / "ours")
    peft_model.eval().save_pretrained(tmp_path / "theirs")
    configs = [
        json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs")
    ]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert a.keys() == b.keys()
    for key, value in b.items():
        # twelve steps at a large rate, whose penalty pulls both to the same; gradients in fp32
        assert a[key].shape == value.shape
        assert value.numel() == 0 or (a[key] - value).abs().max() <= 1e-5, key
    # and both read what the other wrote: the rank of a layer is that of the file
    cut = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), tmp_path / "theirs")
    assert_same(cut(IDS), peft_model(IDS).logits)
    again = peft.PeftModel.from_pretrained(hugging_face(tiny_dir), tmp_path / "ours").eval()
    assert_same(again(IDS).logits, model(IDS))


@pytest.mark.parametrize("method", EVERY)
def test_train_takes_every_method(model, tiny_dir, tmp_path, method):
    tok = lk.load_tokenizer(tiny_dir)
    ours(model, method)
    before = lk.evaluate(model, tok, ROWS[:8])["loss"]
    config = lk.TrainConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=8,
        learning_rate=0.02,
        lr_scheduler_type="constant",
    )
    result = lk.train(model, tok, ROWS[:8], config)
    assert result.steps == 8
    assert lk.evaluate(model, tok, ROWS[:8])["loss"] < before
    other = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), tmp_path / "run")
    assert torch.equal(other(IDS), model(IDS))


def test_train_allocates(model, tiny_dir, tmp_path):
    steps = iter(range(100))
    lk.attach(model, lk.AdaLoraConfig(**{**ADALORA, "total_step": 6, "tfinal": 1}))
    config = lk.TrainConfig(output_dir=str(tmp_path), max_steps=6)
    lk.train(
        model,
        lk.load_tokenizer(tiny_dir),
        ROWS[:8],
        config,
        after_step=lambda: lk.adalora_allocate(model, next(steps)),
    )
    layers = [m for m in attached(model).values() if isinstance(m, AdaLoraLinear)]
    assert sum(int(m.part.left.sum()) for m in layers) == 2 * len(layers)


# ---- prompts ----


@pytest.mark.parametrize("method", PROMPTS)
def test_generation_is_what_the_forward_pass_predicts(model, tiny_dir, method):
    from lorakit.inference.decode import Decoding

    ours(model, method).eval()
    rows = [[5, 9, 11], [7, 3, 8, 4, 21, 6]]
    decoding = Decoding(model, [3, 0], 12)
    ids = torch.tensor([[0, 0, 0, *rows[0]], rows[1]])
    with torch.no_grad():
        for _ in range(4):
            logits = decoding(ids)
            expected = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
            # another order of the same fp32 sums, as of any two ways to decode
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
            ids = logits.argmax(-1, keepdim=True)
            rows = [[*row, int(i)] for row, i in zip(rows, ids, strict=True)]
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


# ---- what is refused ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lk.IA3Config(target_modules=["q_porj"]), "'q_porj' matches no layer"),
        (
            lambda: lk.IA3Config(target_modules=["q_proj"], feedforward_modules=["down_proj"]),
            "feedforward_modules: 'down_proj' matches no layer",
        ),
        (lambda: lk.VeraConfig(r=0), "r must be positive"),
        (lambda: lk.VeraConfig(target_modules=["embed_tokens"]), "'embed_tokens' matches no layer"),
        (lambda: lk.AdaLoraConfig(total_step=5, tinit=3, tfinal=2), "leave no step"),
        (lambda: lk.PromptTuningConfig(num_virtual_tokens=0), "num_virtual_tokens"),
        (
            lambda: lk.PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="RANDM"),
            "did you mean 'RANDOM'",
        ),
        (lambda: lk.TrainConfig(), "TrainConfig is no adapter's config"),
    ],
)
def test_refused_configs(model, make, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.attach(model, make())
    assert not attached(model)


def test_refused_uses(model):
    lk.attach(model, lk.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(lk.LorakitError, match="merge: a prompt is no part"):
        lk.merge(model)
    with pytest.raises(lk.LorakitError, match="packed documents take no prompt"):
        model(IDS[:1], cu_seqlens=torch.tensor([0, 5, 12]))
    with lk.adapter_rows(model, ["default", None]), pytest.raises(lk.LorakitError, match="prompt"):
        model(IDS)
    with pytest.raises(lk.LorakitError, match="adalora_allocate: the selected adapter is no Ada"):
        lk.adalora_allocate(model, 0)
    lk.detach(model)
    lk.attach(model, lk.AdaLoraConfig(total_step=9))
    with pytest.raises(lk.LorakitError, match="no gradients"):
        lk.adalora_allocate(model, 0)
    lk.attach(model, lk.AdaLoraConfig(total_step=9, init_r=3), name="small")
    with pytest.raises(lk.LorakitError, match="target_r is 8, more than init_r, 3"):
        lk.adalora_allocate(model, 0)
    with pytest.raises(lk.LorakitError, match="q_proj is a AdaLoraLinear of another adapter"):
        lk.attach(model, lk.IA3Config(), name="other")
    with pytest.raises(lk.LorakitError, match="lorakit Decoder"):
        lk.attach(torch.nn.Linear(2, 2), lk.PrefixTuningConfig(num_virtual_tokens=2))


class Descent:
    """An optimizer of whatever trains when it steps: the guide attaches after this is made."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def step(self):
        for p in self.model.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad

    def zero_grad(self):
        self.model.zero_grad(set_to_none=True)


def test_snippets_of_the_guide(tiny_dir):
    guide = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 4
    for snippet in snippets:
        model = lk.load_model(tiny_dir, dtype="float32")
        names = {"lk": lk, "model": model, "optimizer": Descent(model)}
        exec(snippet, names | {"batches": [(IDS, IDS)] * 3})
        assert lk.adapter_names(model)
