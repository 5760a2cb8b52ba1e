"""Paths that a caller gives."""

import pytest

import lorakit as lk


@pytest.mark.parametrize("path", ["a\0b", "~nosuchuser/x"])
def test_what_is_no_path(path):
    with pytest.raises(lk.LorakitError, match="is no path"):
        lk.load_adapter(None, path)
