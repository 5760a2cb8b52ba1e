"""`lorakit plot`: where it writes, and what it refuses."""

from lorakit.cli.main import main


def test_plot(run_file, tmp_path, monkeypatch, capsys):
    for name in ("one", "two"):
        assert main(["train", str(run_file), f"output_dir={tmp_path / name}"]) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["plot", "one", "--out", "new/both", "two"]) == 0
    assert capsys.readouterr().out == "plots in new/both/runs.html\n"
    assert '"name":"two"' in (tmp_path / "new" / "both" / "runs.html").read_text()
    assert main(["plot", "one"]) == 0
    assert (tmp_path / "plots" / "loss.png").exists()
    assert main(["plot", "one", "new"]) == 1
    assert capsys.readouterr().err == (
        "lorakit: new holds no metrics.jsonl; name the output_dir of a training run\n"
    )
    assert main(["plot", "one", "--out", "run.yaml"]) == 1
    assert "run.yaml is not a directory" in capsys.readouterr().err
