"""Names of tensors without what wrappers of torch added, held to the names that torch makes."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lorakit as lk
from lorakit.files.wrappers import is_wrapped, renamed, unwrapped, without_wrappers

BEGINNINGS = {"module.": ""}


def net():
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))


WRAPPED = {
    "torch.compile": lambda: torch.compile(net()),
    "DataParallel, named as DDP": lambda: nn.DataParallel(net()),
    "compiled inside": lambda: nn.DataParallel(torch.compile(net())),
    "checkpoint wrapper": lambda: nn.Sequential(net()[0], checkpoint_wrapper(net()[1])),
}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_the_names_of_a_wrapped_module_become_those_of_the_module(make, caplog):
    # named_parameters: the checkpoint wrapper hides its name in state_dict()
    named = dict(make().named_parameters())
    plain = [name for name, _ in net().named_parameters()]
    assert list(named) != plain
    found = unwrapped(named, "here", BEGINNINGS)
    assert list(found) == plain
    assert all(a is b for a, b in zip(found.values(), named.values(), strict=True))
    assert len(caplog.records) == 1
    assert "names of tensors come from wrappers" in caplog.text


def test_names_without_wrappers_stay_and_are_not_logged(caplog):
    named = dict(net().named_parameters())
    assert list(unwrapped(named, "here", BEGINNINGS)) == list(named)
    assert not caplog.records


def test_a_module_of_the_models_own_that_is_called_module_stays():
    names = ["module.weight", "head.weight"]
    assert list(unwrapped(dict.fromkeys(names), "here", BEGINNINGS)) == names


def test_two_tensors_of_one_name_are_refused():
    tensors = {"a.weight": 1, "_orig_mod.a.weight": 2}
    with pytest.raises(lk.LorakitError, match="two tensors are a.weight, one of them as _orig_mod"):
        unwrapped(tensors, "here", BEGINNINGS)


def test_renaming_says_why(caplog):
    with caplog.at_level(logging.WARNING):
        assert renamed({"x": 1, "y": 2}, {"x": "z", "y": "y"}, "here", "somebody") == {
            "z": 1,
            "y": 2,
        }
    assert "here: 1 names of tensors come from somebody; x is read as z" in caplog.text


PARTS = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"]


@given(st.lists(st.sampled_from([*PARTS, "model", "layers", "0", "module", "weight"])))
def test_what_is_left_is_the_other_parts_in_their_order(parts):
    name = ".".join(parts)
    left = [part for part in parts if part not in PARTS]
    assert without_wrappers(name) == ".".join(left)
    assert without_wrappers(without_wrappers(name)) == without_wrappers(name)
    assert is_wrapped([name]) == (len(left) < len(parts))
