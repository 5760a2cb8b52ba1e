"""Tiny random models of every family, made by transformers, that tests of the decoder run on."""

import pytest

import lorakit as lk
from tests.conftest import FAMILY_VARIANTS, TINY_VARIANTS, tiny
from tests.models.wrappers import wrapped

# families that transformers has within their wrapper alone, whose settings wrappers.py has
WITHIN = {name: (name, {}) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")}
VARIANTS = {"llama": ("llama", TINY_VARIANTS["gqa"])} | FAMILY_VARIANTS | WITHIN
BY_LENGTH = {name: ("llama", TINY_VARIANTS[name]) for name in ("dynamic_rope", "longrope")}
packed_variants = pytest.mark.parametrize(
    ("family", "options"),
    (VARIANTS | BY_LENGTH).values(),
    ids=(VARIANTS | BY_LENGTH).keys(),
)
variants = pytest.mark.parametrize(("family", "options"), VARIANTS.values(), ids=VARIANTS.keys())


def make(family, options):
    """transformers' model of a variant."""
    return wrapped(family) if family in WITHIN else tiny(family, **options)


def load(tmp_path, family, options, **how):
    make(family, options).save_pretrained(tmp_path)
    return lk.load_model(tmp_path, dtype="float32", **how)
