"""Models of PyTorch with adapters: twins that share the weights which no adapter changes."""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.components import Component
from anamorph.errors import BackendError
from anamorph.lora.factors import Factors as Change
from anamorph.lora.factors import joined
from anamorph.lora.ports import WEIGHT, layer_of
from anamorph.rewrites import PHASES

Pair = tuple[Tensor, Tensor]
"""The factors of a layer as `anamorph.lora.ports` declares them: down and up."""


def places(module: Any) -> dict[str, str]:
    """Layer -> path of its module, for all layers that can be changed."""
    found = {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and (name := layer_of(module.stored_name(path + WEIGHT))):
            found[name] = path
    return found


def layers_of(module: Any) -> dict[str, tuple[int, ...]]:
    """Layer -> shape of its weight."""
    return {name: tuple(module.get_submodule(path).weight.shape) for name, path in places(module).items()}


class Factors(threading.local):
    """What each thread has given to the layers of one model for the call that it makes."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = layers
        self.given: Mapping[str, Pair] = {}

    def taking(self, method: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        """The method with the factors of all layers as further arguments; None where a layer stays as it is."""
        count = 2 * len(self.layers)

        def call(*values: Any) -> tuple[Any, ...]:
            plain, factors = values[:-count], values[-count:]
            pairs = zip(self.layers, factors[::2], factors[1::2], strict=True)
            self.given = {layer: (down, up) for layer, down, up in pairs if down is not None}
            return method(*plain)

        return call

    def branch(self, layer: str) -> Callable[..., Tensor | None]:
        """A hook behind a layer: y + (x down) up."""

        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            pair = self.given.get(layer)
            if pair is None:
                return None
            down, up = pair
            (x,) = inputs
            if isinstance(module, nn.Linear):
                return output + x @ down @ up
            return output + F.conv2d(F.conv2d(x, down, None, module.stride, module.padding, module.dilation), up)

        return hook


def changed(module: Any, component: Component) -> Any:
    """A twin of the model for the component's adapters; weights that are not fused stay shared with the model.

    Raises BackendError: a layer is missing.
    """
    twin = copy.deepcopy(module, {id(value): value for value in (*module.parameters(), *module.buffers())})
    known = places(twin)
    if lost := [layer for layer in (*component.adapted, *component.fused) if layer not in known]:
        raise BackendError(f"{component.name} has no layer {lost[0]}, which an adapter changes; it is another model's")
    for layer, factors in component.fused.items():
        _fuse(twin.get_submodule(known[layer]), factors)
    if not component.adapted:
        return twin
    twin.factors = Factors(tuple(component.adapted))
    for layer in component.adapted:
        path = known[layer]
        twin.get_submodule(path).register_forward_hook(twin.factors.branch(layer))
        above = twin.get_submodule(path.rpartition(".")[0])
        if getattr(above, "REWRITE", None) == PHASES:  # it would take the weight and pass the hook by
            above.rewritten = False
    return twin


def _fuse(layer: Any, factors: Change) -> None:
    """Add a change to a layer's weight, in float32, and round to the type of the weight."""
    one, weight = joined([factors]), layer.weight
    down, up = (torch.from_numpy(value).to(weight.device) for value in (one.down, one.up))
    total = weight.detach().float() + (up @ down.reshape(one.rank, -1)).reshape(weight.shape)
    layer.weight = nn.Parameter(total.to(weight.dtype), requires_grad=False)
