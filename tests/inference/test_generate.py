"""Stopping, batching and streaming. (Greedy text against transformers: models/test_parity_hf.)"""

import pytest
import torch

import lorakit as lk
from tests.conftest import tiny_llama


@pytest.fixture(scope="module")
def model(tiny_dir):
    return lk.load_model(tiny_dir, dtype="float32")


@pytest.fixture(scope="module")
def tok(tiny_dir):
    return lk.load_tokenizer(tiny_dir)


@pytest.fixture(scope="module")
def smol(smollm2):
    return lk.load_model(smollm2, dtype="float32"), lk.load_tokenizer(smollm2)


@pytest.mark.parametrize("variant", ["dense", "nf4", "adapted"])
def test_greedy_equals_the_loop_without_a_cache(tiny_dir, tok, variant):
    model = lk.load_model(tiny_dir, dtype="float32", quantize="nf4" if variant == "nf4" else None)
    if variant == "adapted":
        lk.attach(model, lk.LoraConfig(r=2))
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, 0, 0.1)
    ids = tok.encode("hello")
    for _ in range(20):
        token = model(torch.tensor([ids]))[0, -1].argmax().item()
        if token == 2:
            break
        ids.append(token)
    expected = tok.decode(ids[len(tok.encode("hello")) :])
    assert lk.generate(model, tok, "hello", max_new_tokens=20) == expected


def test_a_batch_gives_each_rows_own_text(model, tok):
    prompts = ["hello", "a much longer prompt here", "x", "hello"]
    alone = [lk.generate(model, tok, p, max_new_tokens=12) for p in prompts]
    assert lk.generate_batch(model, tok, prompts, max_new_tokens=12, batch_size=3) == alone


def test_seed(model, tok):
    def draw(seed):
        return lk.generate(model, tok, "hi", max_new_tokens=20, temperature=1.5, seed=seed)

    assert draw(1) == draw(1)
    assert len({draw(s) for s in range(5)}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_yields_nan(tiny_dir, tok, temperature):
    model = lk.load_model(tiny_dir, dtype="float32")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(lk.LorakitError, match="logits are not finite"):
        lk.generate(model, tok, "x", max_new_tokens=3, temperature=temperature)


def test_a_tokenizer_of_another_model(tok, tmp_path):
    tiny_llama(vocab_size=100).save_pretrained(tmp_path)
    model = lk.load_model(tmp_path, dtype="float32")
    with pytest.raises(lk.LorakitError, match="outside the model's vocabulary of 100"):
        lk.generate(model, tok, "zzz é")


def test_repetition_penalty_in_text(model, tok):
    plain = lk.generate(model, tok, "hello", max_new_tokens=20)
    forbidding = lk.generate(model, tok, "hello", max_new_tokens=20, repetition_penalty=1e6)
    assert forbidding != plain
    ids = tok.encode(forbidding, add_special_tokens=False)
    assert not set(ids) & set(tok.encode("hello", add_special_tokens=False))
    rows = ["hello", "a longer one"]  # padding is no token of a row
    both = lk.generate_batch(model, tok, rows, max_new_tokens=20, repetition_penalty=1e6)
    assert both[0] == forbidding


@pytest.mark.parametrize("stop", ["string", "list"])
def test_stop_strings_are_cut_off_and_end_the_row(smol, stop):
    model, tok = smol
    prompt = "One, two, three, four,"
    full = lk.generate(model, tok, prompt, max_new_tokens=30)
    word = full.split()[3]
    pieces = []
    cut = lk.generate(
        model,
        tok,
        prompt,
        max_new_tokens=30,
        stop=word if stop == "string" else ["never to be seen", word],
        stream=pieces.append,
    )
    assert cut == full[: full.index(word)]
    assert "".join(pieces) == cut
    assert len(pieces) > 1


def test_a_special_token_as_stop_string(smol, smollm2):
    """Such a token leaves no text that could be searched, so it ends the row as a token."""
    model, tok = smol
    question = [{"role": "user", "content": "Hi"}]
    answer = lk.generate(model, tok, question, max_new_tokens=24)
    prompt = tok.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    bare = lk.load_tokenizer(smollm2)
    bare.chat_template, bare.special_tokens = None, {}
    ends = model.config.eos_token_id
    object.__setattr__(model.config, "eos_token_id", None)
    try:
        assert lk.generate(model, bare, prompt, max_new_tokens=24) != answer  # it runs on
        assert lk.generate(model, bare, prompt, max_new_tokens=24, stop="<|im_end|>") == answer
    finally:
        object.__setattr__(model.config, "eos_token_id", ends)


def test_the_stream_of_every_row_is_its_text(smol):
    model, tok = smol
    prompts = ["Ünïcödé 🙂 and 漢字 mean", "The sea", "def f(x):"]
    pieces = [[], [], []]
    texts = lk.generate_batch(
        model, tok, prompts, max_new_tokens=16, stream=lambda i, piece: pieces[i].append(piece)
    )
    assert ["".join(p) for p in pieces] == texts
    assert all(len(p) > 3 for p in pieces)


def test_end_tokens_that_only_the_template_names(tiny_dir, tok):
    assert tok.end_token_ids == [2]
    other = lk.load_tokenizer(tiny_dir)
    other.chat_template = "{% for m in messages %}{{ m.content }}\n<unk>{% endfor %}"
    assert other.end_token_ids == [2, 0]
    other.chat_template = "{% for m in messages %}{{ m.content }} and so on{% endfor %}"
    assert other.end_token_ids == [2]
    other.chat_template = "{% for m in messages %}{{ m.content }}<s>{% endfor %}"
    assert other.end_token_ids == [2]  # what opens the next text
    other.chat_template = None
    assert other.end_token_ids == [2]


def test_stops_at_every_end_token(tiny_dir, tok):
    model = lk.load_model(tiny_dir, dtype="float32")
    full = lk.generate(model, tok, "hello", max_new_tokens=10)
    third = tok.encode(full, add_special_tokens=False)[2]
    object.__setattr__(model.config, "eos_token_id", [2, third])
    assert full.startswith(lk.generate(model, tok, "hello", max_new_tokens=10))
    assert len(lk.generate(model, tok, "hello", max_new_tokens=10)) < len(full)


def test_mode_is_restored(model, tok):
    model.train()
    lk.generate(model, tok, "x", max_new_tokens=1)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("x", {"max_new_tokens": 0}, "max_new_tokens"),
        ("x", {"temperature": -1.0}, "temperature"),
        ("x", {"top_p": 0.0}, "top_p"),
        ("x", {"top_k": 0}, "top_k"),
        ("x", {"min_p": 1.5}, "min_p"),
        ("x", {"repetition_penalty": 0.0}, "repetition_penalty"),
        ("x", {"repetition_penalty": 1e-40}, "repetition_penalty"),
        ("x", {"stop": ""}, "stop must be"),
        ("x", {"stop": [3]}, "stop must be"),
        ("x", {"temperature": float("nan")}, "temperature"),
        ("x", {"temperature": 1.0, "seed": 2**70}, "seed is"),
        ("x" * 60, {"max_new_tokens": 10}, "exceed the model's 64 positions"),
        ([], {}, "at least one message"),
    ],
)
def test_bad_input(model, tok, prompt, options, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.generate(model, tok, prompt, **options)
