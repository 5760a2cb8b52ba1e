"""`lorakit plan`: what it prints, what it refuses and how it ends. Most forecasts here are by
arithmetic; tests/training/memory_plan has those of lorakit's own step."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import lorakit as lk
from lorakit.cli import plan as plan_verb
from lorakit.cli.main import main
from lorakit.training.memory_plan import before

DENSE = ["quantize=null"]


@pytest.fixture
def planned(run_file, monkeypatch):
    """The run file with a terminal of 100 columns, so that each line is the same everywhere."""
    monkeypatch.setenv("COLUMNS", "100")
    return str(run_file)


@pytest.mark.usefixtures("forecasts")
def test_the_forecast_of_a_run_file(planned, capsys):
    assert main(["plan", planned, "--memory", "2GB"]) == 0
    out = capsys.readouterr().out
    longest = json.loads(_json(planned, capsys, "--memory", "2GB"))["plan"]["at_peak"]
    assert ", weights in nf4, LoRA of rank 4, 8 x " in out
    assert " tokens at a time, on a GPU of 2.0 GB\n\n" in out
    assert "CUDA context (allowance)          600 MB       600 MB  #" in out
    assert "the peak is in backward (loading 650 kB, forward " in out
    assert "it fits a GPU of 2.0 GB: 1.4 GB are left\n\nwhat would help, each by itself:\n" in out
    assert "  gradient_checkpointing=true: " in out
    assert longest["activations"] < 100 * 8 * 64  # the rows of the file, not max_seq_length


def _json(planned, capsys, *options):
    capsys.readouterr()
    main(["plan", planned, "--json", *options])
    return capsys.readouterr().out


@pytest.mark.usefixtures("forecasts")
def test_the_largest_batch_is_that_of_a_run_as_large(planned, capsys):
    """Many rows have fewer blocks that keep gate and up, if mlp_activations is auto. Those of
    the run file, for which all do, decide nothing."""
    options, found = ["--memory", "602MB", "--largest", "batch"], {}
    for choice in ("auto", "recompute", "keep"):
        told = json.loads(_json(planned, capsys, *options, f"mlp_activations={choice}"))
        found[choice] = told["largest"]["batch"]
    assert found["auto"] == found["recompute"] > found["keep"] > 0


@pytest.mark.usefixtures("forecasts")
def test_json_holds_the_same(planned, capsys):
    told = json.loads(_json(planned, capsys, "--device", "4090"))
    assert told["device"]["name"] == "RTX 4090 24GB"
    assert told["usable"] == lk.find_card("RTX 4090").usable
    assert told["fits"] is True
    assert sum(told["plan"]["at_peak"].values()) == told["plan"]["peak"]
    assert {"gradient_checkpointing": "true"} in [each["settings"] for each in told["savings"]]
    found = json.loads(_json(planned, capsys, "--device", "4090", "--largest", "rank", "--fit"))
    assert found["largest"] == {"rank": 4096}
    assert found["fit"]["settings"] == {}
    assert "savings" not in found


def test_several_devices_and_weights_on_the_host(planned, capsys, forecasts):
    """The run file's keys come to the forecast; `auto` divides no weights of this size."""
    several = ["--memory", "2GB", "--ranks", "2"]
    for words, shard, said in (
        (["shard=full"], "full", "weights in nf4, divided among 2 devices, LoRA"),
        ([], "none", "weights in nf4, whole on each of 2 devices, LoRA"),
        (["offload_weights=true"], "none", "devices, waiting in host memory, LoRA"),
    ):
        assert main(["plan", planned, *words, *several]) == 0
        assert said in capsys.readouterr().out
        assert {each["ranks"] for each in forecasts} == {2}
        assert forecasts[0]["shard"] == shard
        assert forecasts[0]["offload_weights"] == (words == ["offload_weights=true"])
        forecasts.clear()


@pytest.mark.usefixtures("forecasts")
def test_settings_that_fit_are_a_command(planned, capsys):
    """What --fit prints is a run that fits: forecast again, it ends with 0."""
    cpu = ["--device", "cpu"]
    assert main(["plan", planned, *DENSE, *cpu, "--memory", "1.2MB", "--fit"]) == 1
    out = capsys.readouterr().out
    assert "it does not fit the CPU: " in out
    *_, head, command = out.splitlines()
    assert head.startswith("cheapest settings that fit, with ")
    words = command.split()
    assert words[:4] == ["lorakit", "train", planned, *DENSE]
    assert main(["plan", planned, *cpu, "--memory", "1.2MB", *words[3:]]) == 0
    capsys.readouterr()
    assert main(["plan", planned, *cpu, "--memory", "2MB", "--fit"]) == 0
    assert capsys.readouterr().out.endswith("it fits as it is\n")
    assert main(["plan", planned, *cpu, "--memory", "1kB", "--fit"]) == 1
    assert "nothing makes it fit 1.0 kB; the least is " in capsys.readouterr().out


@pytest.mark.usefixtures("forecasts")
def test_largest(planned, capsys):
    options = ["--device", "cpu", "--memory", "2MB"]
    assert main(["plan", planned, *options, "--largest", "batch"]) == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("largest")]
    rows = int(line.removeprefix("largest rows at a time: "))
    assert main(["plan", planned, *options, f"per_device_train_batch_size={rows}"]) == 0
    assert main(["plan", planned, *options, f"per_device_train_batch_size={rows + 1}"]) == 1
    capsys.readouterr()
    assert main(["plan", planned, "--device", "cpu", "--memory", "9kB", "--largest", "rank"]) == 1
    assert "largest rank: not even the smallest fits" in capsys.readouterr().out


def test_a_model_without_a_run_file_and_without_rows(
    tiny_dir, tmp_path, planned, capsys, forecasts
):
    (tmp_path / "model").mkdir()
    shutil.copy(tiny_dir / "config.json", tmp_path / "model")  # no weights, no tokenizer
    assert main(["plan", str(tmp_path / "model"), "lora.r=2", "--memory", "2GB"]) == 0
    assert "LoRA of rank 2, 8 x 1024 tokens" in capsys.readouterr().out
    assert main(["plan", planned, f"model={tmp_path / 'model'}", "--memory", "2GB"]) == 0
    assert capsys.readouterr().out.startswith("the rows cannot be counted (")
    assert main(["plan", planned, "data=gone.jsonl", "--memory", "2GB"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said == "gone.jsonl is not there: rows of 1024 tokens are planned for"
    assert forecasts[-1]["tokens"] == 1024


def test_an_adapter_to_go_on_from_is_planned_as_it_is(
    planned, tiny_dir, tmp_path, capsys, forecasts
):
    """The run file's `lora` is left out, since the adapter has settings of its own."""
    model = lk.attach(lk.load_model(tiny_dir), lk.LoraConfig(r=3, target_modules=["v_proj"]))
    lk.save_adapter(model, tmp_path / "adapter")
    values = yaml.safe_load(Path(planned).read_text()) | {"adapter": str(tmp_path / "adapter")}
    del values["lora"]
    Path(planned).write_text(yaml.safe_dump(values))
    assert main(["plan", planned, "--memory", "2GB"]) == 0
    assert "LoRA of rank 3" in capsys.readouterr().out
    assert {each["lora"].r for each in forecasts} == {3}
    assert forecasts[0]["lora"].target_modules == ["v_proj"]


@pytest.mark.usefixtures("forecasts")
def test_a_data_set_that_the_hub_does_not_give(planned, capsys, monkeypatch):
    def away(*_, **__):
        raise lk.LorakitError("org/rows cannot be read as a data set")

    monkeypatch.setattr(lk, "open_data", away)
    assert main(["plan", planned, "data=org/rows", "--memory", "2GB"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "the rows cannot be counted (org/rows cannot be read as a data set): rows of 1024 tokens "
        "are planned for"
    )


def test_a_model_alone_makes_texts_without_an_adapter(tiny_dir, capsys, forecasts):
    assert main(["plan", str(tiny_dir), "--generate", "1,8,8", "--memory", "2GB"]) == 0
    assert "weights in bfloat16, 1 texts of 8 + 8 tokens, on" in capsys.readouterr().out
    assert forecasts[-1]["lora"] is None


def test_texts_instead_of_training(planned, capsys, forecasts):
    assert main(["plan", planned, "--generate", "4,512,128", "--memory", "2GB"]) == 0
    out = capsys.readouterr().out
    assert "4 texts of 512 + 128 tokens" in out
    assert "what would help" not in out
    assert forecasts[-1]["generate"] == (4, 512, 128)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml"], "nowhere.yaml does not exist; give the path of a run file"),
        (["/nowhere"], "/nowhere"),
        (["/nowhere", "data.train=rows.jsonl"], "data is not a mapping in the settings of the run"),
        (["RUN", "--ranks", "0"], "--ranks is 0"),
        (["RUN", "--generate", "1,1000000000,1"], "a prompt has at most 16,777,216 tokens"),
        (["RUN", "data=gone", "max_seq_length=1000000000"], "not 1,000,000,000"),
        (["RUN", "--generate", "1,8,8", "--fit"], "leave out --generate"),
        (["RUN", "--device", "RTX 4900"], "did you mean 'RTX 4090 24GB'"),
        (["RUN", "--device", "V100"], "its kernels need compute capability 7.5"),
        (["RUN", "learning_rat=1", "--memory", "1GB"], "did you mean 'learning_rate'"),
        (["RUN", "per_device_train_batch_size=atuo", "--memory", "1GB"], "int or auto, not 'atuo'"),
        (["RUN", "model=/nowhere", "data=gone", "--memory", "1GB"], "/nowhere"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments, said, run_file, capsys):
    arguments = [str(run_file) if each == "RUN" else each for each in arguments]
    assert main(["plan", *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "24"], "'24' is no size of memory; write a number and its unit"),
        (["--memory", "-1GB"], "expected one argument"),
        (["--generate", "4,512"], "not of the form ROWS,PROMPT,NEW"),
        (["--largest", "batches"], "invalid choice: 'batches'"),
        (["--ranks", "two"], "is not a whole number"),
    ],
)
def test_wrong_usage(arguments, said, run_file, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(run_file), *arguments])
    assert said in capsys.readouterr().err


def test_ctrl_c(run_file, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_verb.lk, "settled_run", interrupted)
    assert main(["plan", str(run_file), "--memory", "1GB"]) == 130
    assert capsys.readouterr().err == "lorakit: interrupted\n"


@pytest.mark.usefixtures("forecasts")
def test_train_refuses_what_cannot_fit(run_file, tmp_path, capsys, monkeypatch):
    """The refusal comes before the model is loaded, with the words that make it fit."""
    values = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump({**values, "quantize": None}))
    monkeypatch.setattr(before, "free_memory", lambda device: 1_200_000)
    monkeypatch.setattr(lk, "load_model", None)
    assert main(["train", str(run_file)]) == 1
    error = capsys.readouterr().err
    assert "of memory, and 1.2 MB are free: with " in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_forecast_of_lorakits_own_step(planned, tiny_dir, capsys):
    """The frozen tensors that a pretended GPU keeps between steps are those of the model."""
    told = json.loads(_json(planned, capsys, "--device", "4090", "--largest", "batch"))
    model = lk.load_model(tiny_dir, quantize="nf4")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = told["plan"]["resident"]
    frozen = sum(
        kept.get(name, 0) for name in ("packed weights", "scales", "embeddings", "weights")
    )
    assert weights <= frozen + kept.get("rounding", 0) + kept.get("head", 0)
    assert told["plan"]["phases"].keys() >= {"loading", "forward", "head", "backward", "optimizer"}
    assert told["largest"]["batch"] == 4096
