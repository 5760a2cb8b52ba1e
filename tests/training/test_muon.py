"""`optim: muon`: which parameters it moves, whole runs, resuming, and what it refuses."""

import json
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.models.decoder import Decoder
from lorakit.training import state as run_state
from lorakit.training.mode import bytes_of
from lorakit.training.muon import MOMENTUM
from tests.conftest import ROWS, TINY

OPTIONS = {"train": "full", "optim": "muon", "max_steps": 6, "max_seq_length": 64}
OPTIONS |= {"learning_rate": 1e-3, "per_device_train_batch_size": 2}


def train(directory, tok, out, dtype="float32", **options):
    model = lk.load_model(directory, dtype=dtype)
    return model, lk.train(model, tok, ROWS, lk.TrainConfig(str(out), **OPTIONS | options))


def test_moves_the_matrices_of_blocks():
    """Embedding, head, norms, router and the gate of one row are AdamW's."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    experts |= {"shared_expert_intermediate_size": 16, "model_type": "qwen2_moe"}
    model = Decoder(lk.ModelConfig.from_hf({**TINY, **experts}))
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    groups = lk.optim.muon_groups(model, 1.0, 0.1)
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: group for group in groups for p in group["params"]}
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    for name, group in found.items():
        ends = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
        ends += ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
        assert group["muon"] == name.endswith(ends), name
        assert group["weight_decay"] == (0.1 if model.get_parameter(name).dim() > 1 else 0.0)


def test_a_run_takes_the_steps_of_torchs_optimizers(tiny_dir, tok, tmp_path):
    """torch.optim.Muon and AdamW get the same clipped gradients: equal to 1e-6 after six steps.

    Torch's quintic, which it computes in bfloat16, is let compute in fp32.
    """
    model = lk.load_model(tiny_dir, dtype="float32")
    names = [name for name, _ in model.named_parameters()]
    theirs = {name: torch.nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    ours = {id(p) for g in lk.optim.muon_groups(model, 1.0, 0.0) if g["muon"] for p in g["params"]}
    of_muon = [theirs[n] for n in names if id(model.get_parameter(n)) in ours]
    others = [theirs[n] for n in names if id(model.get_parameter(n)) not in ours]
    assert of_muon
    assert others
    options = {"lr": 1e-3, "weight_decay": 0.0}
    optimizers = [
        torch.optim.Muon(of_muon, momentum=0.95, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(others, eps=1e-5, **options),
    ]

    def after_step():
        for name in names:
            theirs[name].grad = model.get_parameter(name).grad.clone()
        for each in optimizers:
            each.step()

    same = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "adam_epsilon": 1e-5}
    config = lk.TrainConfig(str(tmp_path), **OPTIONS | same)
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
        lk.train(model, tok, ROWS, config, after_step=after_step)
    before = lk.load_model(tiny_dir, dtype="float32")
    for name in names:
        p = model.get_parameter(name)
        assert (p - theirs[name]).abs().max() <= 1e-6, name
        assert (p - before.get_parameter(name)).abs().max() > 1e-4, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_bits_of_another(dtype, tiny_dir, tok, tmp_path):
    options = {"save_steps": 2, "freeze": ["norm"], "dtype": dtype}
    options |= {"lr_scheduler_type": "constant", "gradient_accumulation_steps": 2}
    train(tiny_dir, tok, tmp_path / "whole", **options)
    train(tiny_dir, tok, tmp_path / "part", **options | {"max_steps": 4})
    state = load_file(tmp_path / "part" / "checkpoint-4" / run_state.STATE_TENSORS)
    kinds = {name.rpartition(".")[2] for name in state}
    halves = {"remainder"} if dtype == "bfloat16" else set()
    assert kinds == {MOMENTUM, "exp_avg", "exp_avg_sq"} | halves
    train(tiny_dir, tok, tmp_path / "part", **options, resume="auto")
    for file in ("model.safetensors", f"checkpoint-6/{run_state.STATE_TENSORS}"):
        paths = [tmp_path / which / file for which in ("whole", "part")]
        assert paths[0].read_bytes() == paths[1].read_bytes(), file


def test_learns_in_bfloat16_as_in_float32(tiny_dir, tok, tmp_path):
    """The losses are within 2 % after 40 steps, as the model's products allow: no step is lost."""
    last = []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        train(tiny_dir, tok, out, dtype=dtype, max_steps=40)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        last.append(sum(losses[-10:]) / 10)
        assert last[-1] < 0.8 * losses[0]
    assert last[1] == pytest.approx(last[0], rel=2e-2)


def test_its_state_is_counted(tiny_dir):
    model = lk.load_model(tiny_dir, dtype="bfloat16")
    sizes = {
        optim: bytes_of(model, lk.TrainConfig(train="full", optim=optim))
        for optim in ("muon", "adamw_torch")
    }
    groups = lk.optim.muon_groups(model, 1.0, 0.0)
    moved = sum(p.numel() for group in groups if group["muon"] for p in group["params"])
    assert sizes["adamw_torch"] - sizes["muon"] == 4 * moved  # one moment less, in fp32
    config = model.config
    planned = {
        optim: lk.plan_memory(
            config,
            train=lk.TrainConfig(train="full", optim=optim),
            dtype=torch.bfloat16,
            device="cpu",
        ).resident["optimizer state"]
        for optim in ("muon", "adamw_torch")
    }
    assert planned["adamw_torch"] - planned["muon"] == pytest.approx(4 * moved, rel=0.02)


def test_refuses_what_it_cannot_move(tiny_dir, tmp_path):
    with pytest.raises(lk.LorakitError, match="optim: muon goes with train: full"):
        lk.TrainConfig(optim="muon")
    vector = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(lk.LorakitError, match=r"shape \(3,\) is no matrix"):
        lk.optim.Muon([vector])
    with pytest.raises(lk.LorakitError, match="momentum must be in"):
        lk.optim.Muon([torch.nn.Parameter(torch.ones(2, 2))], momentum=1.0)
    matrix = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = lk.optim.Muon([matrix, torch.nn.Parameter(torch.ones(2, 3))])
    matrix.grad = torch.ones(2, 2)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0][MOMENTUM] = torch.ones(3, 2)
    with pytest.raises(lk.LorakitError, match="the saved state of parameter 0"):
        lk.optim.Muon([matrix, torch.nn.Parameter(torch.ones(2, 3))]).load_state_dict(saved)
