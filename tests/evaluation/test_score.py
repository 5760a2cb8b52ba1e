"""Completions of rows, scored: which prompt a model gets, and which rows are refused."""

import json
from types import SimpleNamespace

import pytest

import lorakit as lk
from lorakit.evaluation import score as scoring
from lorakit.models.tokenizer import Tokenizer
from tests.conftest import ROWS


def test_a_model_that_has_learnt_its_rows(tiny_dir, tok, tmp_path):
    """Its score is 1 after training, less before; both are in metrics.jsonl."""
    model = lk.load_model(tiny_dir, dtype="float32")
    lk.attach(model, lk.LoraConfig(r=8, lora_alpha=16))
    rows = [{"prompt": f"{i}?", "completion": "yes" if i % 2 else "no"} for i in range(4)]
    names = ["exact_match", "macro_f1"]
    config = lk.TrainConfig(
        output_dir=str(tmp_path),
        max_steps=60,
        eval_steps=30,
        learning_rate=1e-2,
        eval_metrics=names,
    )
    before = lk.evaluate(model, tok, rows, metrics=names)
    result = lk.train(model, tok, {"train": rows, "validation": rows}, config)
    assert before["exact_match"] == 0
    assert [each["step"] for each in result.evaluations] == [30, 60]
    assert result.evaluations[-1]["exact_match"] == result.evaluations[-1]["macro_f1"] == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    written = [line for line in lines if "eval_loss" in line]
    assert [line["eval_macro_f1"] for line in written] == [
        each["macro_f1"] for each in result.evaluations
    ]


def test_bad_answers_are_no_references(tiny_dir, tok, monkeypatch):
    """A model that says the bad answers of rows for KTO has none right."""
    model = lk.load_model(tiny_dir, dtype="float32")
    rows = [
        {"prompt": f"{i}?", "completion": "yes" if i % 2 else "no", "label": i % 2 == 0}
        for i in range(4)
    ]
    monkeypatch.setattr(scoring, "generate_batch", lambda *_, **__: ["yes"] * 4)
    rows = lk.read_rows(rows)
    assert scoring.score_rows(model, tok, rows, ["exact_match"], 2) == {"exact_match": 0}
    with pytest.raises(lk.LorakitError, match="every row has a bad answer"):
        scoring.check_good(rows[1::2], ["exact_match"])
    scoring.check_good(rows, ["exact_match"])


def test_refused_before_the_first_step(tiny_dir, tok, tmp_path):
    model = lk.attach(lk.load_model(tiny_dir, dtype="float32"))
    with pytest.raises(lk.LorakitError, match="unknown metric 'exact' .did you mean 'exact_match'"):
        lk.TrainConfig(eval_metrics=["exact"])
    with pytest.raises(lk.LorakitError, match="unknown metric 'exact'"):
        lk.evaluate(model, tok, ROWS, metrics="exact")
    config = lk.TrainConfig(output_dir=str(tmp_path), eval_metrics=["exact_match"])
    with pytest.raises(lk.LorakitError, match="eval_metrics needs validation rows"):
        lk.train(model, tok, ROWS, config)
    limit = model.config.context_length
    long = [{"prompt": "x" * limit, "completion": "y"}]
    with pytest.raises(lk.LorakitError, match=rf"row 0: .*must have 1 to {limit - 2} tokens"):
        lk.train(model, tok, {"train": ROWS, "validation": long}, config)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_prompt_that_is_scored_is_the_one_that_is_trained(tiny_dir, tok, monkeypatch):
    """Whatever the day: a template may print the date."""
    template = (
        "{{ strftime_now('%Y') }}{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>"
        "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    dated = Tokenizer(tok.backend, tok.special_tokens, template)
    prompts = []

    def generate(model, tok, asked, **_):
        prompts.extend(asked)
        return ["x"] * len(asked)

    monkeypatch.setattr(scoring, "generate_batch", generate)
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "abc"}]
    model = lk.load_model(tiny_dir, dtype="float32")
    lk.evaluate(model, dated, [{"messages": chat}], metrics="exact_match")
    [example] = lk.encode_rows(lk.read_rows([{"messages": chat}]), dated, max_seq_length=99)
    assert prompts == [example.input_ids[: example.labels.count(-100)]]
    assert dated.decode(prompts[0]).startswith("2024")
    with pytest.raises(lk.LorakitError, match="row 0: only a chat .* an answer in text to somethi"):
        lk.evaluate(model, dated, [{"messages": chat[1:]}], metrics="exact_match")


TURNS = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"


@pytest.mark.parametrize("template", [None, TURNS])
@pytest.mark.parametrize("more", ["", "1 2"])
def test_an_instruction_is_scored_by_the_prompt_it_is_trained_on(tok, monkeypatch, template, more):
    """It is a chat if the tokenizer has a template, or else Alpaca's prompt."""
    own, prompts = Tokenizer(tok.backend, tok.special_tokens, template), []

    def generate(model, tok, asked, **_):
        prompts.extend(asked)
        return ["3"] * len(asked)

    monkeypatch.setattr(scoring, "generate_batch", generate)
    rows = lk.read_rows([{"instruction": "Add.", "input": more, "output": "3"}])
    model = SimpleNamespace(config=SimpleNamespace(context_length=999))
    scoring.check_rows(model, own, rows, ["exact_match"])
    assert scoring.score_rows(model, own, rows, ["exact_match"], 1) == {"exact_match": 1}
    [example] = lk.encode_rows(rows, own, max_seq_length=999)
    [prompt] = prompts
    assert example.input_ids[: len(prompt)] == prompt
    assert own.decode(prompt).count("Add.") == 1
