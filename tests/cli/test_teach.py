"""`lorakit teach`: the file of a teacher, a training that reads it, and wrong run files."""

import json

from lorakit.cli.main import main
from tests.conftest import ROWS

RUN = """
model: {model}
quantize: nf4
dtype: float32
lora: {{r: 4}}
data: {{train: train.jsonl, validation: validation.jsonl}}
objective: distillation
distillation: {{teacher: {model}, logits: teacher.safetensors, top_k: 8}}
max_seq_length: 64
max_steps: 2
output_dir: out
"""


def test_teach(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN.format(model=tiny_dir))
    for name, rows in (("train", ROWS[:6]), ("validation", ROWS[6:8])):
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    assert main(["train", "run.yaml"]) == 1
    error = capsys.readouterr().err
    assert "teacher.safetensors is not there; `lorakit teach run.yaml` writes it" in error
    assert main(["teach", "run.yaml", "--batch-size", "3"]) == 0
    out = capsys.readouterr().out
    assert "loaded the teacher" in out
    assert "8 rows in " in out
    assert "MB in teacher.safetensors" in out
    assert main(["train", "run.yaml"]) == 0
    out = capsys.readouterr().out
    assert "loaded the teacher" not in out
    assert "divergence" in (tmp_path / "out" / "metrics.jsonl").read_text()
    assert main(["teach", "run.yaml", "distillation.logits=null"]) == 1
    assert "with logits, the file to write" in capsys.readouterr().err
    assert main(["teach", "run.yaml", "max_seq_length=1"]) == 1
    assert "max_seq_length" in capsys.readouterr().err
