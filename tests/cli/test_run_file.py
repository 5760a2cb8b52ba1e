"""Run files: YAML, overrides, and one clear sentence for anything wrong."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.cli.main import main
from lorakit.cli.run_file import read_run_file, yaml_value

RUN_KEYS = ["model", "data", "lora", "quantize", "dtype", "seed", "train_on", "max_steps", "x"]
YAML_PIECES = b"\n|  |[|]|{|}|&a |*a|- |? |m|1|2e-4|!!int |!!timestamp x|!!bool |2024-99-99|'|<<: "

YAML = st.lists(
    st.one_of(
        st.sampled_from(RUN_KEYS).map(lambda key: f"{key}: ".encode()),
        st.sampled_from(YAML_PIECES.split(b"|")),
        st.binary(max_size=3),
    ),
    max_size=14,
).map(b"".join)


@settings(max_examples=300)
@given(YAML)
def test_any_bytes_give_a_run_or_one_clear_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "run.yaml"
    path.write_bytes(data)
    try:
        run = lk.RunConfig.from_dict(read_run_file(path, []), "run.yaml")
    except lk.LorakitError as error:
        assert "run.yaml" in str(error) or "dtype" in str(error)
    else:
        assert run.model


def test_deep_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text("[" * 100_000)
    with pytest.raises(lk.LorakitError, match="is not valid YAML"):
        read_run_file(tmp_path / "run.yaml", [])


def test_a_key_that_is_given_twice(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\nmax_steps: 1\nmax_steps: 2\n")
    with pytest.raises(lk.LorakitError, match="max_steps is given twice: keep one"):
        read_run_file(tmp_path / "run.yaml", [])


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [1", "not valid YAML"), ("- 1", "must hold a mapping"), ("", "must hold a mapping")],
)
def test_bad_run_file(tmp_path, capsys, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert main(["train", str(path)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "what"),
    [("none.yaml", "does not exist"), ("", "is no file"), ("file/run.yaml", "is no file")],
)
def test_no_run_file(tmp_path, capsys, name, what):
    (tmp_path / "file").write_text("")
    assert main(["train", str(tmp_path / name)]) == 1
    said = f"lorakit: {tmp_path / name} {what}; give the path of a run file, which is YAML and "
    assert capsys.readouterr().err == said + "says at least model and data\n"


def test_an_override_reaches_into_a_mapping_of_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nlora:\n  r: 4\n")
    overrides = ["lora.r=8", "data.train=a.jsonl", "learning_rate=2e-4", "resume="]
    assert read_run_file(path, overrides) == {
        "model": "m",
        "lora": {"r": 8},
        "data": {"train": "a.jsonl"},
        "learning_rate": 2e-4,
        "resume": None,
    }
    with pytest.raises(lk.LorakitError, match="'model.x=1': model is not a mapping in"):
        read_run_file(path, ["model.x=1"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("1e3", 1e3), (".5E2", 50.0), ("1_000", 1000), ("3", 3), ("e3", "e3")],
)
def test_numbers_are_those_of_yaml_1_2(text, value):
    found = yaml_value(f"x={text}")
    assert found == value
    assert type(found) is type(value)
