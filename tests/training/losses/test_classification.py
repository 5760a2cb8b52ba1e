"""The losses of heads for classes against transformers and TRL, and runs that train such heads."""

import json
import math
import shutil
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import lorakit as lk
from lorakit.data.encode import Example, LabelledExample, PairExample
from lorakit.training.losses.batch import collated, summed_loss
from tests.training.runs import PAIRS

TEXTS = [{"text": f"{a} and {b}", "label": "even" if (a + b) % 2 == 0 else "odd"}
         for a in range(6) for b in range(4)]  # fmt: skip
NUMBERS = [{"text": f"{a} and {b}", "label": (a + b) / 2} for a in range(6) for b in range(4)]


@pytest.mark.parametrize("outputs", [1, 4])
def test_losses_are_transformers(outputs):
    """The mean of ours is what transformers returns, in fp64."""
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    torch.manual_seed(0)
    logits = torch.randn(7, outputs, dtype=torch.float64) * 3
    config = SimpleNamespace(num_labels=outputs, problem_type=None)
    targets = torch.randn(7, dtype=torch.float64) if outputs == 1 else torch.randint(outputs, (7,))
    expected = ForSequenceClassificationLoss(targets, logits, config)
    found = lk.classification_loss(logits, targets)
    assert found.shape == (7,)
    torch.testing.assert_close(found.mean(), expected)


def test_label_smoothing_is_that_of_transformers_trainer():
    from transformers.trainer_pt_utils import LabelSmoother

    torch.manual_seed(0)
    logits, targets = torch.randn(7, 4, dtype=torch.float64), torch.randint(4, (7,))
    expected = LabelSmoother(epsilon=0.2)({"logits": logits}, targets)
    found = lk.classification_loss(logits, targets, label_smoothing=0.2)
    torch.testing.assert_close(found.mean(), expected)


@pytest.mark.parametrize("margin", [None, torch.tensor([0.5, 0.0, 2.0, -1.0, 0.1])])
@pytest.mark.parametrize("center", [None, 0.01])
def test_the_reward_loss_is_trls(margin, center):
    from trl import RewardTrainer

    torch.manual_seed(0)
    rewards = torch.randn(10, 1, dtype=torch.float64) * 3

    def same(x):
        return x

    def model(**_):
        return SimpleNamespace(logits=rewards)

    model.training = False
    trainer = SimpleNamespace(
        model=model, args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same),
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {} if margin is None else {"margin": margin}
    expected = RewardTrainer.compute_loss(trainer, model, inputs)
    chosen, rejected = rewards[:, 0].chunk(2)
    options = {"margin": 0.0 if margin is None else margin}
    found = lk.reward_loss(chosen, rejected, center_rewards_coefficient=center or 0.0, **options)
    torch.testing.assert_close(found.mean(), expected)
    assert trainer._metrics["eval"]["margin"] == [(chosen - rejected).mean().item()]


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    classes, numbers = torch.randint(4, (3,)), torch.randn(3, dtype=torch.float64)

    def of_classes(logits):
        return lk.classification_loss(logits, classes, label_smoothing=0.1)

    def of_numbers(logits):
        return lk.classification_loss(logits[:, :1], numbers)

    def of_rewards(logits):
        return lk.reward_loss(logits[:, 0], logits[:, 1], margin=numbers,
                              center_rewards_coefficient=0.3)  # fmt: skip

    for loss in (of_classes, of_numbers, of_rewards):
        assert torch.autograd.gradcheck(loss, logits)


def test_numbers_need_one_output():
    with pytest.raises(lk.LorakitError, match="regression has one output, and there are 2"):
        lk.classification_loss(torch.zeros(3, 2), torch.zeros(3))


# ---- in a model ----


def headed(tiny_dir, labels=("even", "odd"), **options):
    torch.manual_seed(0)
    head = lk.ClassifierConfig(labels=list(labels), **options)
    model = lk.load_model(tiny_dir, dtype="float32", classifier=head)
    return lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8))


def examples(lengths):
    generator = torch.Generator().manual_seed(2)
    return [Example(torch.randint(3, 200, (n,), generator=generator).tolist(), [-100] * n)
            for n in lengths]  # fmt: skip


@pytest.mark.parametrize("objective", ["classification", "reward"])
@torch.no_grad()
def test_a_batch_is_its_rows_one_by_one_padded_and_packed(tiny_dir, objective):
    """Each row by itself through the model tells what all of a batch have to sum up to."""
    rows = examples([9, 5, 12, 7])
    labels = ["even", "odd", "odd", "even"] if objective == "classification" else ["x"]
    model = headed(tiny_dir, dict.fromkeys(labels))
    outputs = torch.cat([model(torch.tensor([row.input_ids])) for row in rows]).double()
    if objective == "classification":
        batch = [LabelledExample(*pair) for pair in zip(rows, labels, strict=True)]
        targets = torch.tensor([0, 1, 1, 0])
        expected = torch.nn.functional.cross_entropy(outputs, targets, reduction="sum")
        right = (outputs.argmax(-1) == targets).sum()
    else:
        batch = [PairExample(rows[0], rows[1], 0.5), PairExample(rows[2], rows[3], 1.5)]
        better, worse = outputs[[0, 2], 0], outputs[[1, 3], 0]
        ahead = better - worse - torch.tensor([0.5, 1.5])
        expected = (torch.log1p(torch.exp(-ahead)) + 0.1 * (better + worse) ** 2).sum()
        right = (better > worse).sum()
    center = 0.1 if objective == "reward" else 0.0
    for packing in (False, True):
        config = lk.TrainConfig(
            objective=objective, packing=packing, center_rewards_coefficient=center
        )
        found, count = summed_loss(model, collated(model, batch, config), config, None)
        # fp32 products in another order: 1e-5 of losses near 1
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert count == right


@pytest.mark.parametrize("packing", [False, True])
def test_gradients_are_transformers(tiny_dir, tmp_path, packing):
    """PEFT on a ForSequenceClassification has the same gradients of the head, and of A and B."""
    import peft
    from transformers import AutoModelForSequenceClassification

    model = headed(tiny_dir)
    lk.save_adapter(model, tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_dir, num_labels=2,
                                                              pad_token_id=0)  # fmt: skip
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    rows, labels = examples([9, 5, 12, 7]), ["even", "odd", "odd", "even"]
    config = lk.TrainConfig(objective="classification", packing=packing)
    batch = collated(model, [LabelledExample(*each) for each in zip(rows, labels, strict=True)],
                     config)  # fmt: skip
    loss, _ = summed_loss(model, batch, config, None)
    (loss / 4).backward()
    ids = torch.zeros(4, 12, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
    expected = theirs(ids, attention_mask=(ids != 0).long(), labels=torch.tensor([0, 1, 1, 0])).loss
    expected.backward()
    torch.testing.assert_close(loss / 4, expected, rtol=1e-5, atol=1e-6)
    name = "model.layers.1.mlp.down_proj"
    ours = model.get_submodule(name).part_of("default").lora_B
    other = theirs.get_submodule(f"base_model.model.{name}.lora_B.default").weight
    # gradients are sums of products in fp32, in another order in each
    torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-6)
    head = theirs.base_model.model.score.modules_to_save["default"].weight
    torch.testing.assert_close(model.score.active.weight.grad, head.grad, rtol=1e-4, atol=1e-6)


# ---- runs ----


def run(tiny_dir, tok, out, rows, model, **options):
    config = lk.TrainConfig(
        **{"output_dir": str(out), "max_steps": 4, "learning_rate": 1e-2, **options}
    )
    return lk.train(model, tok, rows, config)


def test_a_run_learns_classes_and_says_how_well(tiny_dir, tok, tmp_path):
    model = headed(tiny_dir)
    result = run(tiny_dir, tok, tmp_path, {"train": TEXTS, "validation": TEXTS}, model,
                 objective="classification", max_steps=40, packing=True)  # fmt: skip
    [last] = result.evaluations
    assert last["loss"] < 0.5 < math.log(2)  # what guessing costs
    assert last["accuracy"] > 0.8
    assert lk.evaluate(model, tok, TEXTS) == {k: v for k, v in last.items() if k != "step"}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["eval_accuracy"] == last["accuracy"]
    assert json.loads((tmp_path / "labels.json").read_text())["id2label"] == {"0": "even",
                                                                            "1": "odd"}  # fmt: skip
    again = lk.load_model(tiny_dir, dtype="float32", classifier=lk.read_classifier(tmp_path))
    lk.load_adapter(again, tmp_path)
    assert lk.evaluate(again, tok, TEXTS) == lk.evaluate(model, tok, TEXTS)
    said = lk.predict(again, tok, [row["text"] for row in TEXTS])
    right = [each.label == row["label"] for each, row in zip(said, TEXTS, strict=True)]
    assert sum(right) / len(right) == last["accuracy"]


def test_a_run_learns_numbers(tiny_dir, tok, tmp_path):
    head = lk.classifier_of([row["label"] for row in NUMBERS])
    assert head.regression
    model = headed(tiny_dir, head.labels, problem_type="regression")
    before = lk.evaluate(model, tok, NUMBERS)["loss"]
    run(tiny_dir, tok, tmp_path, NUMBERS, model, objective="classification", max_steps=20)
    after = lk.evaluate(model, tok, NUMBERS)
    assert after["loss"] < before / 2
    assert after["pearson"] > 0.5
    [one] = lk.predict(model, tok, [NUMBERS[0]])
    assert (one.label, one.scores) == (None, {})


def test_a_run_learns_which_answer_is_better(tiny_dir, tok, tmp_path):
    model = headed(tiny_dir, ["LABEL_0"])
    result = run(tiny_dir, tok, tmp_path, {"train": PAIRS, "validation": PAIRS}, model,
                 objective="reward", max_steps=10, packing=True)  # fmt: skip
    [last] = result.evaluations
    assert last["preference_accuracy"] > 0.9
    assert last["reward_margin"] > 0
    assert lk.read_classifier(tmp_path).rewards
    assert lk.evaluate(model, tok, PAIRS) == {k: v for k, v in last.items() if k != "step"}


@pytest.mark.parametrize("objective", ["classification", "reward"])
def test_a_run_goes_on_to_the_same_bytes(tiny_dir, tok, tmp_path, objective):
    rows, labels = (TEXTS, ("even", "odd")) if objective == "classification" else (PAIRS, ("x",))
    options = {"objective": objective, "save_steps": 2}
    run(tiny_dir, tok, tmp_path, rows, headed(tiny_dir, labels), **options)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "checkpoint-4")
    (tmp_path / "adapter_model.safetensors").unlink()
    run(tiny_dir, tok, tmp_path, rows, headed(tiny_dir, labels), **options, resume="auto")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == whole


def test_the_model_itself_is_trained_and_saved_with_its_head(tiny_dir, tok, tmp_path):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    head = lk.ClassifierConfig(labels=["even", "odd"])
    model = lk.load_model(tiny_dir, dtype="float32", classifier=head)
    run(tiny_dir, tok, tmp_path, TEXTS, model, objective="classification", train="full")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(theirs.score.weight, model.score.weight)
    assert theirs.config.id2label == {0: "even", 1: "odd"}


@pytest.mark.parametrize(
    ("rows", "labels", "options", "message"),
    [
        (TEXTS, ("even", "odd"), {"objective": "sft"}, "the model has a head for classes"),
        (PAIRS, ("even", "odd"), {"objective": "reward"}, "needs a head of one output"),
        (TEXTS, ("a", "b"), {"objective": "classification"}, "row 0: the label 'even' is none"),
        (PAIRS, ("a", "b"), {"objective": "classification"}, "field 'label' is missing"),
        (TEXTS, ("x",), {"objective": "classification"}, "'even' is no number"),
        (NUMBERS, ("x",), {"objective": "classification", "label_smoothing_factor": 0.1},
         "does not go with labels that are numbers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_first_step(
    tiny_dir, tok, tmp_path, rows, labels, options, message
):
    with pytest.raises(lk.LorakitError, match=message):
        run(tiny_dir, tok, tmp_path / "out", rows, headed(tiny_dir, labels), **options)
    assert not (tmp_path / "out").exists()


def test_a_language_model_has_no_head_to_train(tiny_dir, tok, tmp_path):
    model = lk.attach(lk.load_model(tiny_dir, dtype="float32"))
    with pytest.raises(lk.LorakitError, match="a head for classes is wanted"):
        run(tiny_dir, tok, tmp_path, TEXTS, model, objective="classification")
