"""Distillation against TRL's and torch's own functions, in fp64, on models and as runs."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers
from lorakit.models import label_logits
from lorakit.training.losses import teacher as teachers
from lorakit.training.losses.teacher import TaughtBatch, Teacher, taught_loss
from tests.conftest import ROWS
from tests.training.runs import ADAPTER, PAIRS, adapted, run

BETAS = [0.0, 0.3, 1.0]
IDS = torch.arange(36).view(3, 12) * 5 % 300
LABELS = IDS.masked_fill(torch.arange(12) < 4, -100)


def logits(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_trls(beta, temperature):
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student, teacher = logits(0, 2, 5, 40).double(), logits(1, 2, 5, 40).double()
    options = {"beta": beta, "temperature": temperature}
    ours = lk.distillation_loss(student, teacher, **options)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, **options, reduction="sum")
    assert ours.shape == (2, 5)
    assert abs(ours.sum() - theirs) <= 1e-12 * theirs  # fp64 sums in another order
    rough = lk.distillation_loss(student.float(), teacher.float(), **options)
    assert (rough - ours).abs().max() <= 1e-5  # fp32 roundings of logits up to 10


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_are_finite_differences(beta):
    student = logits(0, 3, 9).double().requires_grad_()
    teacher = logits(1, 3, 9).double()
    best = (teacher / 1.5).log_softmax(-1).topk(4)
    others = 1 - best.values.exp().sum(-1, keepdim=True)
    known = torch.cat([best.values, others.log()], dim=-1)
    options = {"beta": beta, "temperature": 1.5}
    assert torch.autograd.gradcheck(
        lambda z: lk.distillation_loss(z, teacher, **options), (student,)
    )
    assert torch.autograd.gradcheck(
        lambda z: lk.top_k_distillation_loss(z, best.indices, known, **options), (student,)
    )


@given(
    k=st.integers(1, 12),
    beta=st.sampled_from(BETAS),
    temperature=st.floats(0.3, 5),
    seed=st.integers(0, 99),
)
def test_fewer_tokens_never_tell_more(k, beta, temperature, seed):
    """The divergence of all tokens is the whole one, of fewer at most that, and never below 0."""
    student, teacher = logits(seed, 4, 12).double(), logits(seed + 100, 4, 12).double()
    options = {"beta": beta, "temperature": temperature}
    whole = lk.distillation_loss(student, teacher, **options)
    all_known = (teacher / temperature).log_softmax(-1)
    best = all_known.topk(k)
    known = best.values
    if k < 12:
        others = all_known.scatter(-1, best.indices, -math.inf).logsumexp(-1, keepdim=True)
        known = torch.cat([known, others], dim=-1)
    found = lk.top_k_distillation_loss(student, best.indices, known, **options)
    assert (found >= -1e-12).all()
    assert (found <= whole + 1e-12).all()  # of fp64 sums
    if k == 12:
        assert torch.allclose(found, whole, rtol=1e-10)


def two_models(tiny_dir):
    """A model that learns, and a teacher: another adapter of the same base."""
    models = []
    for seed in (1, 2):
        model = adapted(tiny_dir)
        torch.manual_seed(seed)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, 0, 0.1)
        models.append(model)
    return models


@pytest.mark.parametrize(("beta", "alpha"), [(0.0, 0.0), (0.3, 0.25), (1.0, 0.0)])
@pytest.mark.parametrize("packed", [False, True])
def test_distillation_on_a_model(tiny_dir, monkeypatch, beta, alpha, packed):
    """Loss and gradients are those of whole logits, of which five rows exist at a time."""
    model, teacher = two_models(tiny_dir)
    settings = lk.DistillationConfig("t", beta=beta, temperature=2.0, alpha=alpha)
    q, p = model(IDS)[:, 3:-1], teacher(IDS)[:, 3:-1].detach()
    truth = lk.distillation_loss(q.double(), p.double(), beta=beta, temperature=2.0).sum()
    nll = F.cross_entropy(q.double().flatten(0, 1), IDS[:, 4:].flatten(), reduction="sum")
    mixed = (1 - alpha) * truth + alpha * nll
    params = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(mixed, params)
    batch = [IDS, LABELS]
    rows = {"attention_mask": None, "cu_seqlens": None}
    if packed:
        batch = [x.reshape(1, -1) for x in batch]
        rows["cu_seqlens"] = torch.arange(0, 37, 12)
    monkeypatch.setattr(label_logits, "chunk_rows", lambda *_: 5)
    at_a_time = []

    def of_chunk(student, teacher, **options):
        at_a_time.append((len(student), len(teacher)))
        return lk.distillation_loss(student, teacher, **options)

    monkeypatch.setattr(teachers, "distillation_loss", of_chunk)
    taught = TaughtBatch([])
    loss = taught_loss(model, *batch, rows, taught, Teacher(settings, teacher))
    found = torch.autograd.grad(loss / 7, params)
    assert at_a_time == [(5, 5)] * 4 + [(4, 4)]
    # fp32: products of 64 terms, and a sum of 24 divergences
    assert abs(loss - mixed) <= 1e-5 * mixed
    assert taught.told.read() == pytest.approx([truth.item(), nll.item(), 24], rel=1e-5)
    scale = max(g.abs().max() for g in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (7 * ours - theirs).abs().max() <= 2e-5 * scale


def test_a_trained_head_gets_its_gradient(tiny_dir, monkeypatch):
    """The head is trained whole, by chunks; the truth is torch's own gradient."""
    model = lk.load_model(tiny_dir, dtype="float32")
    _, teacher = two_models(tiny_dir)
    settings = lk.DistillationConfig("t")
    truth = lk.distillation_loss(model(IDS)[:, 3:-1], teacher(IDS)[:, 3:-1].detach()).sum()
    head = next(model.whole_head().__enter__().layer.parameters())
    (expected,) = torch.autograd.grad(truth, [head])
    monkeypatch.setattr(label_logits, "chunk_rows", lambda *_: 7)
    rows = {"attention_mask": None, "cu_seqlens": None}
    loss = taught_loss(model, IDS, LABELS, rows, TaughtBatch([]), Teacher(settings, teacher))
    (found,) = torch.autograd.grad(loss, [head])
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()  # fp32 sums of chunks


def test_runs_from_a_model_and_from_its_file_are_the_same(tiny_dir, tok, tmp_path):
    """The file has all tokens; the run goes on from a checkpoint with the same bytes."""
    _, teacher = two_models(tiny_dir)
    file, data = tmp_path / "teacher.safetensors", {"train": ROWS[:12], "validation": ROWS[:4]}
    examples = [lk.encode_rows(rows, tok, max_seq_length=64) for rows in data.values()]
    lk.save_teacher_logits(teacher, examples, file, top_k=10**6, temperature=2.0)
    options = {"objective": "distillation", "max_steps": 4, "packing": True, "max_seq_length": 64}
    options |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    shared = {"beta": 0.5, "temperature": 2.0, "alpha": 0.2}
    losses = []
    for settings in ({"teacher": "t"}, {"logits": str(file)}):
        name = tmp_path / next(iter(settings))
        model = adapted(tiny_dir)
        distillation = lk.DistillationConfig(**settings, **shared)
        config = lk.TrainConfig(
            str(name), **options, distillation=distillation, learning_rate=1e-2, save_steps=2
        )
        given = teacher if "teacher" in settings else None
        result = lk.train(model, tok, data, config, teacher=given)
        lines = [json.loads(line) for line in (name / "metrics.jsonl").open()]
        steps = [line for line in lines if "divergence" in line]
        losses.append([*(line["loss"] for line in steps), result.evaluations[-1]["loss"]])
        for line in steps:
            mixed = 0.8 * line["divergence"] + 0.2 * line["nll"]
            assert line["loss"] == pytest.approx(mixed, rel=1e-5)
    # the file leaves out rows of the embedding that are no token
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0][-2] < losses[0][0]
    half = tmp_path / "half"
    for end in (2, 4):
        model = adapted(tiny_dir)
        config = lk.TrainConfig(
            str(half), **options, distillation=distillation,
            learning_rate=1e-2, save_steps=2, resume="auto",
        )  # fmt: skip
        if end == 2:
            steps = iter(range(2))
            with pytest.raises(StopIteration):
                lk.train(model, tok, data, config, after_step=lambda steps=steps: next(steps))
        else:
            lk.train(model, tok, data, config)
    assert (half / ADAPTER).read_bytes() == (tmp_path / "logits" / ADAPTER).read_bytes()


def test_the_model_itself_teaches(tiny_dir, tok, tmp_path):
    """The first divergence is exactly 0, and the loss is the share of the labels'."""
    options = {"objective": "distillation", "max_steps": 3, "save_steps": 2}
    settings = lk.DistillationConfig(alpha=0.5)
    run(tiny_dir, tok, tmp_path, **options, distillation=settings)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert steps[0]["divergence"] == 0
    assert steps[0]["loss"] == pytest.approx(0.5 * steps[0]["nll"], rel=1e-6)
    assert steps[2]["divergence"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "distillation learns nothing from the model itself: name a teacher, or logits, or "
         "give the labels a share of the loss (alpha)"),
        ({"quantize": "nf4", "alpha": 0.5}, "quantize in distillation is about the teacher: name "
         "one"),
        ({"teacher": "t", "beta": 1.5}, "beta is 1.5; it must be in [0, 1]"),
        ({"teacher": "t", "temperature": 0.0}, "temperature must be positive, not 0.0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(lk.LorakitError) as caught:
        lk.TrainConfig(objective="distillation", distillation=lk.DistillationConfig(**settings))
    assert str(caught.value) == message


def test_mapping_and_objective_belong_together():
    with pytest.raises(lk.LorakitError, match="has its settings in a mapping `distillation`"):
        lk.TrainConfig(objective="distillation")
    with pytest.raises(lk.LorakitError, match="has no beta .say it in distillation."):
        lk.TrainConfig(objective="distillation", distillation=lk.DistillationConfig("t"), beta=0.5)


def test_files_that_cannot_teach(tiny_dir, tok, tmp_path):
    def train(file, rows=ROWS[:3], **settings):
        distillation = lk.DistillationConfig(logits=str(file), **settings)
        run(tiny_dir, tok, tmp_path / "out", rows, objective="distillation",
            distillation=distillation, max_steps=1)  # fmt: skip

    file = tmp_path / "new" / "teacher.safetensors"
    with pytest.raises(lk.LorakitError, match="is not there; `lorakit teach run.yaml` writes it"):
        train(file)
    with pytest.raises(lk.LorakitError, match="does not hold a teacher's tokens"):
        train(next(tiny_dir.glob("*.safetensors")))
    examples = lk.encode_rows(ROWS[:3], tok, max_seq_length=1024)
    lk.save_teacher_logits(lk.load_model(tiny_dir, dtype="float32"), examples, file, top_k=5)
    train(file)
    with pytest.raises(lk.LorakitError, match="written at temperature 1, and the run has 2"):
        train(file, temperature=2.0)
    with pytest.raises(lk.LorakitError, match="2 of the training rows are not in"):
        train(file, ROWS[1:5])
    whole = load_file(file)
    for name, value, message in (
        ("vocabulary", torch.tensor(10**6), "of a vocabulary of 1000000 tokens, and the model has"),
        ("words", whole["words"] + 10**6, "is damaged: it has tokens that are none of its"),
    ):
        changed = tmp_path / f"{name}.safetensors"
        save_file({**whole, name: value}, changed)
        with pytest.raises(lk.LorakitError, match=message):
            train(changed)
    pairs = lk.encode_rows(PAIRS[:2], tok, max_seq_length=64)
    with pytest.raises(lk.LorakitError, match="give rows with one answer each"):
        lk.save_teacher_logits(lk.load_model(tiny_dir, dtype="float32"), pairs, file)


def test_teachers_that_cannot_teach(tiny_dir, tok, tmp_path):
    model = lk.load_model(tiny_dir, dtype="float32")
    with pytest.raises(lk.LorakitError, match="objective sft has no teacher"):
        lk.train(adapted(tiny_dir), tok, ROWS, lk.TrainConfig(str(tmp_path)), teacher=model)
    other = lk.load_model(tiny_dir, dtype="float32")
    other.config = lk.ModelConfig(**{**vars(other.config), "vocab_size": 20})
    settings = lk.DistillationConfig("t")
    config = lk.TrainConfig(str(tmp_path), objective="distillation", distillation=settings)
    with pytest.raises(lk.LorakitError, match="the teacher has 20 tokens: take one of the same"):
        lk.train(adapted(tiny_dir), tok, ROWS, config, teacher=other)
    student = adapted(tiny_dir)
    with pytest.raises(lk.LorakitError, match="the teacher is the model that learns"):
        lk.train(student, tok, ROWS, config, teacher=student)
    with pytest.raises(lk.LorakitError, match="t does not exist"):
        lk.plan_memory(tiny_dir, train=config, device="cpu")
