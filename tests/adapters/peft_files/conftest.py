"""Adapters that several files of tests read."""

import shutil

import pytest

from tests.adapters.common import hugging_face
from tests.adapters.peft_files.adapters_of_peft import peft_adapter


@pytest.fixture(scope="module")
def made(tiny_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("made")
    peft_adapter(hugging_face(tiny_dir), path)
    return path


@pytest.fixture
def saved(made, tmp_path):
    shutil.copytree(made, tmp_path / "in")
    return tmp_path / "in"
