"""The public names: those of the lazy table, of the stub beside it, and the old ones."""

import ast
import warnings
from pathlib import Path

import pytest

import lorakit as lk

STUB = ast.parse((Path(lk.__file__).parent / "__init__.pyi").read_text(encoding="utf-8"))
RENAMED = {
    "allocate": "adalora_allocate",
    "orthogonality": "adalora_orthogonality",
    "pack": "pack_rows",
    "split": "split_rows",
}


def test_every_public_name_exists():
    for name in lk.__all__:
        assert getattr(lk, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lk.nothing  # noqa: B018
    assert set(lk.__all__) <= set(dir(lk))


def test_the_stub_has_the_names_of_the_lazy_table_from_their_modules():
    """A type checker finds every name that Python finds, in the module that defines it."""
    imported = [
        (alias.asname, node.module, alias.name)
        for node in STUB.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert all(public == name for public, _, name in imported)  # `as` makes a name public
    homes = {public: module for public, module, _ in imported}
    assert len(homes) == len(imported)
    assert sorted(homes) == lk.__all__
    for name, module in homes.items():
        value = getattr(lk, name)
        if name in ("kernels", "memory", "metrics", "optim"):
            assert value.__name__ == f"{module}.{name}"
        else:
            assert value.__module__ == module


def test_the_stub_has_the_old_names():
    old = {node.targets[0].id: node.value.id for node in STUB.body if isinstance(node, ast.Assign)}
    assert old == RENAMED


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_works_and_one_warning_says_the_new_one(old, new):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert getattr(lk, old) is getattr(lk, new)
    [warning] = caught
    assert warning.category is DeprecationWarning
    assert f"lorakit.{old} is now lorakit.{new}" in str(warning.message)
    assert warning.filename == __file__
    assert old not in lk.__all__
