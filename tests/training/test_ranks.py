"""Runs on several ranks: the bytes of one process, and no rank that waits for ever."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch

import lorakit as lk
from lorakit.training.ranks import name_of_start, start_group
from lorakit.training.state import checkpoints
from tests.conftest import tiny_llama, write_tokenizer
from tests.training.rank_runs import CASES, ROOT, command, ended, found, start, take

LONG = {"max_steps": 100_000, "save_steps": None, "learning_rate": 1e-4}


@pytest.fixture(autouse=True)
def _one_thread():
    """torch's sums have other last bits with other numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(size, tiny_dir, tmp_path, jobs):
    """The runs of some cases on `size` ranks leave what those of one process leave."""
    ranks = start(size, command(tiny_dir, tmp_path / "many", *jobs))
    try:
        for job in jobs:
            take(tiny_dir, tmp_path / "one", *job)
    finally:
        results = ended(ranks)
    for rank, (code, out, err) in enumerate(results):
        assert code == 0, err
        assert ("loss" in out) == (rank == 0)  # one rank speaks
    for case, _ in jobs:
        ours, theirs = found(tmp_path / "many", case), found(tmp_path / "one", case)
        if case == "fast":  # the order of an all-reduce: fp32's rounding of sums of three terms
            for a, b in zip(ours["steps"], theirs["steps"], strict=True):
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        else:
            assert ours == theirs


@pytest.mark.parametrize(
    "cases",
    [["padded", "divided", "idle"], pytest.param(list(CASES), marks=pytest.mark.slow)],
    ids=["three cases", "all cases"],
)
def test_two_ranks_have_the_bytes_of_one_process(cases, tiny_dir, tmp_path):
    check(2, tiny_dir, tmp_path, [[case, {}] for case in cases])
    # LoRA of q, k, v, o, gate, up and down, r = 4, with DoRA's lengths, in two layers
    _, first, second, _ = json.loads((tmp_path / "many" / "written-idle-1").read_text())
    values = sum(p.numel() for p in take(tiny_dir, tmp_path, "idle", {})[0].parameters()
                 if p.requires_grad)  # fmt: skip
    sent = second - first
    # half of them in the exchange and half in the gather, 16 values' room for each parameter at
    # most, and 4 KB for flags, losses and signs of life
    assert 4 * values <= sent <= 4 * values + 64 * 42 + 4096


def test_a_second_start_on_the_same_store_has_a_name_of_its_own():
    """torchrun keeps the store when it starts the ranks again, with the addresses of the last."""
    store, names = torch.distributed.HashStore(), []

    def join(rank):
        names.append(name_of_start(store, rank, 3))

    for _ in range(3):
        # the others come first, and find what an earlier start has left
        threads = [threading.Thread(target=join, args=(rank,)) for rank in (2, 1, 0)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(20)
    assert len(names) == 9
    assert len(set(names)) == 3
    assert [len(set(names[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RANK": "x"}, "RANK is 'x' in the environment, where torchrun sets a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment"),
        ({"MASTER_PORT": None}, "MASTER_PORT is '' in the environment"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not in the environment"),
        ({"RANK": "2"}, "RANK is 2 in the environment, and WORLD_SIZE 2"),
    ],
)
def test_an_environment_that_cannot_be_torchruns_is_refused(changed, words, monkeypatch):
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (whole | changed).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(lk.LorakitError, match=f"^train: {words}"):
        start_group(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4])
def test_more_ranks_and_seeds(tiny_dir, tmp_path, size):
    for seed in range(1, 6):
        jobs = [[case, {"seed": seed}] for case in CASES]
        check(size, tiny_dir, tmp_path / str(seed), jobs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("padded", (2, 1)),
        ("padded", (1, 2)),
        ("padded", (1, 3, 2)),
        ("divided", (2, 1, 3)),
        ("divided in 8 bits", (1, 2, 1)),
    ],
)
def test_resumed_on_another_number_of_ranks(tiny_dir, tmp_path, case, sizes):
    """A run of six steps, cut off after two of them, and after four."""
    options = {"max_steps": 6, "save_steps": 2, "resume": "auto", "save_total_limit": 9}
    model = tiny_dir
    if case == "divided in 8 bits":
        # two ranks have whole blocks of 256 values of 320 x 32, and cut them in 300 x 32
        case, model, options["optim"] = "divided", tmp_path / "model", "paged_adamw_8bit"
        tiny_llama(num_key_value_heads=2, vocab_size=320).save_pretrained(model)
        write_tokenizer(model)
    take(model, tmp_path / "whole", case, options)
    out = tmp_path / "out"
    for i, size in enumerate(sizes):
        for each in checkpoints(out / case):
            if each.step > 2 * i:
                shutil.rmtree(each.path)
        for code, _, err in ended(start(size, command(model, out, [case, options]))):
            assert code == 0, err
    assert found(out, case) == found(tmp_path / "whole", case)


@pytest.mark.slow
def test_ranks_with_other_settings_end_in_a_sentence(tiny_dir, tmp_path):
    jobs = [command(tiny_dir, tmp_path, ["idle", {"learning_rate": rate}]) for rate in (1e-3, 1e-4)]
    for code, _, err in ended(start(2, *jobs)):
        assert code == 1
        assert "LorakitError: train: rank 1 has another learning_rate than rank 0; all" in err


def until_step(process, step):
    while not process.stdout.readline().startswith(f"step {step}/"):
        assert process.poll() is None


@pytest.mark.parametrize(
    ("size", "killed", "number"),
    [
        pytest.param(2, 1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(3, 0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(3, 2, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(2, 1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_gone_is_named_by_the_others(tiny_dir, tmp_path, size, killed, number):
    limit = 10.0 if number == signal.SIGSTOP else 120.0  # it hangs, and waits for the limit
    ranks = start(size, command(tiny_dir, tmp_path / "out", ["idle", LONG], limit=limit))
    try:
        until_step(ranks[0], 3)
        ranks[killed].send_signal(number)
        others = [each for rank, each in enumerate(ranks) if rank != killed]
        results = ended(others, 120)
    finally:
        for each in ranks:
            each.kill()
            each.wait()
    for code, _, err in results:
        assert code == 1
        assert f"LorakitError: train: rank {killed} ended or hangs: the run cannot go on" in err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_signal_to_the_launcher_ends_all_with_a_checkpoint(number, expected, tiny_dir, tmp_path):
    """`lorakit train --nproc 2`, which ends with 130 as a single process does.

    Where it was killed, its processes end by themselves; their connections tell of it too.
    """
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    (tmp_path / "run.yaml").write_text(
        f"{{model: {tiny_dir}, data: {tmp_path}/rows.jsonl, output_dir: {tmp_path}/out, "
        "max_steps: 100000, lora: {r: 2}}"
    )
    words = [sys.executable, "-m", "lorakit", "train", str(tmp_path / "run.yaml"), "--nproc", "2"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        until_step(process, 3)
        process.send_signal(number)
        [(code, out, err)] = ended([process], 120)
    finally:
        process.kill()
    assert code == expected
    said = f"lorakit: interrupted; the adapter so far is in {tmp_path}/out\n"
    assert err == said or (number == signal.SIGKILL and said in err)
    [saved] = checkpoints(tmp_path / "out")
    assert f"{saved.step} steps in" in out


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(tiny_dir, tmp_path):
    ranks = start(2, command(tiny_dir, tmp_path, ["idle", LONG]))
    try:
        until_step(ranks[0], 3)
        ranks[1].send_signal(signal.SIGINT)
    finally:
        results = ended(ranks)
    assert [code for code, _, _ in results] == [0, 0]
    assert len(checkpoints(tmp_path / "idle")) == 1


@pytest.mark.slow
def test_ten_kills_under_torchrun_lose_nothing(tiny_dir, tmp_path):
    """SIGKILL of one rank at random moments; torchrun starts all again, and they resume."""
    options = {"max_steps": 60, "save_steps": 1, "resume": "auto"}
    take(tiny_dir, tmp_path / "whole", "padded", {**options, "save_steps": 60})
    out, rng = tmp_path / "out", random.Random(0)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["--max-restarts", "30", *command(tiny_dir, out, ["padded", options])]
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    seen, kills = set(), 0
    end = time.monotonic() + 900
    try:
        while process.poll() is None and time.monotonic() < end:
            time.sleep(rng.uniform(0.1, 0.3))
            pid = None
            with suppress(OSError, ValueError):
                pid = int((out / f"pid-{rng.randrange(2)}").read_text())
            steps = [each.step for each in checkpoints(out / "padded")]
            due = steps and steps[-1] >= 5 * (kills + 1)
            if kills < 10 and due and pid is not None and pid not in seen:
                seen |= {int(each.read_text()) for each in out.glob("pid-*")}
                time.sleep(rng.uniform(0, 0.2))
                os.kill(pid, signal.SIGKILL)
                kills += 1
        assert process.wait(1) == 0
    finally:
        process.terminate()
        for each in out.glob("pid-*"):
            with suppress(OSError, ValueError):
                os.kill(int(each.read_text()), signal.SIGKILL)
        process.wait(60)
    assert kills == 10
    ours, theirs = found(out, "padded"), found(tmp_path / "whole", "padded")
    assert ours["result"] == theirs["result"]
    assert ours["state"] == theirs["state"]
    assert ours["steps"] == theirs["steps"]
