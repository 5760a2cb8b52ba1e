"""The reference of DPO against a deep copy of the model, taken before the run."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

import lorakit as lk
from lorakit.data.batching import Order
from lorakit.files.safetensors import open_safetensors
from lorakit.training import state as run_state
from tests.conftest import ROWS
from tests.training.runs import ADAPTER, PAIRS, same_tensors

OPTIONS = {
    "objective": "dpo", "max_steps": 3, "learning_rate": 1e-2, "beta": 0.3,
    "per_device_train_batch_size": 4, "max_seq_length": 64, "save_steps": 1, "save_total_limit": 9,
}  # fmt: skip


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def moved(model):
    """Move all that trains as training would, with other numbers than any start has."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)


def attached(config, change=None):
    def start(model, tok, tmp_path):
        torch.manual_seed(0)
        lk.attach(model, config)
        if change is not None:
            change(model)

    return start


def trained(model, tok, tmp_path):
    """An adapter that has learned the answers in an earlier run."""
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8))
    first = lk.TrainConfig(str(tmp_path / "sft"), max_steps=6, learning_rate=3e-2)
    lk.train(model, tok, ROWS, first)


def loaded(model, tok, tmp_path):
    trained(model, tok, tmp_path)
    lk.detach(model)
    lk.load_adapter(model, tmp_path / "sft")


def among_others(model, tok, tmp_path):
    """A trained adapter beside two others, one of which was attached later."""
    for name in ("first", "second", "third"):
        torch.manual_seed(0)
        lk.attach(model, lk.LoraConfig(r=2), name=name)
        moved(model)
    lk.set_adapter(model, "second")


STARTS = {
    "fresh": attached(lk.LoraConfig(r=4)),
    "random B": attached(lk.LoraConfig(r=4, init_lora_weights=False)),
    "trained": trained,
    "loaded": loaded,
    "several": among_others,
    "pissa": attached(lk.LoraConfig(r=4, init_lora_weights="pissa")),
    "pissa moved": attached(lk.LoraConfig(r=4, init_lora_weights="pissa"), moved),
    "loftq": attached(lk.LoraConfig(r=4, init_lora_weights="loftq")),
    "dora": attached(lk.LoraConfig(r=4, use_dora=True)),
    "dora moved": attached(lk.LoraConfig(r=4, use_dora=True), moved),
    "all else of LoRA": attached(
        lk.LoraConfig(
            r=4, bias="all", modules_to_save=["norm"], trainable_token_indices=[5, 7, 9]
        ),
        moved,
    ),
    "embedding": attached(
        lk.LoraConfig(
            r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True
        ),
        moved,
    ),
    "ia3": attached(lk.IA3Config(), moved),
    "vera": attached(lk.VeraConfig(r=8), moved),
    "miss": attached(lk.MissConfig(r=8), moved),
    "adalora": attached(lk.AdaLoraConfig(total_step=10, init_r=4, target_r=2), moved),
    "prompt": attached(lk.PromptTuningConfig(num_virtual_tokens=3)),
    "p-tuning": attached(lk.PromptEncoderConfig(num_virtual_tokens=3)),
    "prefix": attached(lk.PrefixTuningConfig(num_virtual_tokens=3)),
}  # fmt: skip
PACKED = ("fresh", "trained", "loaded", "several", "pissa", "dora moved")  # prompts take no packing


def log_p(model, answer):
    """log p of a completion, from the logits of the row alone, summed in fp64."""
    ids = torch.tensor([answer.input_ids])
    with torch.no_grad():
        found = model(ids)[0, :-1].double().log_softmax(-1)
    labels = torch.tensor(answer.labels[1:])
    real = labels != -100
    return found[real].gather(-1, labels[real, None]).sum().item()


def true_loss(policy, reference, pairs, beta):
    policy = copy.deepcopy(policy).eval()
    margins = []
    for pair in pairs:
        chosen, rejected = (log_p(policy, each) - log_p(reference, each) for each in pair.answers)
        margins.append(chosen - rejected)
    return F.softplus(-beta * torch.tensor(margins, dtype=torch.float64)).mean().item()


@pytest.mark.parametrize(
    ("start", "packing"), [*((name, False) for name in STARTS), *((name, True) for name in PACKED)]
)
def test_every_step_compares_with_the_model_before_the_first(
    tiny_dir, tok, tmp_path, start, packing
):
    """The first loss is ln 2, and later ones are those against a deep copy of that model."""
    quantize = "nf4" if start == "loftq" else None
    model = lk.load_model(tiny_dir, dtype="float32", quantize=quantize)
    STARTS[start](model, tok, tmp_path)
    if start == "loftq":
        lk.loftq(model)
    before = copy.deepcopy(model).eval()
    config = lk.TrainConfig(str(tmp_path / "dpo"), packing=packing, **OPTIONS)
    examples = lk.encode_rows(lk.read_rows(PAIRS), tok, max_seq_length=64)
    order, truth = Order(examples, config), []

    def note():
        step = len(truth) + 2
        if step <= 3:
            pairs = [examples[i] for rows in order.step(step) for i in rows]
            truth.append(true_loss(model, before, pairs, config.beta))

    lk.train(model, tok, PAIRS, config, after_step=note)
    first, *later = losses(tmp_path / "dpo")
    assert abs(first - math.log(2)) <= 1e-6
    assert later == pytest.approx(truth, abs=1e-5)  # fp32 sums of log-probabilities
    assert all(abs(loss - math.log(2)) > 1e-4 for loss in truth)  # the model has moved


def test_the_first_loss_in_bfloat16(tiny_dir, tok, tmp_path):
    """The reference rounds as the policy does; a fresh DoRA rounds otherwise than its base."""
    model = lk.load_model(tiny_dir, dtype="bfloat16")
    STARTS["dora"](model, tok, tmp_path)
    lk.train(model, tok, PAIRS, lk.TrainConfig(str(tmp_path / "dpo"), **OPTIONS))
    assert abs(losses(tmp_path / "dpo")[0] - math.log(2)) <= 1e-6


def test_an_evaluation_compares_with_the_same_reference(tiny_dir, tok, tmp_path):
    model = lk.load_model(tiny_dir, dtype="float32")
    loaded(model, tok, tmp_path)
    before = copy.deepcopy(model).eval()
    config = lk.TrainConfig(str(tmp_path / "dpo"), **OPTIONS, eval_steps=3)
    result = lk.train(model, tok, {"train": PAIRS, "validation": PAIRS[:5]}, config)
    examples = lk.encode_rows(lk.read_rows(PAIRS[:5]), tok, max_seq_length=64)
    truth = true_loss(model, before, examples, config.beta)
    # fp32 sums of log-probabilities
    assert result.evaluations[-1]["loss"] == pytest.approx(truth, abs=1e-5)


def dpo(tiny_dir, tok, tmp_path, out, start="loaded", **options):
    """A run that goes on from a trained adapter."""
    model = lk.load_model(tiny_dir, dtype="float32")
    STARTS[start](model, tok, tmp_path)
    return lk.train(
        model, tok, PAIRS, lk.TrainConfig(**OPTIONS | {"output_dir": str(out), **options})
    )


def test_a_resumed_run_has_the_reference_of_its_first_step(tiny_dir, tok, tmp_path):
    """It ends with the bytes of the run that was not cut short, also if the adapter that it is
    given this time has other values.
    """
    dpo(tiny_dir, tok, tmp_path, tmp_path / "whole", max_steps=5)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    options = {"max_steps": 5, "resume": checkpoint}
    dpo(tiny_dir, tok, tmp_path, tmp_path / "again", **options)
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")[2:]
    for name in ("checkpoint-3", "checkpoint-5"):
        assert same_tensors(tmp_path / "whole" / name, tmp_path / "again" / name)
    model = lk.load_model(tiny_dir, dtype="float32")
    lk.load_adapter(model, tmp_path / "sft")
    moved(model)
    config = lk.TrainConfig(**OPTIONS | {"output_dir": str(tmp_path / "moved"), **options})
    lk.train(model, tok, PAIRS, config)
    ours, theirs = ((tmp_path / name / ADAPTER).read_bytes() for name in ("whole", "moved"))
    assert ours == theirs


def without_reference(checkpoint, value):
    """Take the reference out of a checkpoint, and say in it `value` of whether it has one."""
    tensors = open_safetensors(checkpoint / run_state.STATE_TENSORS)
    kept = {n: each.read().clone() for n, each in tensors.items() if not n.startswith("reference.")}
    assert len(kept) < len(tensors)
    run_state.write_safetensors(checkpoint / run_state.STATE_TENSORS, kept)
    path = checkpoint / run_state.STATE_VALUES
    values = json.loads(path.read_text())
    assert values.pop("reference") is True
    path.write_text(json.dumps(values | value))


def test_a_checkpoint_that_lost_its_reference_is_refused(tiny_dir, tok, tmp_path):
    dpo(tiny_dir, tok, tmp_path, tmp_path / "out", "fresh")
    without_reference(tmp_path / "out" / "checkpoint-3", {"reference": True})
    with pytest.raises(lk.LorakitError, match="checkpoint-3 is damaged: the reference of DPO is"):
        dpo(tiny_dir, tok, tmp_path, tmp_path / "out", "fresh", max_steps=5, resume="auto")


def test_a_run_of_lorakit_0_1_goes_on_as_it_began(tiny_dir, tok, tmp_path, capsys):
    """Its checkpoints hold no reference. It compared with the model without the adapter, and so do
    all later steps, however often the run is resumed.
    """
    out = tmp_path / "out"
    dpo(tiny_dir, tok, tmp_path, out, max_steps=1)
    without_reference(out / "checkpoint-1", {})
    base = lk.load_model(tiny_dir, dtype="float32")
    examples = lk.encode_rows(lk.read_rows(PAIRS), tok, max_seq_length=64)
    for step in (2, 3):
        policy = lk.load_model(tiny_dir, dtype="float32")
        lk.load_adapter(policy, out / f"checkpoint-{step - 1}")
        dpo(tiny_dir, tok, tmp_path, out, max_steps=step, resume="auto")
        assert "resumed with the reference of lorakit 0.1.0" in capsys.readouterr().out
        order = Order(examples, lk.TrainConfig(**OPTIONS | {"max_steps": step}))
        pairs = [examples[i] for rows in order.step(step) for i in rows]
        truth = true_loss(policy, base, pairs, OPTIONS["beta"])
        assert losses(out)[-1] == pytest.approx(truth, abs=1e-5)  # fp32 sums


def batch_of(pairs, tok):
    examples = lk.encode_rows(lk.read_rows(pairs), tok, max_seq_length=64)
    rows = [each.answers[i] for i in (0, 1) for each in examples]
    width = max(len(row.input_ids) for row in rows)
    padded = [
        (row.input_ids + [0] * (width - len(row.input_ids)),
         row.labels + [-100] * (width - len(row.labels)))
        for row in rows
    ]  # fmt: skip
    return [torch.tensor(each) for each in zip(*padded, strict=True)]


def test_a_graph_from_before_the_reference_goes_backward_after_it(tiny_dir, tok, tmp_path):
    """Two batches in one graph give the sum of their gradients, and the values stay as they are."""
    model = lk.load_model(tiny_dir, dtype="float32")
    loaded(model, tok, tmp_path)
    reference = lk.Reference(model)
    moved(model)
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    batches = [batch_of(PAIRS[:2], tok), batch_of(PAIRS[2:5], tok)]

    def loss(ids, labels):
        options = {"objective": "dpo", "beta": 0.3, "reference": reference}
        return lk.pair_losses(model, ids, labels, **options)[0].sum()

    for each in batches:
        loss(*each).backward()
    apart = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    sum(loss(*each) for each in batches).backward()
    for name, p in model.named_parameters():
        assert torch.equal(p, values[name])
        if p.requires_grad:  # fp32, added in another order
            torch.testing.assert_close(p.grad, apart[name], rtol=1e-5, atol=1e-7)


def test_the_reference_is_left_on_an_error_too(tiny_dir, tok, tmp_path):
    model = lk.load_model(tiny_dir, dtype="float32")
    STARTS["dora"](model, tok, tmp_path)
    reference = lk.Reference(model)
    moved(model)
    model.train()
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.full((2, 4), 300)  # no token of this model
    with pytest.raises(IndexError):
        lk.pair_losses(model, ids, ids, objective="dpo", beta=0.1, reference=reference)
    assert model.training
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())


def test_what_trains_beside_the_adapter_belongs_to_the_reference(tiny_dir, tok, tmp_path):
    """A loop of one's own may train the base too."""
    model = lk.load_model(tiny_dir, dtype="float32")
    STARTS["fresh"](model, tok, tmp_path)
    model.model.norm.weight.requires_grad_(True)
    before, reference = copy.deepcopy(model), lk.Reference(model)
    moved(model)
    ids, labels = batch_of(PAIRS[:2], tok)
    found, _ = lk.pair_losses(model, ids, labels, objective="dpo", beta=0.3, reference=reference)
    examples = lk.encode_rows(lk.read_rows(PAIRS[:2]), tok, max_seq_length=64)
    # fp32 sums of log-probabilities
    assert found.mean().item() == pytest.approx(true_loss(model, before, examples, 0.3), abs=1e-5)


def test_a_model_in_which_nothing_trains_has_no_reference(tiny_dir):
    model = lk.load_model(tiny_dir, dtype="float32").requires_grad_(False)
    with pytest.raises(lk.LorakitError, match="nothing in the model trains"):
        lk.Reference(model)
