"""`evaluate`: the loss of rows by its definition, and scores of completions."""

import json
import math

import pytest
import torch

import lorakit as lk
from lorakit.config.metrics import METRICS
from lorakit.data.encode import Encoder
from lorakit.evaluation import metrics
from lorakit.evaluation.evaluate import encode_for
from lorakit.evaluation.score import check_rows
from lorakit.models.tokenizer import Tokenizer
from tests.conftest import ROWS, TINY_VARIANTS, tiny_llama
from tests.training.runs import PAIRS


def test_rows_and_objective_must_fit(tiny_dir, tmp_path):
    model, tok = lk.attach(lk.load_model(tiny_dir, dtype="float32")), lk.load_tokenizer(tiny_dir)
    sft, dpo = (lk.TrainConfig(str(tmp_path), objective=o) for o in ("sft", "dpo"))
    rows = [{"prompt": "a", "completion": "b"}]
    for data, config in ((PAIRS, sft), (rows, dpo)):
        with pytest.raises(lk.LorakitError, match="does not fit the training rows"):
            lk.train(model, tok, data, config)


def test_loss_is_the_mean_over_label_tokens(tiny_dir, tok):
    """evaluate = sum of cross-entropies of completion tokens / their number, one row at a time."""
    model = lk.load_model(tiny_dir, dtype="float32")
    result = lk.evaluate(model, tok, ROWS, batch_size=5)
    total = count = right = entropy = 0
    for row in ROWS:
        prompt = tok.encode(row["prompt"])
        ids = [*prompt, *tok.encode(row["completion"], add_special_tokens=False), 2]
        logp = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        for t in range(len(prompt), len(ids)):
            total -= logp[t - 1, ids[t]].item()
            right += logp[t - 1].argmax().item() == ids[t]
            entropy -= (logp[t - 1].exp() * logp[t - 1]).sum().item()
            count += 1
    assert result["label_tokens"] == count
    # fp32 logits of other batches; an error of the loss is one of the perplexity's logarithm
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result["mean_token_accuracy"] == right / count
    assert result["entropy"] == pytest.approx(entropy / count, rel=1e-5)


@pytest.mark.parametrize("variant", ["dynamic_rope", "longrope"])
def test_loss_and_scores_do_not_depend_on_the_batch(tiny_dir, tmp_path, tok, variant):
    """Also where the rotary embedding depends on the length of a row: each has its own."""
    tiny_llama(vocab_size=300, **TINY_VARIANTS[variant]).save_pretrained(tmp_path)
    model = lk.load_model(tmp_path, dtype="float32")
    rows = [{"prompt": "a" * n, "completion": "b" * n} for n in (2, 18, 5, 13)]
    texts = [lk.generate(model, tok, row["prompt"], max_new_tokens=20) for row in rows]
    prompts = [row["prompt"] for row in rows]
    assert lk.generate_batch(model, tok, prompts, max_new_tokens=20) == texts
    alone, together = (
        lk.evaluate(model, tok, rows, batch_size=n, metrics="partial_match") for n in (1, 4)
    )
    assert together == pytest.approx(alone, rel=1e-5)  # other orders of fp32 sums


def test_evaluate_scores_greedy_completions(tiny_dir, tok):
    """A random model says a token more than the references, which are its first ones."""
    model = lk.load_model(tiny_dir, dtype="float32")
    prompts = [row["prompt"] for row in ROWS[:5]]
    said = lk.generate_batch(model, tok, prompts, max_new_tokens=4)
    rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, said, strict=True)]
    longest = 1 + max(len(tok.encode(text, add_special_tokens=False)) for text in said)
    longer = lk.generate_batch(model, tok, prompts, max_new_tokens=longest)
    pytest.importorskip("sacrebleu")
    expected = metrics.score(longer, said, METRICS)
    model.train()
    result = lk.evaluate(model, tok, rows, batch_size=2, metrics=METRICS)
    assert {name: result[name] for name in METRICS} == expected
    assert model.training
    names = {"loss", "perplexity", "mean_token_accuracy", "entropy", "label_tokens", "rows"}
    assert lk.evaluate(model, tok, rows).keys() == names
    assert lk.evaluate(model, tok, rows)["loss"] == pytest.approx(result["loss"], rel=1e-5)


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_size_of_the_batches(tiny_dir, tok, size):
    model = lk.load_model(tiny_dir, dtype="float32")
    with pytest.raises(lk.LorakitError, match="batch_size must be at least 1"):
        lk.evaluate(model, tok, ROWS, batch_size=size)


@pytest.mark.parametrize("metrics", [(), ("exact_match",)])
def test_a_file_is_encoded_once_before_the_first_step(
    tiny_dir, tok, tmp_path, monkeypatch, metrics
):
    """Each row of a file is encoded once; of scores its prompt and its answer are tokenized."""
    model = lk.load_model(tiny_dir, dtype="float32")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    calls, real, encode_row = [], Tokenizer.encode, Encoder.__call__

    def encode(self, *args, **options):
        calls.append(args)
        return real(self, *args, **options)

    monkeypatch.setattr(
        Encoder, "__call__", lambda self, row: calls.append(row) or encode_row(self, row)
    )
    examples = encode_for(model, tok, path, lk.TrainConfig())
    assert list(examples.rows) == calls
    monkeypatch.setattr(Tokenizer, "encode", encode)
    calls.clear()
    check_rows(model, tok, examples.rows, metrics)
    assert len(calls) == (2 * len(ROWS) if metrics else 0)


def test_a_token_outside_of_the_vocabulary(tiny_dir, tok, tmp_path):
    """Wherever it stands: a row at the end of a file that is not held."""
    model = lk.load_model(tiny_dir, dtype="float32")
    added = lk.load_tokenizer(tiny_dir)
    added.backend.add_tokens([f"<{i}>" for i in range(60)])
    path = tmp_path / "rows.jsonl"
    rows = [*ROWS, {"prompt": "a", "completion": "<59>"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for data in (path, rows):
        with pytest.raises(lk.LorakitError, match=r"token 318 \('<59>'\) lies outside"):
            lk.evaluate(model, added, data)
    assert lk.evaluate(model, added, rows[:-1])["rows"] == len(ROWS)
