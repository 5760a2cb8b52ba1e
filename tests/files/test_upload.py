"""Pushing to a Hub and pulling from it: huggingface_hub speaks to a small Hub on loopback."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import lorakit as lk
from tests.export.models import write_model
from tests.files.local_hub import Hub, local_hub

BASE = "maker/base"
LICENSE = b"---\nlicense: llama3.2\nlanguage:\n- en\n---\nA base model.\n"


@pytest.fixture
def hub():
    with local_hub() as running:
        running.add(BASE, {"README.md": LICENSE})
        yield running


@pytest.fixture
def adapter(tiny_dir, tmp_path) -> Path:
    """An adapter with what a run leaves around it."""
    torch.manual_seed(0)
    model = lk.attach(
        lk.load_model(tiny_dir, dtype="float32"), lk.LoraConfig(init_lora_weights=False)
    )
    path = tmp_path / "runs" / "mine"
    lk.save_adapter(model, path, base_model=BASE)
    lk.load_tokenizer(tiny_dir).save(path)
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "learning_rate": 0.1}\n')
    (path / ".env").write_text("a secret")
    (path / "optimizer.pt").write_text("a state")
    (path / "checkpoint-1").mkdir()
    (path / "checkpoint-1" / "state.safetensors").write_text("another")
    return path


def push(hub: Hub, path: Path, *options: str, **env: str):
    return hub.run(path.parent, "-m", "lorakit", "push", path.name, *options, **env)


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_an_adapter_goes_to_the_hub_and_comes_back(hub, adapter, tiny_dir, tmp_path):
    """Only what belongs to it is uploaded, and a machine that has none of it computes the same."""
    done = push(hub, adapter, "me/mine", "--private")
    assert (done.returncode, done.stdout) == (0, f"{hub.endpoint}/me/mine\n"), done.stderr
    assert "the license of the base model is llama3.2" in done.stderr
    repo = hub.repos["me/mine"]
    assert repo.private
    files = repo.files()
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } | {name for name in contents(adapter) if name == "chat_template.jinja"}
    assert (
        files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    )
    found = ModelCard(files["README.md"].decode())
    assert (found.data.base_model, found.data.license) == (BASE, "llama3.2")
    assert 'load_adapter(model, "me/mine")' in found.text

    there = tmp_path / "elsewhere"
    there.mkdir()
    script = (
        "import sys, torch, lorakit as lk\n"
        "model = lk.load_model(sys.argv[1], dtype='float32')\n"
        "lk.load_adapter(model, 'me/mine')\n"
        "print(len(lk.load_tokenizer('me/mine')), lk.fetch_adapter('me/mine').is_dir())\n"
        "torch.save(model(torch.arange(9)[None]).detach(), 'logits.pt')\n"
    )
    for offline in ("0", "1"):  # the second time from the cache
        done = hub.run(there, "-c", script, str(tiny_dir), HF_HUB_OFFLINE=offline)
        assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("259 True\n")
    model = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), adapter)
    assert torch.equal(torch.load(there / "logits.pt"), model(torch.arange(9)[None]))


def test_what_others_wrote_on_the_hub_stays(hub, adapter):
    """A README.md from the web gets metadata only, and one that was edited here goes there."""
    hub.add("me/mine", {"README.md": b"---\nlicense: mit\n---\nWritten on the web.\n"})
    done = push(hub, adapter, "me/mine")
    assert "me/mine has a README.md of its own, which stays" in done.stderr
    there = hub.repos["me/mine"].files()["README.md"].decode()
    assert there.startswith("---\nlicense: mit\nbase_model: maker/base\n")
    assert there.endswith("---\nWritten on the web.\n")
    (adapter / "README.md").write_text("Mine.\n")
    assert push(hub, adapter, "me/mine", "--revision", "v2").returncode == 0
    repo = hub.repos["me/mine"]
    assert repo.files("v2")["README.md"].decode().endswith("---\n\nMine.\n")
    assert repo.files("main")["README.md"].decode() == there
    commits = len(repo.commits)
    assert push(hub, adapter, "me/mine", "--revision", "v2").returncode == 0
    assert len(repo.commits) <= commits + 1  # weights are there already: nothing is sent twice
    assert sum("PUT /lfs" in request for request in hub.requests) == 1


@pytest.mark.parametrize(
    ("said", "env"),
    [
        ("offline mode is enabled", {"HF_HUB_OFFLINE": "1"}),
        ("Connection refused", {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        ("You have no right to write here (log in with `hf auth login`", {"token": "hf_reader"}),
        ("(log in with `hf auth login`", {"token": "hf_nobody"}),
    ],
    ids=["offline", "unreachable", "forbidden", "unknown"],
)
def test_a_refused_upload_loses_nothing(hub, adapter, said, env):
    before = contents(adapter)
    done = push(hub, adapter, "me/mine", **env)
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("lorakit: mine was not uploaded to me/mine, and is whole on this disk: ")
    assert said in last
    assert last.endswith("; try again with `lorakit push mine me/mine`")
    assert {n: data for n, data in contents(adapter).items() if n in before} == before
    assert "me/mine" not in hub.repos
    assert push(hub, adapter, "me/mine").returncode == 0  # as the message says


def test_wrong_pushes(hub, adapter, tmp_path):
    hub.add("me/public", {})
    done = push(hub, adapter, "me/public", "--private")
    assert "me/public is there already, and public: nothing was uploaded" in done.stderr
    assert set(hub.repos["me/public"].files()) == {".gitattributes"}
    for name in ("mine", "a/b/c", "me/mine:Q4_K_M", "./x"):
        with pytest.raises(lk.LorakitError, match="is no repository: give organization/name"):
            lk.push_to_hub(adapter, name)
    with pytest.raises(lk.LorakitError, match="holds no adapter"):
        lk.push_to_hub(tmp_path, "me/mine")
    with pytest.raises(lk.LorakitError, match="neither a directory nor a .gguf file"):
        lk.push_to_hub(tmp_path / "nowhere", "me/mine")


def test_a_card_that_the_hub_refuses(hub, adapter):
    """The Hub's own words come through, before any file is sent."""
    (adapter / "README.md").write_text("---\nbase_model: /data/me/base\n---\n")
    done = push(hub, adapter, "me/mine")
    assert done.returncode == 1
    assert '"base_model" with value "/data/me/base" is not valid' in done.stderr
    assert not any("PUT" in request for request in hub.requests)


def test_a_gguf_file_by_its_type(hub, tmp_path):
    """organization/name:TYPE is the one file of that type, also from the cache."""
    file = tmp_path / "tiny-Q8_0.gguf"
    lk.export_gguf(write_model(tmp_path / "model", "llama"), file, quantization="q8_0")
    done = push(hub, file, "me/tiny-GGUF", "--base-model", BASE)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["me/tiny-GGUF"]
    assert set(repo.files()) == {".gitattributes", "README.md", "tiny-Q8_0.gguf"}
    assert "llama-server -hf me/tiny-GGUF:Q8_0" in repo.files()["README.md"].decode()
    assert not (tmp_path / "README.md").exists()  # beside a file there may be anything
    others = ["mmproj-Q8_0.gguf", "UD-Q4_K.gguf", "big-Q6_K-00001-of-00002.gguf", "a-F16.gguf"]
    repo.commit("main", dict.fromkeys([*others, "b-F16.gguf", "IQ4_K.gguf"], b"x"))
    script = (
        "import lorakit as lk\n"
        "print(lk.load_model('me/tiny-GGUF:q8_0').source.path.name)\n"
        "print(len(lk.load_tokenizer('me/tiny-GGUF:tiny-Q8_0.gguf')))\n"
        "for tag in ('Q2_K', 'Q6_K', 'F16', 'Q4_K'):\n"
        "    try: print(lk.fetch_adapter(f'me/tiny-GGUF:{tag}').name)\n"
        "    except lk.LorakitError as error: print(error)\n"
    )
    done = hub.run(tmp_path, "-c", script)
    name, size, absent, part, several, one = done.stdout.splitlines()
    assert name == "tiny-Q8_0.gguf"
    assert int(size) > 256
    assert "me/tiny-GGUF holds no file of Q2_K: give the name of one after the colon, of" in absent
    assert "tiny-Q8_0.gguf" in absent
    assert "big-Q6_K-00001-of-00002.gguf is one part of several" in part
    assert "holds several files of F16" in several
    assert "a-F16.gguf, b-F16.gguf" in several
    assert one == "UD-Q4_K.gguf"
    done = hub.run(tmp_path, "-c", script, HF_HUB_OFFLINE="1")
    assert done.stdout.splitlines()[:2] == [name, size], done.stderr


def run_file(tiny_dir: Path, tmp_path: Path, **values) -> Path:
    rows = [{"prompt": f"{i} plus {i}", "completion": f" is {2 * i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = {
        "model": str(tiny_dir),
        "data": "rows.jsonl",
        "dtype": "float32",
        "output_dir": "out",
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "push_to_hub": True,
        "hub_model_id": "me/run",
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(run | values))  # JSON is YAML
    return path


def test_a_run_uploads_its_adapter_at_the_end(hub, tiny_dir, tmp_path):
    path = run_file(tiny_dir, tmp_path)
    done = hub.run(tmp_path, "-m", "lorakit", "train", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"uploaded to {hub.endpoint}/me/run\n")
    repo = hub.repos["me/run"]
    assert repo.messages == ["", "Upload the adapter of step 4 with lorakit"]
    assert not any("checkpoint" in name or "jsonl" in name for name in repo.files())
    text = repo.files()["README.md"].decode()
    assert "| frozen weights | float32 |" in text
    assert "| steps | 4 |" in text
    assert str(tmp_path) not in text
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_a_run_uploads_with_its_checkpoints(hub, tiny_dir, tmp_path):
    path = run_file(tiny_dir, tmp_path, hub_strategy="checkpoint", hub_private_repo=True)
    done = hub.run(tmp_path, "-m", "lorakit", "train", str(path))
    assert done.returncode == 0, done.stderr
    repo = hub.repos["me/run"]
    assert repo.private
    messages = [f"Upload the adapter of step {step} with lorakit" for step in (2, 4)]
    assert repo.messages == ["", *messages]
    files = repo.files()
    for file in (tmp_path / "out" / "checkpoint-4").iterdir():
        assert files[f"last-checkpoint/{file.name}"] == file.read_bytes(), file.name
    assert files["adapter_model.safetensors"] == files["last-checkpoint/adapter_model.safetensors"]


def test_a_failed_upload_costs_no_run(hub, tiny_dir, tmp_path):
    """The bytes are those of a run that uploads nothing, and the exit code tells."""
    path = run_file(tiny_dir, tmp_path, hub_strategy="every_save")
    done = hub.run(tmp_path, "-m", "lorakit", "train", str(path), token="hf_reader")
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("out was not uploaded to me/run, and is whole on this disk") == 2
    assert "adapter in out\n" in done.stdout
    assert "me/run" not in hub.repos
    kept = ["push_to_hub=false", "hub_model_id=null", "hub_strategy=end", "output_dir=plain"]
    requests = len(hub.requests)
    done = hub.run(tmp_path, "-m", "lorakit", "train", str(path), *kept)
    assert done.returncode == 0, done.stderr
    assert len(hub.requests) == requests  # nothing is sent or asked unless the run file says so
    weights = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "plain")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
