"""`lorakit report`: where it writes, and what it refuses."""

from lorakit.cli.main import main

from ..board.folders import write_run


def test_report(tmp_path, monkeypatch, capsys):
    for name in ("one", "two"):
        write_run(tmp_path / "runs" / name, steps=4, samples=False)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs"]) == 0
    assert capsys.readouterr().out == "report in report.html\n"
    assert '"name":"runs"' in (tmp_path / "report.html").read_text()
    assert main(["report", "runs/one", "--out", "new/both.html", "runs/two"]) == 0
    assert '"name":"2 runs"' in (tmp_path / "new" / "both.html").read_text()
    assert main(["report", "new"]) == 1
    assert capsys.readouterr().err.startswith("lorakit: new holds no run: ")
