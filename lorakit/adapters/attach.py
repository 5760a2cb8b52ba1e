"""Attach an adapter to a module.

The method of the config plans the adapter, and refuses what cannot be adapted, before anything
changes (plan.py). methods/known.py lists the methods.
"""

from torch import nn

from lorakit.adapters.manage import (
    adapter_names,
    attached,
    check_new_name,
    check_no_block,
    check_unmerged,
)
from lorakit.adapters.methods.known import method_of
from lorakit.adapters.methods.prompts import PromptConfig
from lorakit.adapters.modules_to_save import with_head_saved
from lorakit.config.adapters import LoraConfig, TargetConfig
from lorakit.config.errors import LorakitError
from lorakit.models.classifier import Classifier


def attach(
    module: nn.Module,
    config: TargetConfig | PromptConfig | None = None,
    *,
    name: str = "default",
) -> nn.Module:
    """Put a new adapter on a module, in place, and select it: it computes and trains from now on.

    The other adapters that are attached wait for `set_adapter`. With the first adapter all
    parameters of `module` are frozen. Random numbers are drawn from torch's global generator. On a
    model with a head for classes the adapter trains a copy of that head too.

    Args:
        module: A lorakit `Decoder`, or any other module; prompts go on a `Decoder` only.
        config: Which layers are adapted, and by its type how: LoraConfig, IA3Config, VeraConfig,
            AdaLoraConfig, MissConfig, PromptTuningConfig, PromptEncoderConfig or
            PrefixTuningConfig. None means LoRA on every linear layer but the output head.
        name: What to call the adapter; it holds no dot.

    Returns:
        `module`.

    Raises:
        LorakitError: An adapter of this name is attached, one is merged, an entry of `config`
            matches nothing, or a layer that it selects cannot be adapted. The message names the
            layer and the reason. Nothing has changed then.
    """
    if not isinstance(module, nn.Module):
        raise LorakitError(f"attach: a module of torch is wanted, not {module!r:.60}")
    config = config or LoraConfig()
    if isinstance(module, Classifier):
        config = with_head_saved(config)
    first = not adapter_names(module)
    check_new_name(module, name, "attach")
    check_no_block(module, "attach")
    check_unmerged(module, "attach")
    plan = method_of(config).plan(module, config)
    if first:
        module.requires_grad_(False)
    plan.carry_out(name)
    for each in attached(module).values():
        each.select(name)
    return module
