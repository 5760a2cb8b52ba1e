"""Tell whether a module does more than the forward of its class.

It may have a hook, or a forward of its own. The fused kernels compute in the place of modules; such
a module they must leave alone, so that it is called.
"""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Return whether a hook runs before or after the module's forward or backward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a forward was put on the module itself, as accelerate's hooks do."""
    return "forward" in vars(module)
