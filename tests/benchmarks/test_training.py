"""benchmarks/training.py and load.py as a user runs them, at tiny sizes. How fast the sides are is
not judged here; that both do the same job is, and what becomes of failures and of Ctrl-C.
"""

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import lorakit as lk
from lorakit.models.decoder import Decoder
from lorakit.models.per_layer import host_tables

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PEER = "PEFT, bitsandbytes"
# alone where a test needs no peer: its imports take seconds
OURS = ["--side", "lorakit"]


def run(program, *options, folder, **environment):
    command = [sys.executable, BENCHMARKS / program, *map(str, options)]
    environment = os.environ | {"TMPDIR": str(folder)} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def left_behind(folder):
    """Temporary directories; torch keeps a cache of its own beside them."""
    return [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor")]


def figures(line):
    return [float(text) for text in re.findall(r"\d+\.?\d*", line)]


@pytest.fixture
def module(monkeypatch):
    """One of the programs as a module; they import each other by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        found = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, found)
        spec.loader.exec_module(found)
        return found

    return load


# ---- whole runs ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_sides_do_the_same_job(tiny_dir, tmp_path):
    """The first losses agree, and so do those after three steps of training."""
    options = ["--rows", "ragged", "--batch", 3, "--steps", 2, "--dtype", "float32", "--rank", 2]
    sides = [*OURS, "--side", PEER]
    done = run("training.py", tiny_dir, *options, *sides, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for name in ("lorakit", "torch", "transformers", "peft", "bitsandbytes"):
        assert re.search(rf"\b{name} \d", lines[0])
    first, losses = {}, {}
    for line, name in zip(lines[3:5], ("lorakit", PEER), strict=True):
        assert line.startswith(name)
        rate, least, most, seconds, peak, over, loading, loss = figures(line.removeprefix(name))
        assert 0 < least <= rate <= most
        assert 0 < over < peak
        assert seconds > 0
        assert loading >= 0  # to a tenth of a second
        first[name] = loss
        losses[name] = re.findall(rf"^{name}: step \d/4.* loss ([\d.]+),", done.stderr, re.M)
        assert len(losses[name]) == 4
    assert lines[5].startswith(f"lorakit / {PEER}: tokens/s ")
    # four printed digits: fp32 products and sums in another order; or the peer's products in bf16
    narrow = "avx512bf16" in lk.kernels.dispatch.runnable()
    assert first["lorakit"] == pytest.approx(first[PEER], abs=0.14 if narrow else 2e-4)
    # A is drawn at random on each side; three steps at this learning rate move the loss little
    for ours, peers in zip(*losses.values(), strict=True):
        assert float(ours) == pytest.approx(float(peers), rel=0.03 if narrow else 0.01)
    assert not left_behind(tmp_path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc for the processes")
@pytest.mark.slow
def test_steps_beside_busy_processes(tiny_dir, tmp_path):
    """There are as many steps again, and a table of them; quiet steps have nobody beside."""
    options = ["--length", 8, "--steps", 3, "--busy", 2, *OURS]
    done = run("training.py", tiny_dir, *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert lines[5].startswith("beside 2 busy")
    rate, least, most, share = figures(lines[6].removeprefix("lorakit"))
    quiet = figures(lines[4].removeprefix("lorakit"))[0]
    assert 0 < least <= rate <= most
    assert share == pytest.approx(rate / quiet, abs=0.006)  # printed with two digits
    told = re.findall(r"step \d/8( \(.*?\))?,", done.stderr)
    assert told == [" (warm-up)"] * 2 + ["", " (busy)"] * 3


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc for the processes")
def test_busy_processes_end(module):
    """They end with the block, and with whoever started them."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before = set(children.read_text().split())
    with module("shared").busy(2):
        found = set(children.read_text().split()) - before
        assert len(found) == 2
    assert not any(Path("/proc", pid).exists() for pid in found)
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import os, signal, shared\n"
        "with shared.busy(1):\n"
        "    print(open(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    pid = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    end = time.monotonic() + 60
    while Path("/proc", pid.strip()).exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path("/proc", pid.strip()).exists()


def may_limit():
    """Whether this process may make a control group with a quota."""
    roots = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    return os.access(next((root for root in roots if root.is_dir()), "/proc"), os.W_OK)


@pytest.mark.skipif(not may_limit(), reason="makes a control group")
def test_a_quota_limits_what_processes_take(module):
    """A tenth of a second is taken, whatever the machine does; the group is gone afterwards."""
    code = "import time\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-S", "-c", code]) as process:
        try:
            with module("shared").quota([process.pid], 0.1):
                before, start = taken(process.pid), time.monotonic()
                time.sleep(1)
                part = (taken(process.pid) - before) / (time.monotonic() - start)
        finally:
            process.kill()
    assert part < 0.25  # a period or two more at the ends of the second
    assert not list(Path("/sys/fs/cgroup").rglob(f"lorakit-{os.getpid()}"))


def taken(pid):
    """The processor's time that a process took, s: fields 14 and 15 of proc(5)'s stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_the_limit_counts_a_steps_products(module, tiny_dir):
    """Torch counts the same on transformers' model for r = 0, less half of attention's square."""
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, attn_implementation="eager")
    x = model.requires_grad_(False).get_input_embeddings()(torch.arange(64)[None]).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=x).logits.sum().backward()
    c = model.config
    square = c.num_hidden_layers * c.num_attention_heads * c.head_dim * 64**2
    causal, whole = 7 * square, 12 * square  # torch's counts the whole square, four in backward
    found = module("training").operations(str(tiny_dir), 64, 0) * 1e12
    assert found == pytest.approx(counter.get_total_flops() - whole + causal, rel=1e-6)


def test_what_training_refuses():
    done = run("training.py", "--busy", -1, folder=Path.cwd())
    assert done.returncode == 2
    assert "--busy must not be negative" in done.stderr


@pytest.mark.slow
def test_both_sides_learn_alike(tiny_dir, tmp_path):
    options = ["--steps", 20, "--batch", 2, "--dtype", "float32", "--rank", 2]
    done = run("parity.py", tiny_dir, *options, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for line in lines[3:5]:
        *_, ours, theirs, ratio = figures(line)
        assert ours / theirs == pytest.approx(ratio, abs=1e-3)
        assert ratio == pytest.approx(1, abs=0.03)
    assert not left_behind(tmp_path)


def test_what_parity_needs():
    done = run("parity.py", "--steps", 19, folder=Path.cwd())
    assert done.returncode == 2
    assert "--steps must be at least 20" in done.stderr


@pytest.mark.slow
def test_overhead(tmp_path):
    done = run("lora_overhead.py", "--repeats", 1, "--calls", 3, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[2:]
    assert len(rows) == 8
    assert all(min(figures(row.replace("float32", "").replace("bfloat16", ""))) > 0 for row in rows)


@pytest.mark.slow
def test_loading(tmp_path):
    done = run("load.py", "--size", "tiny", "--repeats", 1, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    for line, name in zip(lines[3:], ("lorakit", "transformers, bitsandbytes"), strict=True):
        assert line.startswith(name)
        median, least, most, peak, over, model_mb, x = figures(line.removeprefix(name))
        assert 0 < least <= median <= most
        assert 0 < over < peak
        assert x > 0
        # 512 x 128 bf16 of the embedding; 2 x 122,880 values in 4 bits and a bit more
        assert model_mb == pytest.approx((2 * 512 * 128 + 245760 * 0.516) / 1e6, abs=0.1)
    assert not left_behind(tmp_path)


@pytest.mark.slow
def test_a_peer_that_fails_is_a_row(tiny_dir, tmp_path):
    (tmp_path / "peft.py").write_text("raise ImportError('first line\\nno such peft')\n")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    options = ["--length", 8, "--steps", 1, *OURS, "--side", PEER]
    done = run("training.py", tiny_dir, *options, folder=temporary, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[3:]
    assert len(rows) == 2
    assert figures(rows[0].removeprefix("lorakit"))[0] > 0
    assert rows[1] == f"{PEER:24} ImportError: no such peft"
    assert not left_behind(temporary)


@pytest.mark.slow
def test_our_failure_is_the_exit_code(module, tmp_path):
    """A directory without weights: the peer fails too, and is told as well."""
    (tmp_path / "model").mkdir()
    config = module("load").config_of("tiny")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = run("load.py", "--model", tmp_path / "model", "--repeats", 2, folder=temporary)
    assert done.returncode == 1
    rows = done.stdout.splitlines()[3:]
    assert re.match(r"lorakit +LorakitError: .*model\.safetensors", rows[0])
    assert re.match(r"transformers, bitsandbytes +\w+: ", rows[1])
    assert done.stderr.count("lorakit: load") == 1  # it takes part no longer
    assert not left_behind(temporary)


def test_a_model_that_is_not_there(tmp_path):
    done = run("training.py", tmp_path / "no.gguf", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("training: LorakitError: ")
    assert not left_behind(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc for the children")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(number, tiny_dir, tmp_path):
    """Stopped while two sides train: no process of its own, no temporary directory."""
    command = [sys.executable, BENCHMARKS / "training.py", tiny_dir, "--length", "16"]
    command += ["--steps", "999", *OURS, "--side", "lorakit tuned"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    watchdog = threading.Timer(120, parent.kill)
    watchdog.start()
    try:
        for line in parent.stderr:
            if "step 2/" in line:
                break
        mine = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert len(mine) == 2
        assert len(left_behind(tmp_path)) == 1
        parent.send_signal(number)
        told = parent.stderr.read()  # its end: nobody holds the pipe any more
        assert parent.wait(timeout=60) == 128 + number
    finally:
        watchdog.cancel()
        parent.kill()
        parent.stderr.close()
    assert "Traceback" not in told
    assert not any(Path("/proc", pid).exists() for pid in mine)
    assert not left_behind(tmp_path)


# ---- the parts ----------------------------------------------------------------------------------


def rows_of_tiny(module, tiny_dir):
    return module("sides").Writer().rows(str(tiny_dir), "ragged", 0, 3, 2)["batches"]


def test_ragged_rows(module, tiny_dir):
    batches = rows_of_tiny(module, tiny_dir)
    assert [len(batch) for batch in batches] == [3, 3]
    tok, text = lk.load_tokenizer(tiny_dir), ""
    for ids, labels in chain.from_iterable(batches):
        assert 30 <= len(ids) <= 150
        prompt = labels.count(-100)
        assert labels == [-100] * prompt + ids[prompt:]
        assert len(ids) // 4 - 1 <= prompt <= 3 * len(ids) // 4
        text += tok.decode(ids)
    assert text in (Path(os.__file__).parent / "__future__.py").read_text()
    assert batches[0] != batches[1]


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_counts_label_tokens(module, tiny_dir, packing):
    """The truth is transformers' logits of each row alone, in fp64, not padded and not packed."""
    rows = rows_of_tiny(module, tiny_dir)[0]
    side = module("sides").Lorakit()
    side.model = lk.load_model(tiny_dir, dtype="float32")
    truth = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float64)
    total = count = 0
    with torch.no_grad():
        for ids, labels in rows:
            logits = truth(input_ids=torch.tensor([ids])).logits[0, :-1]
            total += F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum").item()
            count += sum(label != -100 for label in labels[1:])
        loss = side.loss(rows, packing).item()
    # fp32 against fp64
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_the_peer_packs_alike(module, tiny_dir):
    """Rows that are joined see themselves alone: the loss is the padded one."""
    rows = rows_of_tiny(module, tiny_dir)[0]
    side = module("sides").Peft()
    side.dtype = torch.float32
    side.model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    with torch.no_grad():
        joined, padded = (side.loss(rows, packing).item() for packing in (True, False))
        ids, labels = module("sides").joined(rows)
        neighbours = side.model(input_ids=ids, labels=labels, use_cache=False).loss.item()
    assert joined == pytest.approx(padded, rel=1e-5)  # fp32, in another order
    assert abs(neighbours - padded) > 1e-3  # the test can tell


def test_sides_that_disagree(module):
    training = module("training")

    def rows(*losses, trained=(5, 5)):
        names = ("lorakit", PEER)
        return [
            training.Row(name, losses=[loss], trained=n)
            for name, loss, n in zip(names, losses, trained, strict=True)
        ]

    wrong = training.disagreement
    assert wrong(rows(2.0, 2.03), "bfloat16") == ""
    assert "differ by more than 2.0%" in wrong(rows(2.0, 2.05), "bfloat16")
    assert "differ" in wrong(rows(2.05, 2.0), "float32")
    assert "not finite" in wrong(rows(2.0, math.nan), "bfloat16")
    assert "different numbers" in wrong(rows(2.0, 2.0, trained=(5, 6)), "bfloat16")
    failed = rows(2.0, 3.0)
    failed[1].error = "gone"
    assert wrong(failed, "bfloat16") == ""


def test_ratios_are_of_the_same_steps(module):
    training = module("training")
    ours = training.Row("lorakit", 2.0, 100, 300, rates=[40.0, 10.0, 6.0])
    peer = training.Row(PEER, 5.0, 200, 600, rates=[10.0, 5.0, 2.0])
    assert training.ratio(ours, peer) == (
        f"lorakit / {PEER}: tokens/s 3.00, peak 0.50, over the imports 0.50, "
        "loading 2.5 times as fast"
    )


def test_a_child_that_is_killed(module):
    children = module("children")
    with children.Child("writer") as child:
        assert child.started()["peak_mb"] > 50  # torch is in there
        child.process.send_signal(signal.SIGKILL)
        with pytest.raises(children.SideError, match="was ended by SIGKILL"):
            child.ask("machine")


@pytest.mark.slow
def test_random_checkpoint_is_read_by_transformers(module, tmp_path):
    """The file is written by hand: every tensor where its name says."""
    config = module("load").config_of("tiny")
    module("sides").Writer().random_model(str(tmp_path), config)
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told["missing_keys"]) and not any(told["unexpected_keys"])  # noqa: PT018
    assert model.dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == 2
    assert (model.model.norm.weight == 1).all()
    weight = model.model.layers[1].mlp.down_proj.weight.float()
    # of 24,576 values: the deviation itself to 0.5 %, so 3 % is six of its own
    assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not torch.equal(weight, model.model.layers[0].mlp.down_proj.weight.float())


@pytest.mark.slow
def test_shapes_are_models(module):
    """A model of each name of shapes.py has the tensors that transformers' own class reads."""
    shapes = module("shapes")
    for name in shapes.SHAPES:
        values = shapes.config_of(name, 4)
        with torch.device("meta"):
            theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
            ours = Decoder(lk.ModelConfig.from_hf(values))
        found = dict(ours.named_parameters())
        found |= {key: table.weight for key, table in host_tables(ours).items()}
        wanted = {key: x.shape for key, x in theirs.state_dict().items() if key != "lm_head.weight"}
        assert {key: x.shape for key, x in found.items()} == wanted
