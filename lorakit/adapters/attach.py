"""Put an adapter on a module: which of its parts get what, and everything refused before anything
changes.
"""

from torch import nn

from lorakit.adapters.manage import (
    adapter_names,
    attached,
    check_new_name,
    check_no_block,
    outer_modules,
)
from lorakit.adapters.methods.adalora import AdaLoraConfig, plan_adalora
from lorakit.adapters.methods.ia3 import IA3Config, plan_ia3
from lorakit.adapters.methods.lora import plan_lora
from lorakit.adapters.methods.prompts import PromptConfig, plan_prompt
from lorakit.adapters.methods.vera import VeraConfig, plan_vera
from lorakit.config.adapters import LoraConfig, TargetConfig
from lorakit.config.errors import LorakitError


def attach(
    module: nn.Module,
    config: TargetConfig | PromptConfig | None = None,
    *,
    name: str = "default",
) -> nn.Module:
    """Put adapter `name` on every layer of `module` that `config` selects, in place, and select it:
    it computes and trains, others that are attached wait for `set_adapter`. The type of `config`
    says by which method; LoRA, if there is none.

    With the first adapter all parameters of `module` are frozen. What is random is drawn from
    torch's global generator. Returns `module`.

    Raises LorakitError, and changes nothing, if an adapter of this name is attached, one is merged,
    an entry of `config` matches nothing, or something it selects cannot be adapted: it says which
    and why.
    """
    if not isinstance(module, nn.Module):
        raise LorakitError(f"attach: a module of torch is wanted, not {module!r:.60}")
    config = config or LoraConfig()
    names = adapter_names(module)
    check_new_name(module, name, "attach")
    check_no_block(module, "attach")
    if any(each.merged is not None for each in attached(module).values()):
        raise LorakitError("attach: an adapter is merged; unmerge it first")
    match config:
        case LoraConfig():
            plan = plan_lora(module, config)
        case IA3Config():
            plan = plan_ia3(module, config)
        case VeraConfig():
            plan = plan_vera(module, config)
        case AdaLoraConfig():
            plan = plan_adalora(module, config)
        case PromptConfig():
            plan = plan_prompt(module, config)
        case _:
            kind = f"{type(config).__module__}.{type(config).__name__}"
            raise LorakitError(
                f"attach: {kind} is no adapter's config of lorakit's, such as LoraConfig"
            )
    if not names:
        module.requires_grad_(False)
    for each, part in plan.parts:
        each.add_part(name, part)
    for place, layer in list(outer_modules(module)):  # a layer in two places is one in both
        if id(layer) in plan.made and layer is not plan.made[id(layer)]:
            plan.places[place] = plan.made[id(layer)]
    for place, each in plan.places.items():
        module.set_submodule(place, each)
    for each in attached(module).values():
        each.select(name)
    return module
