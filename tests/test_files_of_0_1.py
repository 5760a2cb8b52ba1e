"""Files that lorakit 0.1.0 wrote still load, and its runs still resume.

`files_of_0_1/` was written by commit 13bf3d9: a tiny Llama, the same packed in NF4, an adapter of
each method, and a run of four steps whose last checkpoint was taken out. `logits.safetensors` holds
the logits of the last token of a prompt, as 0.1.0 computed them on a CPU with AVX-512.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from tests.conftest import LOGITS, ROWS

FILES = Path(__file__).parent / "files_of_0_1"
ADAPTERS = sorted(path.name for path in (FILES / "adapters").iterdir())


@pytest.fixture(scope="module")
def expected():
    return load_file(FILES / "logits.safetensors")


def logits(model):
    ids = torch.tensor([lk.load_tokenizer(FILES / "model").encode("What is 2 plus 3? It is")])
    model.eval()
    with torch.no_grad():
        return model(ids)[0, -1]


@pytest.mark.parametrize("name", ["model", "packed"])
def test_models_load(name, expected):
    found = logits(lk.load_model(FILES / name, dtype="float32"))
    torch.testing.assert_close(found, expected[name], rtol=0, atol=LOGITS)


def config_of(path):
    """The config of an adapter's files, with the names of layers cut to their last part."""
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    for key in ("target_modules", "feedforward_modules"):
        config[key] = {name.rpartition(".")[2] for name in config.get(key) or ()}
    return config


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_load_and_are_written_again(name, expected, tmp_path):
    """The tensors have the same bytes and the config the same values, but for names of layers.

    0.1.0 wrote the full name of every layer; now the shortest names that select them are written,
    as servers read them. The files select the same layers: the logits are the same bits.
    """
    model = lk.load_model(FILES / "model", dtype="float32")
    lk.load_adapter(model, FILES / "adapters" / name)
    torch.testing.assert_close(logits(model), expected[name], rtol=0, atol=LOGITS)
    lk.save_adapter(model, tmp_path)
    file = "adapter_model.safetensors"
    assert (tmp_path / file).read_bytes() == (FILES / "adapters" / name / file).read_bytes()
    assert config_of(tmp_path) == config_of(FILES / "adapters" / name)
    again = lk.load_model(FILES / "model", dtype="float32")
    lk.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_a_run_resumes(expected, tmp_path):
    """It goes on from the adapter and the optimizer's state that 0.1.0 saved.

    Dropout draws other masks than 0.1.0 did, which moves the logits of the last step by 0.045. A
    run that goes on without the optimizer's state is off by 0.22, and the adapter as it was saved
    by 1.06.
    """
    shutil.copytree(FILES / "run", tmp_path / "run")
    tok, model = lk.load_tokenizer(FILES / "model"), lk.load_model(FILES / "model", dtype="float32")
    torch.manual_seed(0)
    # 0.1.0's alpha where none is named is 8
    lora = lk.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    lk.attach(model, lora)
    config = lk.TrainConfig(
        str(tmp_path / "run"),
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        eval_steps=2,
        resume="auto",
    )
    result = lk.train(model, tok, {"train": ROWS, "validation": ROWS[:4]}, config)
    assert [each["step"] for each in result.evaluations] == [2, 4]
    torch.testing.assert_close(logits(model), expected["run"], rtol=0, atol=0.1)
