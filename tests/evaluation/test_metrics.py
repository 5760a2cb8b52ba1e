"""Each metric against its definition: brute force, and values worked out by hand.

The hand-worked values of F1 and of entities are those of scikit-learn 1.9's f1_score and of
seqeval 1.2's f1_score.
"""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.config.training import METRICS
from lorakit.evaluation import metrics as metrics
from lorakit.evaluation import score as scoring
from lorakit.models.tokenizer import Tokenizer
from tests.conftest import ROWS

words = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=7)


def brute_force(a, b):
    """The longest subsequence of a that is one of b, by trying all."""

    def is_subsequence(part):
        rest = iter(b)
        return all(word in rest for word in part)

    sizes = range(len(a), 0, -1)
    return next((n for n in sizes if any(map(is_subsequence, itertools.combinations(a, n)))), 0)


@given(words, words)
def test_is_the_f1_of_the_longest_common_subsequence(a, b):
    common = brute_force(a, b)
    expected = 0.0
    if common:
        precision, recall = common / len(a), common / len(b)
        expected = 2 * precision * recall / (precision + recall)
    assert lk.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)
    assert lk.rouge_l(" ".join(a), " ".join(b)) == lk.rouge_l(" ".join(b), " ".join(a))


def test_words():
    assert lk.rouge_l("Return the X-ray, now.", "return the x ray now") == 1.0
    assert lk.rouge_l("", "") == 0.0
    assert lk.rouge_l("the cat sat", "the dog sat") == pytest.approx(2 / 3)
    assert lk.rouge_l("größe", "GRÖSSE") == 0.0
    assert lk.rouge_l("naïve_x", "naïve x") == 1.0


# ---- of lists of texts ----

CATS = (["cat", "cat", "dog", "emu"], ["cat", "dog", "dog", "dog"])
labels = st.sampled_from(["a", "b", "c", "d"])
pairs = st.lists(st.tuples(labels, labels), min_size=1, max_size=12)


def test_f1_of_labels_by_hand():
    """cat: tp 1, fp 1: 2/3. dog: tp 1, fn 2: 1/2. emu: fp 1: 0."""
    assert metrics.accuracy(*CATS) == 0.5
    assert metrics.macro_f1(*CATS) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert metrics.weighted_f1(*CATS) == pytest.approx((2 / 3 + 3 * 1 / 2) / 4)
    assert metrics.macro_f1([" Yes\n"], ["yes"]) == 1.0


@given(pairs)
def test_f1_of_labels_is_its_definition(pairs):
    """By precision and recall of each label, counted one at a time."""
    occurring = {label for pair in pairs for label in pair}
    f1 = {}
    for label in occurring:
        tp = sum(p == r == label for p, r in pairs)
        precision = tp / max(1, sum(p == label for p, _ in pairs))
        recall = tp / max(1, sum(r == label for _, r in pairs))
        f1[label] = 2 * precision * recall / (precision + recall) if tp else 0.0
    predictions, references = map(list, zip(*pairs, strict=True))
    scores = lk.metrics.score(predictions, references, ["macro_f1", "weighted_f1", "accuracy"])
    assert scores["macro_f1"] == pytest.approx(sum(f1.values()) / len(f1))
    support = {label: sum(r == label for _, r in pairs) for label in occurring}
    weighted = sum(f1[label] * n for label, n in support.items()) / len(pairs)
    assert scores["weighted_f1"] == pytest.approx(weighted)
    assert scores["accuracy"] == sum(p == r for p, r in pairs) / len(pairs)


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "partial"),
    [
        ("Rome", "Rome", 1, 1),
        (" Rome\n", "Rome", 1, 1),
        ("rome", "Rome", 0, 1),
        ("It is Rome, Italy.", "rome italy", 0, 1),
        ("Rome", "It is Rome", 0, 0),
        ("Romeo", "Rome", 0, 0),
        ("Rome in Italy", "Rome Italy", 0, 0),
        ("?", "?", 1, 1),
        ("a ?", "?", 0, 0),
        ("", "Rome", 0, 0),
    ],
)
def test_matches(prediction, reference, exact, partial):
    scores = metrics.score([prediction], [reference], ["exact_match", "partial_match"])
    assert scores == {"exact_match": exact, "partial_match": partial}


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("B-PER I-PER O B-LOC", "B-PER I-PER O B-LOC", 1),
        ("B-PER O O B-LOC", "B-PER I-PER O B-LOC", 1 / 2),  # the end of PER is wrong
        ("B-LOC I-LOC O B-LOC", "B-PER I-PER O B-LOC", 1 / 2),  # the type is
        ("B-PER I-PER", "B-PER I-PER O B-LOC", 2 / 3),  # cut off
        ("B-PER B-PER", "B-PER I-PER", 0),  # two are not one
        ("I-PER I-PER", "B-PER I-PER", 1),  # CoNLL: an I- may begin
        ("B-PER I-LOC", "B-PER B-LOC", 1),
        ("O O", "O O", 0),  # nothing to find, nothing found
        ("nothing here", "O B-LOC", 0),
        ("PER: Ann Lee; LOC: Rome", "LOC: Rome\nPER: Ann Lee", 1),
        ("PER: Ann; LOC: Rome", "PER: Ann Lee; LOC: Rome", 1 / 2),
        ("PER: Ann", "PER: Ann; PER: Ann", 2 / 3),
        ("PER: Ann; none", "PER: Ann", 1),
        ("TIME: 10:30", "TIME: 10:30", 1),
        ("", "PER: Ann", 0),
    ],
)
def test_entities_by_hand(prediction, reference, expected):
    assert metrics.entity_f1([prediction], [reference]) == pytest.approx(expected)


def test_entities_are_counted_over_all_texts():
    """1 of 1 found, then 1 of 3: tp 2, fp 0, fn 2, not the mean of 1 and 1/2."""
    predictions = ["LOC: Rome", "PER: Ann"]
    references = ["LOC: Rome", "PER: Ann; PER: Bob; PER: Cid"]
    assert metrics.entity_f1(predictions, references) == pytest.approx(4 / 6)


spans = st.lists(st.tuples(st.sampled_from(["PER", "LOC"]), st.integers(1, 3), st.booleans()))


def as_tags(pieces):
    """Tags of entities and gaps laid end to end, and the entities' types and places."""
    tags, found = [], set()
    for kind, size, entity in pieces:
        if entity:
            found.add((kind, len(tags), len(tags) + size))
            tags += [f"B-{kind}"] + [f"I-{kind}"] * (size - 1)
        else:
            tags += ["O"] * size
    return " ".join(tags), found


@given(spans, spans)
def test_tags_mean_the_spans_they_were_made_from(one, other):
    (predicted, found), (true, wanted) = as_tags(one), as_tags(other)
    hits = len(found & wanted)
    expected = 2 * hits / (len(found) + len(wanted)) if hits else 0.0
    assert metrics.entity_f1([predicted], [true]) == pytest.approx(expected)


texts = st.lists(st.text("aB 0-O:;I\n", max_size=9) | st.text(max_size=5), min_size=1, max_size=5)


@given(st.data(), texts)
def test_every_metric_of_any_text(data, references):
    size = len(references)
    predictions = data.draw(st.lists(st.sampled_from(references), min_size=size, max_size=size))
    scores = metrics.score(predictions, references, METRICS)
    assert list(scores) == list(METRICS)
    assert all(0 <= value <= 1 for value in scores.values())
    assert scores["exact_match"] <= scores["partial_match"]
    assert scores["exact_match"] <= scores["accuracy"]
    same = metrics.score(references, references, METRICS)
    for name in ("exact_match", "partial_match", "accuracy", "macro_f1", "weighted_f1"):
        assert same[name] == pytest.approx(1)
    order = data.draw(st.permutations(range(size)))
    shuffled = [predictions[i] for i in order], [references[i] for i in order]
    assert metrics.score(*shuffled, METRICS) == pytest.approx(scores)


def test_refused():
    with pytest.raises(lk.LorakitError, match="metric 'rouge-l' .did you mean 'rouge_l'"):
        metrics.score(["a"], ["a"], "rouge-l")
    with pytest.raises(lk.LorakitError, match="beside loss and perplexity there are accuracy, "):
        metrics.score(["a"], ["a"], ["perplexity"])
    for predictions, references in ([], []), (["a"], []), (["a"], ["a", "b"]):
        with pytest.raises(lk.LorakitError, match="as many of one as of the other"):
            metrics.score(predictions, references, METRICS)


# ---- of a model's own completions ----


@pytest.fixture(scope="module")
def tok(tiny_dir):
    return lk.load_tokenizer(tiny_dir)


def test_evaluate_scores_greedy_completions(tiny_dir, tok):
    """A random model says a token more than the references, which are its first ones."""
    model = lk.load_model(tiny_dir, dtype="float32")
    prompts = [row["prompt"] for row in ROWS[:5]]
    said = lk.generate_batch(model, tok, prompts, max_new_tokens=4)
    rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, said, strict=True)]
    longest = 1 + max(len(tok.encode(text, add_special_tokens=False)) for text in said)
    longer = lk.generate_batch(model, tok, prompts, max_new_tokens=longest)
    expected = metrics.score(longer, said, METRICS)
    model.train()
    result = lk.evaluate(model, tok, rows, batch_size=2, metrics=METRICS)
    assert {name: result[name] for name in METRICS} == expected
    assert model.training
    assert lk.evaluate(model, tok, rows).keys() == {"loss", "perplexity", "label_tokens", "rows"}
    assert lk.evaluate(model, tok, rows)["loss"] == pytest.approx(result["loss"], rel=1e-5)


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


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_size_of_the_batches(tiny_dir, tok, size):
    model = lk.load_model(tiny_dir, dtype="float32")
    with pytest.raises(lk.LorakitError, match="batch_size must be at least 1"):
        lk.evaluate(model, tok, ROWS, batch_size=size)
