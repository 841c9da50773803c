"""What a pipeline is given for a model, as a component: paths, opened ones, our models and other libraries'."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anamorph.checkpoint import ALONE, Source, open_checkpoint
from anamorph.components import Component
from anamorph.config import Config
from anamorph.errors import InputError
from anamorph.model_interfaces import interfaces
from anamorph.pipelines.describing import alone
from anamorph.pipelines.loaded import Loaded, Shown

PEERS = ("transformers", "diffusers")
"""Libraries whose models have our classes' names, configurations and weights."""
DENOISERS = ("UNet2DConditionModel", "UNet2DModel")
"""Classes in whose place other modules are called as diffusers calls them."""
NET = "ControlNetModel"
"""The class in whose place one that was compiled may come, where its residuals are not pooled."""


def as_component(
    name: str, value: Any, class_names: Sequence[str], refining: bool = False, replaced: Loaded | None = None
) -> Component | Loaded:
    """What a pipeline was given for a model slot; models of other libraries lend us their weights.

    Another PyTorch module takes the place of a denoiser, whose configuration is that of the model which it was
    compiled from, or which it takes the place of (`replaced`); one that was compiled, also that of a ControlNet.
    Raises InputError: something else than a component or one of our PyTorch models, or a model of a wrong class.
    """
    value = value.loaded if isinstance(value, Shown) else value
    value = alone(value, class_names) if isinstance(value, str | Path) else value
    if isinstance(value, Component | Loaded):
        given = value.component if isinstance(value, Loaded) else value
        if given.class_name not in class_names:
            raise InputError(f"{name} is a {given.class_name}, expected {' or '.join(class_names)}")
        return value
    kind = type(value).__name__
    if kind in class_names and type(value).__module__.partition(".")[0] in PEERS:
        value = _adopted(value)
    config = getattr(value, "config", None)
    if kind not in class_names and (called := _called(name, value, class_names, replaced)) is not None:
        return called
    if kind not in class_names or not isinstance(config, Config):
        raise InputError(f"{name} is a {kind}, expected a model of anamorph: {' or '.join(class_names)}")
    component = Component(name, kind, config, module=value, refining=refining)
    if kind in ALONE and value.origin is not None:
        folder, variant = value.origin
        opened = open_checkpoint(Source(str(folder), variant=variant))
        return replace(component, name=ALONE[kind], checkpoint=opened)
    return component


def _called(name: str, value: Any, class_names: Sequence[str], replaced: Loaded | None) -> Component | None:
    """A stranger's PyTorch module as a denoiser, or a ControlNet that was compiled, or None."""
    torch = sys.modules.get("torch")  # without it there is no such module
    if torch is None or not isinstance(value, torch.nn.Module):
        return None
    inner = getattr(value, "_orig_mod", None)
    known = inner.loaded if isinstance(inner, Shown) else replaced
    if known is not None:
        model = known.component
    elif isinstance(config := getattr(inner, "config", None), Config):
        model = Component(name, type(inner).__name__, config)
    else:
        return None
    net = model.class_name == NET and hasattr(inner, "hint") and not model.config["global_pool_conditions"]
    if (model.class_name not in DENOISERS and not net) or model.class_name not in class_names:
        return None
    from anamorph.models.called import Called, CalledNet

    ports = interfaces(model.class_name, name, model.refining)[name](model.config).inputs[2:]
    module = (CalledNet if net else Called)(value, [port.name for port in ports])
    return Component(name, model.class_name, model.config, module=module, refining=model.refining)


def _adopted(model: Any) -> Any:
    """The same model as one of ours, with the weights of the other library's."""
    from anamorph.models import MODELS

    config = dict(model.config) if isinstance(model.config, Mapping) else model.config.to_dict()
    return MODELS[type(model).__name__].adopt(model, config)
