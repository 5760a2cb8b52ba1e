"""AdamW against torch's, its determinism, and the groups of parameters that it trains."""

import io
import itertools
import subprocess
import sys

import pytest
import torch

import lorakit as lk
from lorakit.kernels.ops.adamw.remainder import joined
from tests.conftest import ROWS

SMALL = [(3, 4), (5,), ()]
MIXED = [(64, 65), (5,), (4096,), (4095,)]  # with 8-bit state, and too small for it


def run(optimizer_class, steps=20, shapes=SMALL, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    optimizer = optimizer_class(params, lr=0.05, weight_decay=0.1, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params, optimizer


def test_equals_torch():
    ours, _ = run(lk.optim.AdamW, betas=(0.8, 0.95), eps=1e-6)
    theirs, _ = run(torch.optim.AdamW, betas=(0.8, 0.95), eps=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)  # 20 steps of fp32 roundings


@pytest.mark.parametrize("paged", [False, True])
def test_equals_torch_over_100_steps(paged):
    """They are within 1e-6 of a tensor's largest value, as one that crosses 0 has no such digits.
    In 100 steps of size 0.05 each rounding is 2^-24 of a value of 3, and they do not add up in one
    direction.
    """
    shapes = [*SMALL, (300, 70)]
    ours, optimizer = run(lk.optim.AdamW, steps=100, shapes=shapes, paged=paged)
    theirs, peer = run(torch.optim.AdamW, steps=100, shapes=shapes)
    state = optimizer.state_dict()["state"]
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()
        for name in ("exp_avg", "exp_avg_sq"):
            m = peer.state[b][name]
            assert (state[i][name] - m).abs().max() <= 1e-6 * m.abs().max()


def test_a_gradient_of_other_strides_is_the_same_gradient():
    """And the same bits, by the same kernel."""
    found = []
    for strided in (False, True):
        p = torch.nn.Parameter(torch.ones(30, 40))
        optimizer = lk.optim.AdamW([p], lr=0.1)
        for t in range(3):
            g = torch.randn(40, 30, generator=torch.Generator().manual_seed(t)).t()
            p.grad = g if strided else g.contiguous()
            optimizer.step()
        found.append(p.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_parameter_has_the_same_bits_in_any_company(bits):
    """One in bf16 takes the reference, and alone."""
    alone, _ = run(lk.optim.AdamW, shapes=[(64, 65)], state_bits=bits)
    params = [torch.nn.Parameter(alone[0].detach().clone()) for _ in range(2)]
    other = torch.nn.Parameter(torch.ones(64, 65, dtype=torch.bfloat16))
    pair = lk.optim.AdamW([params[0], other], lr=0.05, state_bits=bits)
    single = lk.optim.AdamW([params[1]], lr=0.05, state_bits=bits)
    for t in range(5):
        g = torch.randn(64, 65, generator=torch.Generator().manual_seed(t))
        params[0].grad, params[1].grad, other.grad = g, g.clone(), g.bfloat16()
        pair.step()
        single.step()
    assert torch.equal(*params)
    assert other.isfinite().all()
    assert (other != 1).any()


def test_same_bits_twice():
    for a, b in zip(run(lk.optim.AdamW)[0], run(lk.optim.AdamW)[0], strict=True):
        assert torch.equal(a, b)


def test_state_dict_continues():
    straight, _ = run(lk.optim.AdamW, steps=8)
    params, optimizer = run(lk.optim.AdamW, steps=5)
    resumed = lk.optim.AdamW(params, lr=0.05, weight_decay=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        grads = [torch.randn(p.shape, generator=generator) for p in params]
        if step >= 5:
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            resumed.step()
    for a, b in zip(straight, params, strict=True):
        assert torch.equal(a, b)


def test_8_bit_state_is_that_of_large_tensors():
    params, optimizer = run(lk.optim.AdamW, steps=1, shapes=MIXED, state_bits=8)
    for p in params:
        state = optimizer.state[p]
        if p.numel() < 4096:
            assert {name: t.dtype for name, t in state.items()} == {
                "exp_avg": torch.float32,
                "exp_avg_sq": torch.float32,
            }
            continue
        blocks = -(-p.numel() // 256)
        for name in ("exp_avg", "exp_avg_sq"):
            codes, absmax = state[name], state[f"{name}_absmax"]
            assert (codes.dtype, codes.shape) == (torch.uint8, (p.numel(),))
            assert (absmax.dtype, absmax.shape) == (torch.float32, (blocks,))
        assert sum(t.nbytes for t in state.values()) < 2.04 * p.numel()
    _, whole = run(lk.optim.AdamW, steps=1, shapes=MIXED)
    for p, q in zip(params, whole.param_groups[0]["params"], strict=True):
        # in the first step m and v have not been rounded yet; the operations are in another order
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
def test_resumes_from_a_file_with_the_same_bits(bits, dtype):
    """torch's load_state_dict would cast the state, codes too, to the dtype of the parameter."""
    generator = torch.Generator().manual_seed(1)
    gradients = [[torch.randn(s, generator=generator) for s in MIXED] for _ in range(5)]

    def start():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in MIXED]
        return params, lk.optim.AdamW(params, lr=0.05, state_bits=bits)

    def go(params, optimizer, steps):
        for grads in gradients[steps]:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(dtype)
            optimizer.step()

    straight, reached = start()
    go(straight, reached, slice(5))
    params, optimizer = start()
    go(params, optimizer, slice(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, resumed = start()
    for p, q in zip(again, params, strict=True):
        p.data.copy_(q)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    go(again, resumed, slice(3, 5))
    for p, q in zip(straight, again, strict=True):
        assert torch.equal(p, q)
        for name, expected in reached.state[p].items():
            assert resumed.state[q][name].dtype == expected.dtype
            assert torch.equal(resumed.state[q][name], expected)


@pytest.mark.parametrize("paged", [False, True])
def test_state_of_0_1_has_no_remainder(paged):
    """That of a bfloat16 parameter is then 0, and the next step is that of the parameter itself."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 300).bfloat16())
    state = {"exp_avg": torch.zeros(300), "exp_avg_sq": torch.zeros(300)}
    optimizer = lk.optim.AdamW([p], lr=1e-5, paged=paged)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
    assert not optimizer.state_dict()["state"][0]["remainder"].any()
    wide = torch.nn.Parameter(p.detach().float())
    p.grad, wide.grad = torch.ones(300).bfloat16(), torch.ones(300)
    optimizer.step()
    lk.optim.AdamW([wide], lr=1e-5).step()
    remainder = optimizer.state_dict()["state"][0]["remainder"]
    assert torch.equal(joined(p, remainder), wide)


def test_a_group_of_its_own():
    wide, narrow = (torch.nn.Parameter(torch.ones(5000)) for _ in range(2))
    groups = [{"params": [wide], "state_bits": 32}, {"params": [narrow]}]
    optimizer = lk.optim.AdamW(groups, state_bits=8)
    for p in (wide, narrow):
        p.grad = torch.ones(5000)
    optimizer.step()
    assert optimizer.state[wide]["exp_avg"].dtype == torch.float32
    assert optimizer.state[narrow]["exp_avg"].dtype == torch.uint8


def test_8_bit_state_learns_like_torchs():
    """A regression with noise, 100 steps: every loss within 1 % (bitsandbytes: 0.4 %, as ours)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    y = x @ torch.randn(64, 80, generator=generator)
    y += 3 * torch.randn(512, 80, generator=generator)
    curves = []
    for optimizer_class in (torch.optim.AdamW, lk.optim.AdamW):
        weight = torch.nn.Parameter(torch.zeros(64, 80))
        bits = {"state_bits": 8} if optimizer_class is lk.optim.AdamW else {}
        optimizer = optimizer_class([weight], lr=0.05, weight_decay=0.01, **bits)
        losses = []
        for rows in itertools.islice(itertools.cycle(torch.arange(512).split(128)), 100):
            optimizer.zero_grad()
            loss = (x[rows] @ weight - y[rows]).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < 0.2 * curves[0][0]
    assert ((curves[1] - curves[0]).abs() / curves[0]).max() < 0.01


def test_finds_a_minimum():
    x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = lk.optim.AdamW([x], lr=0.1, weight_decay=0.0)
    for _ in range(300):
        optimizer.zero_grad()
        (x - torch.tensor([1.0, 1.0])).square().sum().backward()
        optimizer.step()
    assert (x - 1).abs().max() < 1e-2


def test_refuses_bad_options():
    with pytest.raises(lk.LorakitError, match="betas"):
        lk.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], betas=(1.0, 0.9))
    with pytest.raises(lk.LorakitError, match="state_bits is 16; it must be 32 or 8"):
        lk.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], state_bits=16)
    with pytest.raises(lk.LorakitError, match="choose adamw_torch, adamw_8bit, paged"):
        lk.TrainConfig(optim="sgd")


def test_training_takes_the_state_from_the_config(tiny_dir, tmp_path, monkeypatch):
    chosen = []

    class Noted(lk.optim.AdamW):
        def __init__(self, params, **options):
            chosen.append((options["state_bits"], options["paged"]))
            super().__init__(params, **options)

    monkeypatch.setattr("lorakit.training.stepping.AdamW", Noted)
    adapters = []
    for optim in ("adamw_torch", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit"):
        torch.manual_seed(0)
        model = lk.attach(lk.load_model(tiny_dir, dtype="float32"), lk.LoraConfig(r=4))
        config = lk.TrainConfig(output_dir=str(tmp_path), max_steps=3, optim=optim)
        lk.train(model, lk.load_tokenizer(tiny_dir), ROWS, config)
        adapters.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    assert chosen == [(32, False), (32, True), (8, False), (8, True)]
    for resident, paged in (adapters[:2], adapters[2:]):
        assert all(torch.equal(a, b) for a, b in zip(resident, paged, strict=True))


def test_biases_and_norms_do_not_decay():
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)
    )
    module[2].weight.requires_grad_(False)
    decays, stays = lk.optim.decay_groups(module, 0.1, 0.01)
    assert decays == {"params": [module[0].weight], "lr": 0.1, "weight_decay": 0.01}
    flat = [module[0].bias, module[1].weight, module[1].bias, module[2].bias]
    assert (stays["lr"], stays["weight_decay"]) == (0.1, 0.0)
    assert list(map(id, stays["params"])) == list(map(id, flat))
    with pytest.raises(lk.LorakitError, match="no parameter trains"):
        lk.optim.decay_groups(module.requires_grad_(False), 0.1, 0.01)


def test_a_step_does_not_import_torchs_compiler():
    """Which torch's own methods would: seconds, and 150 MB."""
    code = (
        "import sys, torch, lorakit as lk; p = torch.nn.Parameter(torch.ones(3));"
        "optimizer = lk.optim.AdamW([p]); p.grad = torch.ones(3); optimizer.step();"
        "optimizer.zero_grad(set_to_none=True); assert p.grad is None;"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
