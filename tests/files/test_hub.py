"""Files are found on disk, in the Hub's cache, or nowhere."""

import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

import lorakit as lk
from lorakit.files import hub
from lorakit.files.local import copy_file
from tests.conftest import BESIDE
from tests.models.damage import fails


def test_hub_id_from_the_local_cache(tiny_dir, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--tiny-llama"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_dir, repo / "snapshots" / commit)
    script = (
        "import lorakit as lk, sys\n"
        "m = lk.load_model('someone/tiny-llama', dtype='float32')\n"
        "t = lk.load_tokenizer('someone/tiny-llama')\n"
        "print(len(t), m.config.vocab_size)\n"
        "try: lk.load_model('someone/absent')\n"
        "except lk.LorakitError as e: print(e)\n"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.strip().splitlines()
    assert first == "259 300"
    assert second.startswith("'someone/absent' is no directory here, and the Hub did not give it:")


def test_missing_directory(tmp_path):
    fails(tmp_path / "nowhere", "nowhere does not exist")
    fails("./nowhere", "nowhere does not exist")
    fails("~nobody-of-this-name/model", "is no path")
    fails("a\0b", "is no path|does not exist")
    fails(tmp_path / "model.gguf", r"model\.gguf does not exist")
    (tmp_path / "file.txt").write_text("")
    fails(tmp_path / "file.txt", "neither a model directory nor")


@pytest.mark.parametrize("size", ["8B", "3B", "1B-Instruct"])
def test_a_model_that_never_was(size):
    fails(f"meta-llama/Llama-3.3-{size}", "Llama 3.3 was published with 70B parameters only; 8B is")


@pytest.mark.parametrize("name", ["llama", "./a/b", "/a/b", "a/b/c", "a/b.gguf", "../b", "a\\b"])
def test_only_ids_are_asked_of_the_hub(monkeypatch, name):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(a))
    with pytest.raises(lk.LorakitError, match="does not exist"):
        hub.resolve(name, hub.MODEL_FILES)
    assert not asked


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pkl", "modeling_llama.py", "tokenization.py"]
)
def test_no_pickle_and_no_code_is_fetched(name):
    patterns = [*hub.MODEL_FILES, *hub.TOKENIZER_FILES, *hub.PROCESSOR_FILES]
    assert not any(fnmatch(name, pattern) for pattern in patterns)


def test_what_save_model_hands_on_is_fetched_with_a_model(copy, tmp_path, monkeypatch):
    """Every file of tokenizer and processors comes from a Hub id, by the Hub's own filter."""
    beside = BESIDE | {"pytorch_model.bin": b"pickled", "tokenization_mine.py": b"code"}
    for name, data in beside.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(data)

    def snapshot(_, allow_patterns):
        names = [file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            copy_file(copy / name, tmp_path / "snapshot" / name)
        return tmp_path / "snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = lk.load_model("some/model", dtype="float32")
    lk.save_model(model, tmp_path / "saved")
    for name, data in BESIDE.items():
        assert (tmp_path / "saved" / name).read_bytes() == data, name
    names = {file.name for file in (tmp_path / "snapshot").iterdir()}
    assert not names & (beside.keys() - BESIDE.keys())
    shutil.rmtree(tmp_path / "snapshot")
    lk.load_tokenizer("some/model").save(tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer" / "tokenizer.model").read_bytes() == BESIDE["tokenizer.model"]
