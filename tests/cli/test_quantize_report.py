"""`lorakit quantize-report`: the table, the plot and wrong settings."""

import pytest

from lorakit.cli.main import main


def test_quantize_report(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize-report", str(tiny_dir), "block_size=32", "--worst", "2"]) == 0
    out = capsys.readouterr().out
    assert "the 2 worst" in out
    assert "14 layers, mean relative error 0.0" in out
    assert out.endswith("plot in quantize-report.png\n")
    assert (tmp_path / "quantize-report.png").read_bytes().startswith(b"\x89PNG")
    assert main(["quantize-report", "--no-plot", str(tiny_dir), "lm_head=int8"]) == 0
    assert "15 layers" in capsys.readouterr().out
    assert main(["quantize-report", str(tiny_dir), "--plot", "new/one.png"]) == 0
    assert (tmp_path / "new" / "one.png").exists()
    for wrong, message in [
        ("blocksize=32", "unknown key 'blocksize' (did you mean 'block_size'?)"),
        ("quant_type=q4", "quant_type is 'q4'; choose nf4, fp4 or int8"),
        ("block_size=[", "the value is not valid YAML"),
        ("skip_modules=[nothing]", "'nothing' is no layer"),
    ]:
        assert main(["quantize-report", str(tiny_dir), wrong]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for plot in ("", "/"):
        assert main(["quantize-report", str(tiny_dir), "--plot", plot]) == 1
        assert "not the name of a file" in capsys.readouterr().err
    for wrong in (["block_size"], ["--worst", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            main(["quantize-report", str(tiny_dir), *wrong])
