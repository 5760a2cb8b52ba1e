"""Forecasts of objective grpo: the sampler's pages, and steps that learn from completions."""

import pytest
import torch

import lorakit as lk
from lorakit.inference.kv_cache import PAGE
from lorakit.models.decoder import Decoder
from lorakit.training.memory_plan.before import check_memory, surely_fits
from tests.allocations import counted
from tests.training.memory_plan.test_plan import KEPT, LORA, TINY

PROMPT, COMPLETION = "one two three four", 24


def settings(**options):
    grpo = lk.GrpoConfig(
        [lk.RewardConfig("length", length=9)],
        num_generations=4,
        max_completion_length=COMPLETION,
        beta=options.pop("beta", 0.0),
    )
    return lk.TrainConfig(
        objective="grpo", grpo=grpo, **{"per_device_train_batch_size": 8, **options}
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"packing": True, "beta": 0.1, "gradient_accumulation_steps": 2}],
    ids=["padded", "packed"],
)
def test_a_real_run_on_this_processor(tok, tmp_path, options):
    """Three percent: the run also keeps its random state, and a batch's rows a little longer."""
    train = settings(output_dir=str(tmp_path), max_steps=2, max_grad_norm=1.0, **options)
    torch.manual_seed(0)
    model = Decoder(TINY).requires_grad_(False)
    lk.attach(model, LORA)
    rows = [{"prompt": PROMPT}] * 8
    took = counted(lambda: lk.train(model, tok, rows, train))[0]
    tokens = len(tok.encode(PROMPT))
    plan = lk.plan_memory(
        TINY, dtype="float32", lora=LORA, train=train, tokens=tokens, device="cpu"
    )
    found = plan.peak - sum(plan.at_peak.get(kind, 0) for kind in KEPT)
    # a second set of adapters is what beta compares with; the first was there before
    found += plan.resident["adapters"] // 2 if "beta" in options else 0
    assert found == pytest.approx(took, rel=0.03)


def test_pages_are_those_of_all_rows_at_their_longest():
    """16 rows of 40 + 24 positions are a page each, and one more token is a second page."""
    train = settings(gradient_accumulation_steps=2)
    a_page = PAGE * 2 * TINY.num_hidden_layers * 2 * 32 * 4  # keys and values of 2 heads of 32
    for tokens, pages in ((PAGE - COMPLETION, 16), (PAGE - COMPLETION + 1, 32)):
        plan = lk.plan_memory(TINY, dtype="float32", train=train, tokens=tokens, device="cpu")
        assert plan.resident["keys and values"] == pages * a_page
        assert plan.phases["generate"] < plan.peak


def test_pages_of_long_completions_are_most_of_a_run():
    """They stay while one row at a time is learned, with checkpointing. A GPU also copies them."""
    grpo = lk.GrpoConfig([lk.RewardConfig("length", length=9)], max_completion_length=512)
    train = lk.TrainConfig(
        objective="grpo",
        grpo=grpo,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=64,
        gradient_checkpointing=True,
    )
    plan = lk.plan_memory(TINY, dtype="float32", train=train, tokens=64, device="cpu")
    assert plan.at_peak["keys and values"] > plan.peak / 2
    plan = lk.plan_memory(TINY, dtype="float32", train=train, tokens=64)
    assert plan.when == "generate"


def test_a_run_that_cannot_fit_is_refused_before_it_starts():
    run = lk.PlannedRun(TINY, settings(), LORA, dtype="float32", lengths=[40] * 8, device="cpu")
    peak = run.forecast().peak
    assert "memory: " in check_memory(run, peak)
    with pytest.raises(lk.LorakitError, match=r"the run needs .* are free"):
        check_memory(run, peak // 2)
    assert not surely_fits(run, peak)  # neither below what it takes
    assert surely_fits(run, 1 << 40)


def test_sampling_has_whole_weights():
    for options in ({"shard": "full", "ranks": 2}, {"offload_weights": True}):
        with pytest.raises(lk.LorakitError, match="samples from whole weights"):
            lk.plan_memory(TINY, train=settings(), tokens=40, device="cpu", **options)


def test_a_smaller_part_of_a_step_saves_activations_alone():
    run = lk.PlannedRun(TINY, settings(), LORA, dtype="float32", lengths=[40] * 8, device="cpu")
    few = run.with_rows(1)
    assert few.forecast().peak < run.forecast().peak
    kept = [each.forecast().resident["keys and values"] for each in (run, few)]
    assert kept[0] == kept[1]
