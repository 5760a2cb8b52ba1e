"""Cards: what they tell, what the Hub's own classes read in them, and what of others they leave."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.export import card
from lorakit.files.gguf import write_gguf
from tests.files.local_hub import complaints

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIG = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "use_dora": False,
    "base_model_name_or_path": BASE,
}


def adapter(path: Path, **config) -> Path:
    """Make a directory with the names of an adapter's files; a card reads no weight."""
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    return path


def test_the_card_of_a_run(tmp_path):
    """The Hub's classes read the metadata, and the tables hold the numbers of the run."""
    path = adapter(tmp_path / "mine")
    steps = [{"step": i, "loss": 4.0 / i, "learning_rate": 1e-4} for i in range(1, 41)]
    lines = [*map(json.dumps, steps), '{"step": 40, "eval_loss": 0.5, "eval_accuracy": 0.75}', "{"]
    (path / "metrics.jsonl").write_text("\n".join(lines))
    file = lk.write_card(path, settings={"objective": "sft", "a|b": "c\n|d"})
    found = ModelCard.load(file)
    assert found.data.base_model == BASE
    assert found.data.library_name == "peft"
    assert found.data.pipeline_tag == "text-generation"
    assert found.data.tags == ["lora", "lorakit", "sft"]
    assert found.data.to_dict()["base_model_relation"] == "adapter"
    assert found.data.license is None  # nobody said it
    assert not complaints(file.read_text())
    assert "| 1 to 4 | 2.0833 | 0.0001 |" in found.text  # (4 + 2 + 4/3 + 1) / 4
    assert "| step | loss | accuracy |\n| --- | --- | --- |\n| 40 | 0.5 | 0.75 |" in found.text
    assert "| target_modules | q_proj, v_proj |" in found.text
    assert "| a\\|b | c \\|d |" in found.text
    assert "use_dora" not in found.text
    assert f'lk.load_model("{BASE}")' in found.text


def test_no_path_of_this_machine_gets_into_a_card(tmp_path):
    """A base model in a directory is no base_model, but its card has the license."""
    base = tmp_path / "secret" / "my-base"
    base.mkdir(parents=True)
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE.md\n"
        "language: [en, de]\n---\n"
    )
    path = adapter(tmp_path / "mine", base_model_name_or_path=str(base))
    text = lk.write_card(path).read_text()
    assert "secret" not in text
    metadata, body = card.split(text, "")
    assert "base_model" not in metadata
    assert (metadata["license"], metadata["license_name"]) == ("other", "tiny")
    assert "license_link" not in metadata  # of a file that lies elsewhere
    assert metadata["language"] == ["en", "de"]
    assert "`my-base`" in body
    assert not complaints(text)


def test_a_text_of_lorakit_is_written_again_until_somebody_edits_it(tmp_path):
    path = adapter(tmp_path / "mine")
    file = lk.write_card(path, settings={"steps": 1})
    lk.write_card(path, settings={"steps": 2})
    assert "| steps | 2 |" in file.read_text()
    lk.write_card(path)  # which knows no settings, and so keeps those that are there
    assert "| steps | 2 |" in file.read_text()
    file.write_text(edited := file.read_text().replace("# mine", "# Mine"))
    lk.write_card(path, settings={"steps": 3})
    assert file.read_text() == edited


def test_a_license_is_one_thing(tmp_path):
    """A license that somebody chose gets no name and no link of the base model's."""
    path = adapter(tmp_path / "mine")
    (path / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\n---\n")
    metadata, text = card.split(lk.write_card(path, base_model=str(base)).read_text(), "")
    assert metadata["license"] == "mit"
    assert "license_name" not in metadata
    assert text == "Mine.\n"


def test_kinds(tmp_path):
    gguf = tmp_path / "ggufs"
    gguf.mkdir()
    (gguf / "tiny-Q4_K_M.gguf").write_bytes(bytes(1_500_000))
    text = lk.write_card(gguf, base_model=BASE).read_text()
    metadata = card.split(text, "")[0]
    assert (metadata["library_name"], metadata["base_model_relation"]) == ("gguf", "quantized")
    assert "| tiny-Q4_K_M.gguf | 1.5 |" in text
    assert "llama-server -hf path/to/ggufs:Q4_K_M" in text
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model-00001-of-00001.safetensors").write_bytes(b"")
    merged = adapter(tmp_path / "mine")
    text = lk.write_card(model, base_model=BASE, adapter=merged).read_text()
    metadata = card.split(text, "")[0]
    assert (metadata["library_name"], metadata["base_model_relation"]) == (
        "transformers",
        "finetune",
    )
    assert "with an adapter (LORA) merged into its weights" in text
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps({"model": BASE}))
    (tmp_path / "mlx" / "adapters.safetensors").write_bytes(b"")
    metadata = card.split(lk.write_card(tmp_path / "mlx").read_text(), "")[0]
    assert (metadata["library_name"], metadata["base_model"]) == ("mlx", BASE)
    with pytest.raises(lk.LorakitError, match=r"holds no adapter .*, no model .* and no \.gguf"):
        lk.write_card(tmp_path)


def test_a_gguf_adapter_is_an_adapter(tmp_path):
    """A directory that holds its model too is a quantization of it."""
    metadata = {"general.architecture": "llama", "general.type": "adapter"}
    write_gguf(tmp_path / "mine-F16.gguf", metadata, [])
    for path in (tmp_path, tmp_path / "mine-F16.gguf"):
        found = card.describe(path, BASE)
        assert found.metadata["base_model_relation"] == "adapter"
        assert found.metadata["library_name"] == "gguf"
        assert "lora" in found.metadata["tags"]
        assert "llama-server -m MODEL.gguf --lora mine-F16.gguf" in found.text
        assert "ollama run" not in found.text
    write_gguf(tmp_path / "model-Q8_0.gguf", metadata | {"general.type": "model"}, [])
    assert card.describe(tmp_path, BASE).metadata["base_model_relation"] == "quantized"


@pytest.mark.parametrize(
    ("readme", "said"),
    [
        (b"---\na: [\n---\n", "the metadata between the --- are no YAML"),
        (b"---\n- a\n---\n", "must map names to values"),
        (b"\xff\xfe", "is no card, which is UTF-8 text"),
    ],
)
def test_a_card_that_cannot_be_read_stays(tmp_path, readme, said):
    path = adapter(tmp_path / "mine")
    (path / "README.md").write_bytes(readme)
    with pytest.raises(lk.LorakitError, match=said):
        lk.write_card(path)
    assert (path / "README.md").read_bytes() == readme


NAMES = st.sampled_from(["license", "base_model", "tags", "library_name", "language", "other"])
METADATA = st.dictionaries(NAMES, st.text(max_size=8) | st.lists(st.text(max_size=4), max_size=2))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(METADATA, TEXTS, st.sampled_from(["\n", "\r\n"]), METADATA)
@example({}, "", "\n", {"license": "\x85"})
def test_completing_a_card_adds_what_is_missing_and_nothing_else(theirs, text, end, ours):
    """joined(old, new): the text of old to the byte, theirs | ours by names, and a fixed point."""
    front = yaml.safe_dump(theirs, allow_unicode=True).replace("\n", end)
    theirs = yaml.safe_load(front)  # PyYAML reads the U+0085 that it has written as a space
    old = f"---{end}{front}---{end}{text}"
    new = card.Card(ours, "ours")
    found = card.joined(old, new, "README.md", rewrite=True)
    metadata, body = card.split(found, "README.md")
    kept = {n: v for n, v in ours.items() if "license" not in n or "license" not in theirs}
    assert metadata == kept | theirs
    assert body == text
    assert card.joined(found, new, "README.md", rewrite=True) == found


@given(
    st.text(max_size=200)
    | st.just("---\n").flatmap(lambda a: TEXTS.map(lambda t: f"{a}{t}\n---\n{t}"))
)
def test_any_text_is_a_card_or_one_sentence(old):
    """No README.md loses a character, whatever it holds."""
    new = card.Card({"library_name": "peft"}, "ours")
    try:
        found = card.joined(old, new, "README.md", rewrite=True)
    except lk.LorakitError as error:
        assert str(error).startswith("README.md: the metadata")
        return
    assert found.endswith(card.split(old, "")[1])
    assert "library_name" in card.split(found, "")[0]
