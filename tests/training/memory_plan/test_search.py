"""Searches over forecasts, held to trying everything. The forecasts are by arithmetic here."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.models.decoder import Decoder
from lorakit.training.memory_plan.search import _last_below, rows_that_fit
from tests.training.memory_plan.arithmetic import CONFIG, HIDDEN, LAYERS, needs, run


@given(
    first=st.integers(0, 100),
    rises=st.lists(st.integers(0, 50), max_size=60),
    limit=st.integers(0, 2000),
)
def test_the_last_below_a_limit_is_that_of_trying_all(first, rises, limit):
    sizes = [0, *itertools.accumulate(rises, initial=first)]  # sizes[n] is that of n, from 1
    most = len(sizes) - 1
    truth = max((n for n in range(1, most + 1) if sizes[n] <= limit), default=0)
    assert _last_below(lambda n: sizes[n], limit, most) == truth


@pytest.mark.parametrize("bend", [0, 700])
def test_a_search_takes_few_forecasts(bend):
    """Bytes grow along a line, or along two where another phase takes the peak."""
    asked = []

    def size_of(n):
        asked.append(n)
        return max(900_000, 100_000 + 1237 * n) if bend else 50_000 + 1237 * n

    assert _last_below(size_of, 1_500_000, 4096) == (1131 if bend else 1172)
    assert len(asked) <= 9


@pytest.mark.usefixtures("forecasts")
@pytest.mark.parametrize("what", ["batch", "length", "rank"])
@pytest.mark.parametrize("memory", [1_000, 700_000, 1_234_567, 3_000_000])
def test_the_largest_fits_and_the_next_does_not(what, memory):
    grain, most = {"batch": (1, 4096), "length": (64, 4096), "rank": (8, 4096)}[what]
    planned = run(gradient_checkpointing=True, per_device_train_batch_size=4)

    def of(n):
        if what == "rank":
            return dataclasses.replace(planned, lora=lk.LoraConfig(r=n))
        name = {"batch": "per_device_train_batch_size", "length": "max_seq_length"}[what]
        return planned.with_train(**{name: n})

    found = lk.largest_that_fits(planned, what, memory)
    assert found % grain == 0
    assert found == 0 or of(found).forecast().reserved <= memory
    assert found == most or of(found + grain).forecast().reserved > memory


@pytest.mark.usefixtures("forecasts")
@pytest.mark.parametrize("rows", [2, 4])
def test_kto_is_never_forecast_with_one_row(rows):
    """It refuses that, and no search may end with the refusal."""
    planned = run(objective="kto", per_device_train_batch_size=rows)
    assert all(saving.run.rows >= 2 for saving in lk.forecast_savings(planned))
    assert lk.largest_that_fits(planned, "batch", 10**12) == 4096


def test_the_longest_row_is_no_longer_than_the_model_takes(forecasts):
    assert lk.largest_that_fits(run(), "length", 10**12) == 4096
    assert len(forecasts) <= 4
    with pytest.raises(lk.LorakitError, match="has no adapter"):
        lk.largest_that_fits(dataclasses.replace(run(), lora=None), "rank", 10**9)


@pytest.mark.usefixtures("forecasts")
def test_savings_are_forecasts_with_one_change_each():
    planned = run(per_device_train_batch_size=8)
    found = {tuple(saving.words()): saving.run.forecast().reserved for saving in (
        lk.forecast_savings(planned)
    )}  # fmt: skip
    assert list(found.values()) == sorted(found.values())
    now = needs(planned)
    assert max(found.values()) < now

    def with_train(**settings):
        return planned.with_train(**settings).forecast().reserved

    assert found["gradient_checkpointing=true",] == with_train(gradient_checkpointing=True)
    both = {"gradient_checkpointing": True, "activation_offloading": True}
    assert found["gradient_checkpointing=true", "activation_offloading=true"] == with_train(**both)
    assert found["optim=adamw_8bit",] == with_train(optim="adamw_8bit")
    assert found["optim=paged_adamw_32bit",] == with_train(optim="paged_adamw_32bit")
    assert found["mlp_activations=recompute",] == with_train(mlp_activations="recompute")
    for rows, steps in ((4, 2), (1, 8)):
        words = f"per_device_train_batch_size={rows}", f"gradient_accumulation_steps={steps}"
        assert found[words] == planned.with_rows(rows).forecast().reserved
    ends = dataclasses.replace(planned.quantize, embed_tokens="nf4", lm_head="nf4")
    assert found["quantize={embed_tokens: nf4, lm_head: nf4}",] == needs(planned, quantize=ends)
    assert found["offload_weights=true",] == needs(planned, offload_weights=True)
    assert not any("quantize=nf4" in words or "shard" in words[0] for words in found)
    dense = lk.forecast_savings(run(quantize="none", ranks=2))
    assert {"quantize=nf4", "shard=full"} <= {saving.words()[0] for saving in dense}


@pytest.mark.usefixtures("forecasts")
def test_a_saving_of_the_command_line_makes_the_same_run():
    """The words of each saving, read as a run file, give the settings that were forecast."""
    planned = run(per_device_train_batch_size=8)
    from lorakit.cli.run_file import yaml_value

    for saving in lk.forecast_savings(planned):
        values = {"model": "m", "data": "d", "quantize": "nf4", "max_seq_length": 512}
        own = {word.partition("=")[0]: yaml_value(word) for word in saving.words()}
        if "offload_weights" in own:
            continue
        read = lk.RunConfig.from_dict({**values, **own})
        assert read.train == saving.run.train
        assert read.quantize == saving.run.quantize


@pytest.mark.usefixtures("forecasts")
def test_settings_that_fit():
    planned = run(quantize="none", per_device_train_batch_size=8, mlp_activations="keep")
    whole = needs(planned)
    assert lk.settings_that_fit(planned, whole).settings == {}
    # a little less: the rows are split once, since 4 rows at a time are enough
    saving = lk.settings_that_fit(planned, whole - 100_000)
    assert saving.words() == ["per_device_train_batch_size=4", "gradient_accumulation_steps=2"]
    least = lk.settings_that_fit(planned, 1)  # which nothing fits: what takes the least
    assert {"gradient_checkpointing", "quantize", "optim"} <= least.settings.keys()
    assert least.run.forecast().reserved > 1
    for memory in range(150_000, whole, 300_000):
        saving = lk.settings_that_fit(planned, memory)
        takes = saving.run.forecast().reserved
        assert (takes <= memory) == (least.run.forecast().reserved <= memory)
        assert saving.run.rows_of_step == 8
        exact = {"quantize", "optim"}.isdisjoint(saving.settings)
        row_by_row = planned.with_rows(1).with_train(
            gradient_checkpointing=True, activation_offloading=True, optim="paged_adamw_32bit"
        )
        # numbers in fewer bits only where nothing else helps
        assert exact or "paged" in saving.run.train.optim or needs(row_by_row) > memory


@pytest.mark.usefixtures("forecasts")
@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_fit_are_a_part_of_the_rows_of_a_step(packing):
    planned = run(
        per_device_train_batch_size=12, gradient_accumulation_steps=2, packing=packing,
        lengths=[512, 500, 90, 80, 7] * 40, gradient_checkpointing=True,
    )  # fmt: skip
    parts = [n for n in range(1, 25) if 24 % n == 0]
    sizes = {n: planned.with_rows(n).forecast().reserved for n in parts}
    for memory in (1, sizes[1], sizes[6] + 1, sizes[24] - 1, sizes[24], 10**12):
        truth = max((n for n in parts if sizes[n] <= memory), default=0)
        assert rows_that_fit(planned, memory) == truth


@pytest.mark.usefixtures("forecasts")
def test_what_is_auto_follows_from_the_memory():
    auto = run(per_device_train_batch_size="auto", gradient_accumulation_steps=2)
    assert auto.rows_of_step == 16
    roomy, tight = (lk.settled_run(auto, memory) for memory in (10**10, 1))
    assert (roomy.rows, roomy.train.mlp_activations) == (16, "keep")
    assert (tight.rows, tight.train.mlp_activations) == (1, "recompute")
    assert roomy.rows_of_step == tight.rows_of_step == 16
    cpu = lk.settled_run(run(device="cpu"), 1)
    assert cpu.train.mlp_activations == "auto"  # a CPU keeps all of them


def test_as_many_blocks_keep_gate_and_up_as_in_a_run(forecasts):
    """The rule of kept_layers.py, told again: 0.8 of what is free, less 1 GiB for the head, three
    dense weights and what every block keeps, has room for gate and up of two blocks and a half."""
    planned = run(per_device_train_batch_size=4)
    tokens, inner = 4 * 512, 128
    every_block = 2 * (4 * HIDDEN + 2 * (4 + 2) * 16)  # inputs; q, k, v and the output
    left = (1 << 30) + 3 * inner * HIDDEN * 2 + tokens * LAYERS * every_block
    free = (left + 2.5 * tokens * 2 * inner * 2) / 0.8
    resident = planned.forecast().resident
    held = resident["weights"] + 2 * resident["adapters"]  # and their gradients
    settled = lk.settled_run(planned, int(free + held))
    assert (settled.kept_layers, settled.train.mlp_activations) == (2, "auto")
    settled.forecast()
    assert forecasts[-1]["kept_layers"] == 2
    assert settled.with_train(mlp_activations="keep")._forecast
    assert forecasts[-1]["kept_layers"] is None


def test_weights_that_take_half_of_the_memory_are_divided():
    """`shard: auto` divides what takes more than half of the memory, if there are several ranks."""
    weights = sum(p.nbytes for p in Decoder(CONFIG).bfloat16().parameters())
    auto = dataclasses.replace(run(quantize="none", ranks=2, device="cpu"), shard="auto")
    for memory, shard in ((2 * weights, "none"), (2 * weights - 2, "full")):
        assert lk.settled_run(auto, memory).shard == shard
        alone = dataclasses.replace(auto, ranks=1)
        assert lk.settled_run(alone, memory).shard == "none"


def test_the_longest_rows_are_those_of_the_data():
    planned = run(lengths=[7, 300, 20], per_device_train_batch_size=4)
    assert planned.tokens() == 300
    assert planned.documents() is None
    assert planned.with_train(max_seq_length=100).tokens() == 100  # the rows will be cut
    packed = planned.with_train(packing=True)
    assert packed.documents() == [300, 20, 7]
    apart = packed.with_train(per_device_train_batch_size=1, max_seq_length=310)
    assert apart.documents() == [300, 7]
    assert run(packing=True, per_device_train_batch_size=2).documents() == [512, 512]
    with pytest.raises(lk.LorakitError, match="3 rows at a time do not divide 4 of a step"):
        planned.with_rows(3)
