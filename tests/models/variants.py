"""Tiny random models of every family, made by transformers, that tests of the decoder run on."""

import pytest

import lorakit as lk
from tests.conftest import FAMILY_VARIANTS, TINY_VARIANTS, tiny

VARIANTS = {"llama": ("llama", TINY_VARIANTS["gqa"])} | FAMILY_VARIANTS
BY_LENGTH = {name: ("llama", TINY_VARIANTS[name]) for name in ("dynamic_rope", "longrope")}
packed_variants = pytest.mark.parametrize(
    ("family", "options"),
    (VARIANTS | BY_LENGTH).values(),
    ids=(VARIANTS | BY_LENGTH).keys(),
)
variants = pytest.mark.parametrize(("family", "options"), VARIANTS.values(), ids=VARIANTS.keys())


def load(tmp_path, family, options, **how):
    tiny(family, **options).save_pretrained(tmp_path)
    return lk.load_model(tmp_path, dtype="float32", **how)
