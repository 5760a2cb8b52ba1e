"""What `serve_board` asks for before it serves."""

import importlib.util

import pytest

import lorakit as lk


def test_a_missing_package_is_one_sentence(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    with pytest.raises(lk.LorakitError, match=r'package uvicorn: pip install "lorakit\[web\]"'):
        lk.serve_board(folder)
