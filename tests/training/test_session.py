"""The loop by hand: a session given the rows of a run ends with its bytes."""

import json

import pytest
import torch

import lorakit as lk
from lorakit.data.batching import Order
from lorakit.kernels.ops import products
from tests.conftest import ROWS, tiny_llama, write_tokenizer
from tests.training.runs import ADAPTER, JUDGED, PAIRS, adapted, run

STEPS = {"max_steps": 5, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
STEPS |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def tok(tiny_dir):
    return lk.load_tokenizer(tiny_dir)


def by_hand(session, rows, config, steps):
    """Give a session the rows of these steps of a run."""
    examples = lk.encode_rows(rows, session.tok, max_seq_length=config.max_seq_length)
    order = Order(examples, config)
    for step in steps:
        taken = [examples[i] for batch in order.step(step) for i in batch]
        session.forward_backward(taken)
        session.optim_step()


def adapter_bytes(model, path):
    lk.save_adapter(model, path)
    return (path / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    ("rows", "lora", "settings"),
    [
        (ROWS, {"lora_dropout": 0.1}, {}),
        (ROWS, {}, {"gradient_accumulation_steps": 2}),
        (ROWS, {}, {"packing": True, "max_seq_length": 16}),
        (PAIRS, {}, {"objective": "dpo"}),
        (JUDGED, {}, {"objective": "kto"}),
    ],
    ids=["sft", "two batches", "packed", "dpo", "kto"],
)
def test_the_rows_of_a_run_give_its_bytes(tiny_dir, tok, tmp_path, rows, lora, settings):
    run(tiny_dir, tok, tmp_path / "run", rows, lora, **{**STEPS, **settings})
    config = lk.TrainConfig(**{**STEPS, **settings})
    session = lk.Session(adapted(tiny_dir, **lora), tok, config)
    by_hand(session, rows, config, range(1, 6))
    expected = (tmp_path / "run" / ADAPTER).read_bytes()
    assert adapter_bytes(session.model, tmp_path / "hand") == expected


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_several_calls_are_one_with_all_rows(tiny_dir, tok):
    """The sums are the same numbers in another order: 1e-5 of the largest is fp32's rounding."""
    found = []
    for parts in [[ROWS[:7]], [ROWS[:3], ROWS[3:4], ROWS[4:7]]]:
        session = lk.Session(adapted(tiny_dir), tok)
        told = [session.forward_backward(part) for part in parts]
        found.append(gradients(session.model))
    assert told[0].count < told[0].tokens
    one, several = found
    largest = max(g.abs().max() for g in one.values())
    assert all((one[n] - several[n]).abs().max() < 1e-5 * largest for n in one)


def test_a_function_of_log_probabilities(tiny_dir, tok):
    """The mean of the negative log-probabilities is sft, computed by other kernels: 1e-4."""
    session = lk.Session(adapted(tiny_dir), tok, lk.TrainConfig(per_device_train_batch_size=2))
    told = session.forward_backward(ROWS[:5])
    expected = gradients(session.model)
    session.optim_step(1e-9)
    seen = []

    def loss(logprobs, rows):
        seen.extend(rows)
        return -sum(each.sum() for each in logprobs) / told.count

    other = lk.Session(adapted(tiny_dir), tok, lk.TrainConfig(per_device_train_batch_size=2))
    again = other.forward_backward(ROWS[:5], loss)
    assert seen == list(range(5))
    assert again.loss == pytest.approx(told.loss, rel=1e-5)
    assert again.tokens == told.tokens
    largest = max(g.abs().max() for g in expected.values())
    found = gradients(other.model)
    assert all((found[n] - expected[n]).abs().max() < 1e-4 * largest for n in expected)
    assert sum(map(sum, again.logprobs)) == pytest.approx(-told.loss * told.count, rel=1e-5)
    flat = [x for row in other.logprobs(ROWS[:5]) for x in row]
    assert flat == pytest.approx([x for row in again.logprobs for x in row], abs=1e-5)


def test_states_go_on_to_the_same_bytes(tiny_dir, tok, tmp_path):
    """Whether a session or a run wrote them, at any step; dropout draws on."""
    config = lk.TrainConfig(**STEPS)
    lora = {"lora_dropout": 0.1}
    whole = lk.Session(adapted(tiny_dir, **lora), tok, config)
    by_hand(whole, ROWS, config, range(1, 4))
    whole.save_state(tmp_path / "deep" / "state")
    by_hand(whole, ROWS, config, range(4, 6))
    expected = adapter_bytes(whole.model, tmp_path / "whole")
    resumed = lk.Session(adapted(tiny_dir, **lora), tok, config)
    by_hand(resumed, ROWS[:8], config, range(1, 3))  # which is forgotten
    resumed.forward_backward(ROWS[:2])
    resumed.load_state(tmp_path / "deep" / "state")
    by_hand(resumed, ROWS, config, range(4, 6))
    assert adapter_bytes(resumed.model, tmp_path / "again") == expected
    resumed.save_state(tmp_path / "deep" / "state")  # in the place of the first
    run(tiny_dir, tok, tmp_path / "run", ROWS, lora, **STEPS, save_steps=3)
    of_run = lk.Session(adapted(tiny_dir, **lora), tok, config)
    of_run.load_state(tmp_path / "run" / "checkpoint-3")
    by_hand(of_run, ROWS, config, range(4, 6))
    assert adapter_bytes(of_run.model, tmp_path / "from run") == expected


def test_the_reference_goes_on_with_a_state(tiny_dir, tok, tmp_path):
    config = lk.TrainConfig(**STEPS, objective="dpo")
    session = lk.Session(adapted(tiny_dir), tok, config)
    by_hand(session, PAIRS, config, range(1, 3))
    session.save_state(tmp_path / "state")
    other = lk.Session(adapted(tiny_dir), tok, config)
    other.load_state(tmp_path / "state")
    assert other.forward_backward(PAIRS[:4]).loss == session.forward_backward(PAIRS[:4]).loss


def test_adapters_train_by_themselves(tiny_dir, tok, tmp_path):
    """What another adapter learns in between changes nothing."""
    alone = lk.Session(adapted(tiny_dir), tok)
    both = lk.Session(adapted(tiny_dir), tok)
    torch.manual_seed(1)
    lk.attach(both.model, lk.LoraConfig(r=2), name="other")
    lk.set_adapter(both.model, "default")
    for i in range(3):
        alone.forward_backward(ROWS[i : i + 4])
        both.forward_backward(ROWS[i : i + 4])
        both.forward_backward(ROWS[:2], adapter="other")
        assert both.optim_step(1e-2, adapter="other").step == i + 1
        assert alone.optim_step(1e-3) == both.optim_step(1e-3, adapter="default")
    assert adapter_bytes(alone.model, tmp_path / "a") == adapter_bytes(both.model, tmp_path / "b")
    sampled = both.sample([[5, 6, 7]], temperature=0, max_new_tokens=6, adapter="other")
    lk.set_adapter(both.model, "other")
    assert sampled == both.sample([[5, 6, 7]], temperature=0, max_new_tokens=6)


def test_samples(tiny_dir, tok):
    """Their log-probabilities are those that the same weights have in training, within fp32."""
    session = lk.Session(adapted(tiny_dir), tok)
    prompts = ["1 plus 2 is ", [5, 6, 7]]
    found = session.sample(prompts, num_samples=3, max_new_tokens=8, temperature=0.7, seed=3)
    again = session.sample(prompts, num_samples=3, max_new_tokens=8, temperature=0.7, seed=3)
    assert found == again
    assert [len(each) for each in found] == [3, 3]
    assert found[1][0].prompt == [5, 6, 7]
    flat = [each for some in found for each in some]
    assert len({tuple(each.tokens) for each in flat}) > 2
    computed = session.logprobs([each.example for each in flat], temperature=0.7)
    for each, values in zip(flat, computed, strict=True):
        assert each.logprobs == pytest.approx(values, abs=2e-5)
    session.forward_backward([each.example for each in flat])
    session.optim_step(0.5)
    longer = session.sample(prompts, max_new_tokens=12, temperature=0, seed=3)
    texts = lk.generate_batch(session.model, tok, prompts, max_new_tokens=12)
    assert [some[0].text for some in longer] == texts
    assert session.sample([]) == []


def test_a_step_that_is_not_finite_is_not_taken(tiny_dir, tok, tmp_path):
    session = lk.Session(adapted(tiny_dir), tok)
    before = adapter_bytes(session.model, tmp_path / "before")
    session.forward_backward(ROWS[:2], lambda logprobs, rows: logprobs[0].sum() * float("nan"))
    told = session.optim_step()
    assert (told.step, told.taken) == (0, False)
    assert adapter_bytes(session.model, tmp_path / "after") == before


def test_an_error_between_batches_leaves_no_gradients(tiny_dir, tok):
    """Some are added and some not: the next mean would be over other rows than it says."""
    session = lk.Session(adapted(tiny_dir), tok, lk.TrainConfig(per_device_train_batch_size=1))
    session.forward_backward(ROWS[:1], lambda logprobs, rows: logprobs[0].sum())

    def fails(logprobs, rows):
        if rows == [1]:
            raise KeyboardInterrupt
        return logprobs[0].sum()

    with pytest.raises(KeyboardInterrupt):
        session.forward_backward(ROWS[:2], fails)
    assert not gradients(session.model)
    with pytest.raises(lk.LorakitError, match="no gradients"):
        session.optim_step()


def test_rows_that_are_refused_leave_the_gradients_that_wait(tiny_dir, tok):
    session = lk.Session(adapted(tiny_dir), tok)
    some, other = lk.encode_rows(ROWS[:2], tok, max_seq_length=64)
    none = other._replace(labels=[-100] * len(other.labels))

    def loss(logprobs, rows):
        return -logprobs[0].sum()

    session.forward_backward([some], loss)
    before = gradients(session.model)
    with pytest.raises(lk.LorakitError, match="a row has nothing to learn"):
        session.forward_backward([some, none], loss)
    assert before.keys() == gradients(session.model).keys()
    assert all(torch.equal(g, before[n]) for n, g in gradients(session.model).items())
    assert session.optim_step().taken


def test_a_head_for_classes(tiny_dir, tok):
    """Rows and encoded rows are the same, and a head that tells classes learns no tokens."""
    rows = [{"text": "yes", "label": "good"}, {"text": "oh no", "label": "bad"}]
    encoded = list(lk.encode_rows(rows, tok, max_seq_length=64, format="classification"))
    told = []
    for given in (rows, encoded):
        torch.manual_seed(0)
        head = lk.ClassifierConfig(["good", "bad"])
        model = lk.load_model(tiny_dir, dtype="float32", classifier=head)
        lk.attach(model, lk.LoraConfig(r=2))
        session = lk.Session(model, tok, lk.TrainConfig(objective="classification"))
        told.append((session.forward_backward(given), session.optim_step(1e-3)))
    assert told[0] == told[1]
    assert told[0][0].count == 2
    with pytest.raises(lk.LorakitError, match="learns tokens, and the model has a head for"):
        session.forward_backward(ROWS[:2], "sft")


def test_paged_state(tiny_dir, tok, tmp_path):
    options = {**STEPS, "output_dir": str(tmp_path / "new"), "optim": "paged_adamw_32bit"}
    results = []
    for config in [lk.TrainConfig(**STEPS), lk.TrainConfig(**options)]:
        session = lk.Session(adapted(tiny_dir), tok, config)
        by_hand(session, ROWS, config, [1, 2])
        results.append(adapter_bytes(session.model, tmp_path / config.optim))
    assert results[0] == results[1]


def test_what_is_wrong_is_one_sentence(tiny_dir, tok, tmp_path):
    plain = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    with pytest.raises(lk.LorakitError, match="no adapter is attached"):
        lk.Session(plain, tok)
    model = adapted(tiny_dir)
    for settings, match in [
        ({"train": "full"}, "trains adapters"),
        (
            {"objective": "grpo", "grpo": lk.GrpoConfig([lk.RewardConfig("length", length=9)])},
            "lorakit.grpo_loss",
        ),
        ({"per_device_train_batch_size": "auto"}, "give both as numbers"),
    ]:
        with pytest.raises(lk.LorakitError, match=match):
            lk.Session(model, tok, lk.TrainConfig(**settings))
    session = lk.Session(model, tok)
    with pytest.raises(lk.LorakitError, match="no adapter 'defaults'.*'default'"):
        session.forward_backward(ROWS, adapter="defaults")
    with pytest.raises(lk.LorakitError, match="'default' has no gradients"):
        session.optim_step()
    for rows, loss, match in [
        ([], None, "no rows"),
        (PAIRS, None, "does not fit"),
        (ROWS, "dpo", "does not fit"),
        (ROWS, "grpo", "lorakit.grpo_loss"),
        (ROWS, "sgd", "objective"),
        (ROWS, 3, "is no loss"),
        (ROWS, lambda logprobs, rows: 1.0, "must return a loss"),
        (ROWS, lambda logprobs, rows: torch.ones(()), "must return a loss"),
        ([lk.encode_rows(ROWS, tok, max_seq_length=64)[0]._replace(labels=[-100])], None, "fit"),
    ]:
        with pytest.raises(lk.LorakitError, match=match):
            session.forward_backward(rows, loss)
    with pytest.raises(lk.LorakitError, match="no gradients"):  # none of these left any
        session.optim_step()
    session.forward_backward(ROWS[:2])
    with pytest.raises(lk.LorakitError, match="of sft wait for optim_step; those of dpo"):
        session.forward_backward(PAIRS[:2], "dpo")
    with pytest.raises(lk.LorakitError, match="which a state has not"):
        session.save_state(tmp_path / "state")
    with pytest.raises(lk.LorakitError, match="learning_rate"):
        session.optim_step(-1.0)
    assert session.optim_step().taken
    with pytest.raises(lk.LorakitError, match="num_samples"):
        session.sample(["a"], num_samples=0)
    with pytest.raises(lk.LorakitError, match="positions"):
        session.sample(["a"], max_new_tokens=10**6)


def test_states_of_something_else(tiny_dir, tok, tmp_path):
    model = adapted(tiny_dir)
    session = lk.Session(model, tok)
    with pytest.raises(lk.LorakitError, match="neither a state"):
        session.load_state(tmp_path)
    with pytest.raises(lk.LorakitError, match="holds no state; choose another"):
        session.save_state(tmp_path)
    state = tmp_path / "state"
    session.save_state(state)
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=2), name="other")
    with pytest.raises(lk.LorakitError, match="with adapter .*'r': 4.* 'other' has .*'r': 2"):
        session.load_state(state, adapter="other")
    session.load_state(state, adapter="default")
    dense = lk.attach(lk.load_model(tiny_dir, dtype="float32"), lk.LoraConfig(r=4, lora_alpha=8))
    with pytest.raises(lk.LorakitError, match="of another model"):
        lk.Session(dense, tok).load_state(state)
    with pytest.raises(lk.LorakitError, match="optim"):
        lk.Session(model, tok, lk.TrainConfig(optim="adamw_8bit")).load_state(
            state, adapter="default"
        )
    values = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps({**values, "progress": {}}))
    with pytest.raises(lk.LorakitError, match="is damaged: its step is missing"):
        session.load_state(state, adapter="default")
    (tmp_path / "file").write_text("")
    with pytest.raises(lk.LorakitError, match="cannot be written"):
        session.save_state(tmp_path / "file" / "state", adapter="default")


def adapters(path, ranks, quantize="nf4", **settings):
    """A session with an adapter of each rank, "a4" and so on."""
    model = lk.load_model(path, dtype="float32", quantize=quantize)
    for rank in ranks:
        torch.manual_seed(rank)
        lk.attach(model, lk.LoraConfig(r=rank, lora_alpha=2 * rank), name=f"a{rank}")
    return lk.Session(model, lk.load_tokenizer(path), lk.TrainConfig(**settings))


def weights_of(session, name):
    named = session.model.named_parameters()
    return {n: p.detach().clone() for n, p in named if f".adapters.{name}." in n}


def check_each_learns_what_it_learns_alone(path, rates, exact, **settings):
    """Train an adapter of each rank in one pass, of which the second ends early; and each alone.

    They have different rows, batches and rates. Where the sums are in one order, which `exact`
    says, they have the same bits. Elsewhere Adam divides by the gradient's size: 1e-5 of the
    weights. The losses of a pass are added up in another order.
    """
    names, rows = {f"a{rank}": rate for rank, rate in rates.items()}, {}
    early = list(names)[1]
    for i, name in enumerate(names):
        rows[name] = [ROWS[i + step : i + step + 3 + 2 * i] for step in range(5)]
    together = adapters(path, rates, **settings)
    told = []
    for step in range(5):
        live = [name for name in names if step < 3 or name != early]
        told.append(together.forward_backward_many({name: rows[name][step] for name in live}))
        for name in live:
            assert together.optim_step(names[name], adapter=name).step == step + 1
    alone = adapters(path, rates, **settings)
    for name, rate in names.items():
        for step in range(3 if name == early else 5):
            learned = alone.forward_backward(rows[name][step], adapter=name)
            assert told[step][name].loss == pytest.approx(learned.loss, rel=1e-5)
            assert told[step][name].count == learned.count
            alone.optim_step(rate, adapter=name)
        found, expected = weights_of(together, name), weights_of(alone, name)
        for key, weight in expected.items():
            if exact:
                assert torch.equal(found[key], weight)
            else:
                assert (found[key] - weight).norm() < 1e-5 * max(weight.norm(), 1)


RATES = {2: 1e-3, 5: 3e-4, 16: 2e-3}
BY_SUMS = pytest.mark.skipif(not products.available(torch.zeros(1, 2)), reason="torch multiplies")


@BY_SUMS
@pytest.mark.parametrize("packing", [True, False])
def test_an_adapter_in_a_pass_has_the_bits_that_it_has_alone(tmp_path, packing):
    tiny_llama(vocab_size=300, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    settings = {"per_device_train_batch_size": 2, "packing": packing}
    check_each_learns_what_it_learns_alone(tmp_path, RATES, True, **settings)


def test_several_adapters_in_one_pass_learn_what_each_learns_alone(tiny_dir):
    """Rows of 32 values, less than a block of NF4, go through torch's products."""
    check_each_learns_what_it_learns_alone(tiny_dir, RATES, False, per_device_train_batch_size=2)


@pytest.mark.slow
@BY_SUMS
@pytest.mark.parametrize("quantize", ["nf4", None])
def test_the_bits_of_a_pass_at_the_widths_of_a_small_model(tmp_path, quantize):
    """Those of SmolLM2-135M, with few blocks: sums so deep that they are cut, ranks up to 64."""
    tiny_llama(
        vocab_size=1200, hidden_size=576, intermediate_size=1536, num_hidden_layers=4,
        num_attention_heads=9, num_key_value_heads=3,
    ).save_pretrained(tmp_path)  # fmt: skip
    write_tokenizer(tmp_path)
    rates = {4: 1e-3, 12: 3e-4, 31: 2e-3, 64: 1e-4}
    settings = {"per_device_train_batch_size": 2, "quantize": quantize, "packing": True}
    check_each_learns_what_it_learns_alone(tmp_path, rates, True, **settings)


def test_a_pass_leaves_the_model_as_it_was(tiny_dir):
    session = adapters(tiny_dir, [2, 3])
    session.forward_backward_many({"a2": ROWS[:2]})
    assert all(
        p.requires_grad == (".a3." in n)
        for n, p in session.model.named_parameters()
        if "lora_" in n
    )
    ids = torch.arange(8)[None]
    fresh = adapters(tiny_dir, [2, 3])
    assert torch.equal(session.model.eval()(ids), fresh.model.eval()(ids))
    assert not any(p.grad is not None for n, p in session.model.named_parameters() if ".a3." in n)


def test_what_one_pass_refuses(tiny_dir, tok):
    session = adapters(tiny_dir, [2, 3])
    for rows, match in [
        ({}, "no rows of any adapter"),
        ({"a2": []}, "no rows"),
        ({"a9": ROWS}, "no adapter 'a9'"),
        ({"a2": ROWS[:2], "a3": PAIRS}, "does not fit"),
    ]:
        with pytest.raises(lk.LorakitError, match=match):
            session.forward_backward_many(rows)
    with pytest.raises(lk.LorakitError, match="no gradients"):  # none of these left any
        session.optim_step(adapter="a2")
    for lora in [{"use_dora": True}, {"lora_dropout": 0.1}, {"modules_to_save": ["norm"]}]:
        other = adapters(tiny_dir, [2])
        lk.attach(other.model, lk.LoraConfig(r=2, **lora), name="more")
        with pytest.raises(lk.LorakitError, match="one pass: 'more' does more at"):
            other.forward_backward_many({"a2": ROWS, "more": ROWS})
    for settings in [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}]:
        other = adapters(tiny_dir, [2], **settings)
        with pytest.raises(lk.LorakitError, match="without loss_type dft, label_smoothing"):
            other.forward_backward_many({"a2": ROWS})


def test_an_adapter_that_waits_may_be_of_any_kind(tiny_dir):
    """The layers that only it has a part in compute as if it was not there."""
    found = []
    for more in [False, True]:
        session = adapters(tiny_dir, [2, 3])
        if more:
            whole = lk.LoraConfig(target_modules=["embed_tokens"], modules_to_save=["norm"])
            lk.attach(session.model, whole, name="more")
        session.forward_backward_many({"a2": ROWS[:2], "a3": ROWS[2:5]})
        named = session.model.named_parameters()
        found.append([p.grad for n, p in named if ".adapters.a" in n])
    assert len(found[0]) > 8
    assert all(map(torch.equal, *found))


def test_a_new_adapter_under_an_old_name_learns_anew(tiny_dir, tok):
    session = lk.Session(adapted(tiny_dir), tok)
    for rank in (4, 8):
        session.forward_backward(ROWS[:2])
        assert session.optim_step(1e-3).step == 1
        lk.detach(session.model)
        lk.attach(session.model, lk.LoraConfig(r=rank))


@pytest.mark.parametrize(
    "settings",
    [{"objective": "dpo", "loss_type": "hinge"}, {"objective": "simpo", "simpo_gamma": 1.0}],
)
def test_another_loss_leaves_the_settings_of_the_first_alone(tiny_dir, tok, settings):
    session = lk.Session(adapted(tiny_dir), tok, lk.TrainConfig(**settings))
    plain = lk.Session(adapted(tiny_dir), tok)
    assert session.logprobs(ROWS[:3]) == plain.logprobs(ROWS[:3])
    assert session.forward_backward(ROWS[:3], "sft") == plain.forward_backward(ROWS[:3])


@pytest.mark.parametrize("settings", [{"z_loss": 0.1}, {"label_smoothing_factor": 0.1}])
def test_settings_of_sft_are_none_of_preferences(tiny_dir, tok, settings):
    session = lk.Session(adapted(tiny_dir), tok, lk.TrainConfig(**settings))
    plain = lk.Session(adapted(tiny_dir), tok)
    told = [each.forward_backward(PAIRS[:3], "simpo") for each in (session, plain)]
    assert told[0] == told[1]
