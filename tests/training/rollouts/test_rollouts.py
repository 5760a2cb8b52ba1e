"""Runs of GRPO: what they sample, what they learn, and that they resume to the bit."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import lorakit as lk
from lorakit.evaluation.share import ALL
from lorakit.training.rollouts.rollouts import Rollouts, advantages_of
from lorakit.training.rollouts.sampler import Asked, Sampler
from lorakit.training.step import backward
from tests.training.runs import ADAPTER, adapted, same_tensors

PROMPTS = [{"prompt": f"{a} plus {b} is ", "answer": a + b} for a in range(3) for b in range(3)]
LENGTH = lk.RewardConfig("length", length=12)


def config(out, **options):
    """Return the settings of a run: two prompts a step, four completions of each."""
    grpo = {"rewards": [LENGTH], "num_generations": 4, "max_completion_length": 8}
    names = lk.GrpoConfig.__dataclass_fields__
    grpo |= {name: options.pop(name) for name in list(options) if name in names}
    common = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    return lk.TrainConfig(
        str(out), objective="grpo", grpo=lk.GrpoConfig(**grpo), **{**common, **options}
    )


def lines(out, name):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tiny_dir):
    """Return a model whose adapter changes what it says."""
    model = adapted(tiny_dir)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale):
    """The truth is the formula in numpy's fp64; a group of equal rewards has none."""
    rewards = np.array([1.0, 0.0, 0.5, 0.2, 3.0, 3.0, 3.0, 3.0])
    groups = rewards.reshape(2, 4)
    truth = groups - groups.mean(1, keepdims=True)
    spread = {"group": groups.std(1, ddof=1, keepdims=True), "batch": rewards.std(ddof=1)}
    if scale != "none":
        truth = truth / (spread[scale] + 1e-4)
    found = advantages_of(rewards.tolist(), 4, scale)
    np.testing.assert_allclose(found, truth.flatten(), atol=1e-6)
    assert found[4:] == [0.0] * 4


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_no_advantage(scale):
    """Exactly none, though fp64 rounds the mean of three of these numbers."""
    assert advantages_of([1000.1] * 3 + [1.0, 2.0, 3.0], 3, scale)[:3] == [0.0] * 3


def test_what_is_sampled_has_the_models_log_probabilities(model, tok, tmp_path):
    """They are those at the temperature, the end token included; a seed says what is drawn."""
    settings = config(tmp_path, temperature=1.5, max_completion_length=20)
    prompt = tok.encode("one two ")
    asked = [Asked(0, i, prompt) for i in range(6)]
    sampler = Sampler(model, tok, settings, len(prompt))
    found = sampler(3, asked)
    assert found == sampler(3, asked)
    assert found != sampler(4, asked)
    assert len({tuple(each.tokens) for each in found}) > 1
    for each in found:
        ids = torch.tensor([prompt + each.tokens])
        logits = model(ids)[0, len(prompt) - 1 : -1].double() / 1.5
        truth = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
        # the sampler computes token by token, in another order
        torch.testing.assert_close(torch.tensor(each.logprobs).double(), truth, rtol=0, atol=1e-4)
        assert each.truncated == (len(each.tokens) == 20 and each.tokens[-1] != tok.eos_token_id)


class Fixed:
    """Rewards that look at nothing."""

    def __init__(self, rollouts, values):
        self.values, self.total = values, rollouts.rewards.total

    def __call__(self, graded):
        return {"length": self.values}


def rollouts_of(model, tok, settings):
    examples = lk.encode_rows(PROMPTS, tok, max_seq_length=32)
    return Rollouts(model, tok, examples, settings, {}, ALL)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "cispo", "gspo"])
def test_the_gradient_is_that_of_the_formula(model, tok, tmp_path, loss_type, packing):
    """Two batches have the gradient of the formula over all logits; every ratio is exactly 1.

    There the gradient of all losses is that of the log-probability times the advantage; for cispo
    too, whose weight is 1. Sums of fp32 in another order.
    """
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings = config(tmp_path, loss_type=loss_type, packing=packing, **options)
    rollouts = rollouts_of(model, tok, settings)
    step = rollouts.prepare(1, [0, 5])
    rollout = rollouts.current
    model.zero_grad()
    model.train()
    backward(model, step, settings, None)
    model.eval()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    tokens = sum(len(each.tokens) for each in rollout.completions)
    total = torch.zeros((), dtype=torch.float64)
    for asked, each, advantage in zip(
        rollout.asked, rollout.completions, rollout.advantages, strict=True
    ):
        ids = torch.tensor([asked.prompt + each.tokens])
        logits = model(ids)[0, len(asked.prompt) - 1 : -1].double()
        logps = logits.log_softmax(-1).gather(-1, ids[0, len(asked.prompt) :, None])[:, 0]
        parts = {"dr_grpo": 8 * 8, "dapo": tokens, "cispo": tokens}
        total = total - advantage * logps.sum() / parts.get(loss_type, 8 * len(each.tokens))
    model.zero_grad()
    total.backward()
    for name, gradient in found.items():
        truth = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(gradient, truth, rtol=1e-3, atol=1e-5)
    told, completions = rollouts.told(step)
    assert told["clip_ratio"] == 0
    assert told["sampling_logp_difference_max"] < 1e-4
    assert len(completions) == 8


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "cispo", "gspo"])
def test_completions_without_an_advantage_are_not_computed(model, tok, tmp_path, loss_type):
    """The gradient is that of computing them too; sums of fp32 have another order then."""
    settings = config(tmp_path, loss_type=loss_type, packing=True)
    gradients, steps = [], []
    for everything in (False, True):
        rollouts = rollouts_of(model, tok, settings)
        rollouts.rewards = Fixed(rollouts, [0.5] * 4 + [0.0, 1.0, 0.0, 0.5])
        if everything:
            rollouts._computed = lambda rollout: list(range(8))
        step = rollouts.prepare(1, [0, 5])
        model.zero_grad()
        model.train()
        backward(model, step, settings, None)
        model.eval()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        steps.append(step)
        rows = [i for part in rollouts.current.parts for i in part]
        assert sorted(rows) == list(range(0 if everything else 4, 8))
    model.zero_grad()
    assert steps[0].count == steps[1].count
    assert steps[0].tokens < steps[1].tokens
    for few, every in zip(*gradients, strict=True):
        torch.testing.assert_close(few, every, rtol=1e-4, atol=1e-6)


def test_truncated_completions_can_be_left_out(model, tok, tmp_path):
    """Neither the loss nor what a run tells of tokens knows them. Every second one is one here."""
    settings = config(tmp_path, mask_truncated_completions=True, max_completion_length=2)
    rollouts = rollouts_of(model, tok, settings)
    sampler = rollouts.sampler

    def half_of_them(step, asked):
        return [each._replace(truncated=i % 2 == 1) for i, each in enumerate(sampler(step, asked))]

    rollouts.sampler = half_of_them
    rollouts.rewards = Fixed(rollouts, [0.0, 1.0, 2.0, 3.0] * 2)
    step = rollouts.prepare(1, [0, 1])
    whole = rollouts.current.completions[::2]
    learned = sum(len(each.tokens) for each in whole)
    assert step.count == learned
    assert sum(int(b.graded.counts.sum()) for b in rollouts.current.batches) == learned
    backward(model, step, settings, None)
    model.zero_grad()
    told, _ = rollouts.told(step)
    truth = -sum(sum(each.logprobs) for each in whole) / learned
    # the sampler's log-probabilities and the trainer's differ by roundings of fp32
    assert told["entropy"] == pytest.approx(truth, abs=1e-4)


@pytest.fixture(scope="module")
def whole(tiny_dir, tok, tmp_path_factory):
    """Return the directory of a run of which others are parts."""
    out = tmp_path_factory.mktemp("grpo")
    lk.train(adapted(tiny_dir), tok, PROMPTS, config(out, **RESUMED))
    return out


RESUMED = {"num_iterations": 2, "beta": 0.05, "save_steps": 1, "save_total_limit": 9}


@pytest.mark.parametrize("stopped", [1, 2])
def test_a_resumed_run_has_the_same_bytes(tiny_dir, tok, tmp_path, whole, stopped):
    """Also if it was stopped between two steps that learn from the same completions."""
    torch.manual_seed(7)  # of nothing that matters
    lk.train(adapted(tiny_dir), tok, PROMPTS, config(tmp_path, **RESUMED, max_steps=stopped))
    again = config(tmp_path, **RESUMED, resume="auto")
    lk.train(adapted(tiny_dir), tok, PROMPTS, again)
    assert (tmp_path / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert same_tensors(tmp_path / "checkpoint-4", whole / "checkpoint-4")
    assert lines(tmp_path, "rollouts.jsonl") == lines(whole, "rollouts.jsonl")


def test_what_a_run_tells(whole):
    steps, completions = lines(whole, "metrics.jsonl"), lines(whole, "rollouts.jsonl")
    assert [each["step"] for each in completions] == [1] * 8 + [3] * 8
    # the sampler is compared with the model that has sampled, not with the one of the second step
    assert all(step["sampling_logp_difference_max"] < 1e-4 for step in steps)
    assert "reward" not in steps[1]  # it learns from the completions of step 1
    assert [step["kl"] == 0 for step in steps] == [True, False, False, False]
    first = steps[0]
    mine = [each for each in completions if each["step"] == 1]
    rewards = np.array([each["reward"] for each in mine])
    assert abs(first["reward"] - rewards.mean()) < 1e-6
    assert abs(first["reward_std"] - rewards.reshape(2, 4).std(1, ddof=1).mean()) < 1e-6
    assert first["reward_length"] == pytest.approx(first["reward"])
    assert first["completion_length"] == np.mean([each["tokens"] for each in mine])
    assert mine[0]["prompt"] == mine[3]["prompt"] != mine[4]["prompt"]
    assert {each["row"] for each in mine} <= {f"row {i}" for i in range(9)}


def test_the_reward_rises(tiny_dir, tok, tmp_path):
    """A tiny model that says any bytes learns to say letters."""

    def letters(completions, **_):
        return [sum(c.isascii() and c.isalpha() for c in text) / 2 for text in completions]

    grpo = {"rewards": [lk.RewardConfig("letters")], "num_generations": 16}
    options = {"max_steps": 12, "learning_rate": 2e-2, "lr_scheduler_type": "constant", "seed": 1}
    options |= {"max_completion_length": 2, "per_device_train_batch_size": 32}
    settings = config(tmp_path, **grpo, **options)
    lk.train(adapted(tiny_dir), tok, PROMPTS, settings, rewards={"letters": letters})
    rewards = [step["reward"] for step in lines(tmp_path, "metrics.jsonl")]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3


def test_rewards_of_python(tiny_dir, tok, tmp_path):
    """A function that the caller gives, which sees the columns of the rows."""
    seen = []

    def mine(prompts, completions, answer):
        seen.append((prompts, answer))
        return [0.5] * len(completions)

    settings = config(tmp_path, rewards=[lk.RewardConfig("mine")], max_steps=1)
    lk.train(adapted(tiny_dir), tok, PROMPTS, settings, rewards={"mine": mine})
    [(prompts, answer)] = seen
    assert {"prompt": prompts[0], "answer": answer[0]} in PROMPTS
    [step] = lines(tmp_path, "metrics.jsonl")
    assert (step["reward"], step["frac_reward_zero_std"], step["grad_norm"]) == (0.5, 1.0, 0.0)


def once_bad(at, fault):
    """Return a reward that is as good as LENGTH, but its call number `at` has a fault."""
    calls = []

    def length(completions, **_):
        calls.append(len(completions))
        if len(calls) == at:
            fault()
        return [max(0.0, 1 - abs(len(text) - 12) / 12) for text in completions]

    return {"mine": length}


def fails():
    raise ValueError("no such answer")


def is_ended():
    """Get Ctrl-C twice, the first of which waits for the end of the step."""
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def ctrl_c():
    """Let Ctrl-C end a program, which shells take from what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (fails, lk.LorakitError, "reward mine failed with ValueError: no such answer"),
        (is_ended, KeyboardInterrupt, None),
    ],
)
def test_a_reward_that_fails_loses_no_step(tiny_dir, tok, tmp_path, capsys, fault, error, message):
    """No step has asked for a checkpoint, and the run goes on to the bytes of a whole one."""
    rewards = [lk.RewardConfig("mine")]
    whole, failed = (config(tmp_path / name, rewards=rewards) for name in ("whole", "failed"))
    lk.train(adapted(tiny_dir), tok, PROMPTS, whole, rewards=once_bad(9, fails))
    with pytest.raises(error, match=message):
        lk.train(adapted(tiny_dir), tok, PROMPTS, failed, rewards=once_bad(3, fault))
    out = tmp_path / "failed"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert {line["step"] for line in lines(out, "rollouts.jsonl")} == {1, 2}
    assert "step 2 is saved" in capsys.readouterr().out
    again = replace(failed, resume="auto")
    lk.train(adapted(tiny_dir), tok, PROMPTS, again, rewards=once_bad(9, fails))
    assert (out / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    assert lines(out, "rollouts.jsonl") == lines(tmp_path / "whole", "rollouts.jsonl")


def test_a_reward_that_fails_at_once_leaves_nothing_to_go_on_from(tiny_dir, tok, tmp_path):
    settings = config(tmp_path, rewards=[lk.RewardConfig("mine")])
    with pytest.raises(lk.LorakitError, match="reward mine failed"):
        lk.train(adapted(tiny_dir), tok, PROMPTS, settings, rewards=once_bad(1, fails))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_ctrl_c_in_a_reward_waits_for_the_step(tiny_dir, tok, tmp_path):
    settings = config(tmp_path, rewards=[lk.RewardConfig("mine")])
    rewards = once_bad(2, lambda: signal.raise_signal(signal.SIGINT))
    result = lk.train(adapted(tiny_dir), tok, PROMPTS, settings, rewards=rewards)
    assert (result.interrupted, result.steps) == (True, 2)
    assert (tmp_path / "checkpoint-2").is_dir()


def test_empty_completions(tiny_dir, tok, tmp_path):
    """A model that ends at once, whatever it draws: there is one token to learn, and no text."""
    model = adapted(tiny_dir)
    every = list(range(model.config.vocab_size))
    model.config = replace(model.config, eos_token_id=every)
    rewards = [LENGTH, lk.RewardConfig("numeric_answer"), lk.RewardConfig("regex", pattern="^$")]
    lk.train(model, tok, PROMPTS, config(tmp_path, rewards=rewards, max_steps=1))
    found = lines(tmp_path, "rollouts.jsonl")
    assert {each["completion"] for each in found} == {""}
    assert {(each["tokens"], each["truncated"]) for each in found} == {(1, False)}
    [step] = lines(tmp_path, "metrics.jsonl")
    assert step["completion_length"] == step["completion_length_max"] == 1
    assert [step[f"reward_{each.name}"] for each in rewards] == [0.0, 0.0, 1.0]
    assert (step["frac_reward_zero_std"], step["grad_norm"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grpo": None}, "objective grpo has its settings in a mapping `grpo`"),
        ({"objective": "sft"}, "objective grpo has its settings in a mapping `grpo`"),
        ({"per_device_train_batch_size": 6}, "groups of 4 completions"),
        ({"per_device_train_batch_size": "auto"}, "groups of 4 completions"),
        ({"z_loss": 0.1}, "z_loss goes with objective sft only; grpo has none"),
        (
            {"loss_type": "ipo"},
            "loss_type ipo does not go .* grpo; say that of grpo in the mapping",
        ),
        ({"beta": 0.2}, "objective grpo has no beta .say it in grpo"),
        ({"neftune_noise_alpha": 5.0}, "objective grpo has no neftune_noise_alpha"),
    ],
)
def test_settings_that_are_refused(tmp_path, options, message):
    with pytest.raises(lk.LorakitError, match=message):
        replace(config(tmp_path), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": []}, "grpo needs rewards"),
        ({"rewards": [LENGTH, LENGTH]}, "reward 'length' is there twice"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be in"),
        ({"beta": -0.1}, "beta is -0.1; in grpo it must not be negative"),
        ({"loss_type": "ppo"}, "loss_type is 'ppo'; choose grpo"),
    ],
)
def test_settings_of_grpo_that_are_refused(options, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.GrpoConfig(**{"rewards": [LENGTH], **options})


def test_runs_that_are_refused(tiny_dir, tok, tmp_path):
    model = adapted(tiny_dir)
    data = {"train": PROMPTS, "validation": PROMPTS}
    with pytest.raises(lk.LorakitError, match="grpo evaluates on no validation rows yet"):
        lk.train(model, tok, data, config(tmp_path))
    with pytest.raises(lk.LorakitError, match="'grpo' does not fit the training rows"):
        lk.train(model, tok, [{"prompt": "a", "completion": "b"}], config(tmp_path))
    with pytest.raises(lk.LorakitError, match="max_completion_length=60 exceed the 64 positions"):
        lk.train(model, tok, PROMPTS, config(tmp_path, max_completion_length=60))
    with pytest.raises(lk.LorakitError, match="'mine' is unknown"):
        lk.train(model, tok, PROMPTS, config(tmp_path, rewards=[lk.RewardConfig("mine")]))


def test_a_row_without_an_answer_is_told_before_the_first_step(tiny_dir, tok, tmp_path):
    rows = [*PROMPTS, {"prompt": "and ", "reply": 1}]
    settings = config(tmp_path, rewards=[lk.RewardConfig("exact_match")])
    with pytest.raises(lk.LorakitError, match="row 9 has no field 'answer'"):
        lk.train(adapted(tiny_dir), tok, rows, settings)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {"train": "d", "validation": "e"}}, "grpo evaluates on no validation rows yet"),
        ({"rewards": ["regex"]}, "unknown key 'rewards' .say it in grpo"),
        ({"beta": 0.1, "grpo": {"rewards": ["exact_match"], "beta": 0.2}}, "beta and grpo.beta"),
        ({"reward_weights": [1.0]}, "give each entry of rewards its weight"),
        ({"shard": "full"}, "grpo samples from whole weights"),
        ({"offload_weights": True}, "grpo samples from whole weights"),
    ],
)
def test_run_files_that_are_refused(options, message):
    values = {"model": "m", "data": "d", "objective": "grpo", "grpo": {"rewards": ["exact_match"]}}
    with pytest.raises(lk.LorakitError, match=message):
        lk.RunConfig.from_dict(values | options)


def test_a_file_of_trl(caplog):
    """Its settings stand side by side, beta and loss_type too, which others have there as well."""
    flat = {
        "num_generations": 4, "max_completion_length": 99, "temperature": 0.7, "top_p": 0.9,
        "num_iterations": 2, "epsilon": 0.1, "epsilon_high": 0.3, "scale_rewards": "batch",
        "mask_truncated_completions": True, "beta": 0.04, "loss_type": "dr_grpo",
    }  # fmt: skip
    values = {"model": "m", "data": "d", "objective": "grpo", "per_device_train_batch_size": 8}
    theirs = {"reward_funcs": ["exact_match"], "use_vllm": True, **flat}
    run = lk.RunConfig.from_dict(values | theirs)
    assert run == lk.RunConfig.from_dict(values | {"grpo": {"rewards": ["exact_match"], **flat}})
    assert run.train.grpo == lk.GrpoConfig([lk.RewardConfig("exact_match")], **flat)
    assert any("use_vllm is ignored" in message for message in caplog.messages)
    teacher = {"objective": "distillation", "distillation": {"teacher": "t"}}
    for others, match in [({}, "not with sft; say that"), (teacher, "say it in distillation")]:
        values = {"model": "m", "data": "d", "temperature": 0.7, **others}
        with pytest.raises(lk.LorakitError, match=f"temperature goes with .* grpo, .*{match}"):
            lk.RunConfig.from_dict(values)


def test_the_run_file():
    run = lk.RunConfig.from_dict(
        {
            "model": "m", "data": "d", "objective": "grpo",
            "grpo": {"rewards": ["exact_match", {"name": "length", "length": 9, "weight": 0.5}]},
        }
    )  # fmt: skip
    assert run.train.grpo == lk.GrpoConfig(
        [lk.RewardConfig("exact_match"), lk.RewardConfig("length", 0.5, length=9)]
    )
    with pytest.raises(
        lk.LorakitError, match="rewards: unknown key 'weights' .did you mean 'weight'"
    ):
        lk.RunConfig.from_dict(
            {"model": "m", "data": "d", "grpo": {"rewards": [{"name": "regex", "weights": 1}]}}
        )
