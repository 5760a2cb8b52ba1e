"""Whether a module is more than its class's forward."""

import pytest
from torch import nn

from lorakit.models.hooks import has_hooks, has_own_forward

KINDS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_is_seen_while_it_is_there(kind):
    module = nn.Linear(2, 2)
    assert not has_hooks(module)
    hook = getattr(module, kind)(lambda *_: None)
    assert has_hooks(module)
    assert not has_own_forward(module)
    hook.remove()
    assert not has_hooks(module)


def test_a_forward_on_the_module_itself_is_seen():
    module = nn.Linear(2, 2)
    assert not has_own_forward(module)
    module.forward = module.forward
    assert has_own_forward(module)
    assert not has_hooks(module)
