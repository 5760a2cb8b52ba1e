"""Tell whether a module does more than its class's forward: by a hook, or by a forward of its own.

Code that computes in the place of a module, as the fused kernels do, has to leave such a module
alone and call it.
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
