"""What the tests of models share: a multimodal model and a tokenizer on disk."""

import pytest

from tests.conftest import write_tokenizer
from tests.models.wrappers import wrapped


@pytest.fixture(scope="session")
def multimodal(tmp_path_factory):
    """A tiny Gemma 3 with a vision tower, as transformers saves it."""
    model = wrapped("gemma3")
    path = tmp_path_factory.mktemp("multimodal")
    model.save_pretrained(path)
    return path, model


@pytest.fixture
def directory(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path
