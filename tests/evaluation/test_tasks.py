"""Tasks of lm-evaluation-harness: its numbers through our class are those through its own."""

import builtins
import json

import pytest
import torch

import lorakit as lk

harness = pytest.importorskip("lm_eval")

ROWS = [
    {"q": "one two ", "choices": [" three", " four", "five six", " t"], "gold": 0},
    {"q": "", "choices": ["a b c", "b", "cc", "abc"], "gold": 1},
    {"q": "two and two", "choices": [" is four", " is 5", "are", " is"], "gold": 2},
    {"q": "x" * 70, "choices": ["y", "z", "yz", "x"], "gold": 3},  # longer than the model reads
    {"q": "abc", "choices": ["d", "e", "f", "g"], "gold": 3},
]
TASKS = {
    "mine_choice": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "mine_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}} {{choices}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "mine_answer": """
output_type: generate_until
doc_to_text: "{{q}}?"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with three tasks of the same local rows."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, text in TASKS.items():
        head = (
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {rows}}}}}"
        )
        (tasks / f"{name}.yaml").write_text(head + text)
    return tasks


def test_numbers_are_those_of_transformers_class(tiny_dir, folder):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = HFLM(
        AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(tiny_dir),
        batch_size=3,
    )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    expected = harness.simple_evaluate(
        theirs, tasks=list(TASKS), task_manager=manager, bootstrap_iters=100, log_samples=True
    )
    model, tok = lk.load_model(tiny_dir, dtype="float32"), lk.load_tokenizer(tiny_dir)
    found = lk.evaluate_tasks(model, tok, list(TASKS), batch_size=3, tasks_dir=folder)
    for task in TASKS:
        for name, value in expected["results"][task].items():
            if isinstance(value, float) and "stderr" not in name:
                # fp32 logits of two implementations; a perplexity is an exponential of many
                assert found[task][name] == pytest.approx(value, rel=1e-4), (task, name)

    from lorakit.evaluation.harness import HarnessModel

    ours = HarnessModel(model.train(), tok, 3)
    for task in TASKS:
        for sample in expected["samples"][task]:
            requests = [
                harness.api.instance.Instance("x", {}, tuple(arguments), 0)
                for arguments in sample["arguments"]
            ]
            kind = manager.load(task)["tasks"][task].OUTPUT_TYPE
            method = "loglikelihood" if kind == "multiple_choice" else kind
            answers = getattr(ours, method)(requests)
            for answer, response in zip(answers, sample["resps"], strict=True):
                compare(answer, response[0])
    assert model.training


def compare(answer, response):
    if isinstance(response, str):
        assert answer.strip() == response.strip()  # theirs loses a space at the start
    elif isinstance(response, float):
        assert answer == pytest.approx(response, rel=1e-5)
    else:
        assert answer[0] == pytest.approx(float(response[0]), rel=1e-5)
        assert answer[1] == (str(response[1]) == "True")


def test_what_is_refused(tiny_dir, folder, monkeypatch):
    model, tok = lk.load_model(tiny_dir, dtype="float32"), lk.load_tokenizer(tiny_dir)
    with pytest.raises(lk.LorakitError, match="there is no task 'mine' in .*tasks"):
        lk.evaluate_tasks(model, tok, "mine", tasks_dir=folder)
    path = folder / "mine_answer.yaml"
    text = path.read_text()
    path.write_text(text.replace("do_sample: false", "num_beams: 4"))
    with pytest.raises(lk.LorakitError, match="asks for num_beams, which lorakit does not have"):
        lk.evaluate_tasks(model, tok, "mine_answer", tasks_dir=folder)
    path.write_text(text.replace("max_gen_toks: 12", "max_gen_toks: 64"))
    with pytest.raises(lk.LorakitError, match="64 new tokens; the model is meant for 64 positions"):
        lk.evaluate_tasks(model, tok, "mine_answer", tasks_dir=folder)


def test_without_lm_eval_one_sentence_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **options):
        if name.startswith("lm_eval"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(lk.LorakitError, match=r"tasks need lm-eval .* pip install 'lorakit\[eval"):
        lk.evaluate_tasks(None, None, "hellaswag")
