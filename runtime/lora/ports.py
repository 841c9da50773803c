"""How graphs take factors: two optional inputs for each layer, y + (x down) up, whose rank is open.

Matrices are [in, r] and [r, out], as they are multiplied; the factors of convolutions are kernels [r, in, h, w] and
[out, r, 1, 1].
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.artifact import Part
from anamorph.errors import BackendError
from anamorph.interface import Axis, Dimension, Interface, Port
from anamorph.lora.factors import Change, Factors, Layers

DOWN, UP, RANK = ".lora_A", ".lora_B", ".lora_rank"
WEIGHT = ".weight"


def layer_of(tensor: str) -> str | None:
    """The layer that a tensor of a checkpoint is the weight of; transformers' models are named in two ways."""
    name = tensor.removesuffix(WEIGHT).removeprefix("text_model.")
    return name if tensor.endswith(WEIGHT) and not name.endswith("embedding") else None


def layers_of(part: Part) -> dict[str, tuple[int, ...]]:
    """The layers of an exported part that can be changed, by its record of where its constants come from."""
    found = {layer_of(constant.tensor): constant.shape for constant in part.constants.values()}
    return {layer: shape for layer, shape in found.items() if layer is not None and len(shape) > 1}


def adaptable(name: str, part: Part) -> dict[str, tuple[int, ...]]:
    """The same of an artifact's part `name`; raises BackendError: there are none, as another tool or int8 made it."""
    if not part.constants:
        raise BackendError(
            f"{name} does not record where its weights come from, so that no adapter can change them; export the "
            "checkpoint with anamorph, or open the checkpoint itself"
        )
    if part.storage == "int8":
        raise BackendError(
            f"{name} multiplies whole numbers of eight bits, which no adapter can change; open the checkpoint itself"
        )
    return layers_of(part)


def digest_of(layers: Layers) -> str:
    """What a graph for these layers has instead of them in its key."""
    return hashlib.sha256(repr(sorted(layers.items())).encode()).hexdigest()[:16]


def factor_ports(layers: Layers) -> tuple[Port, ...]:
    """The inputs for these layers."""
    return tuple(port for layer, shape in layers.items() for port in _pair(layer, shape))


def _pair(layer: str, shape: tuple[int, ...]) -> tuple[Port, Port]:
    rank, (out, *taken) = Axis(layer + RANK), shape
    down: tuple[Dimension, ...] = (rank, *taken) if len(taken) > 1 else (*taken, rank)
    up: tuple[Dimension, ...] = (out, rank, *[1] * (len(taken) - 1)) if len(taken) > 1 else (rank, out)
    return Port(layer + DOWN, down, optional=True), Port(layer + UP, up, optional=True)


def is_factor(name: str) -> bool:
    """Whether an input of that name takes a factor."""
    return name.endswith((DOWN, UP))


def is_rank(axis: str) -> bool:
    """Whether an axis of that name is a rank."""
    return axis.endswith(RANK)


def without_factors(interface: Interface) -> Interface:
    """An interface as callers see it, who leave factors to the pipeline."""
    return replace(interface, inputs=tuple(port for port in interface.inputs if not is_factor(port.name)))


def with_factors(interface: Interface, layers: Layers) -> Interface:
    """An interface with inputs for these layers."""
    return replace(interface, inputs=(*interface.inputs, *factor_ports(layers)))


def inputs_of(change: Change) -> dict[str, NDArray[Any]]:
    """A change as inputs by name."""
    return {name: value for layer, factors in change.items() for name, value in _values(layer, factors).items()}


def _values(layer: str, factors: Factors) -> Mapping[str, NDArray[Any]]:
    down, up = factors.down, factors.up
    if down.ndim > 2:
        return {layer + DOWN: down, layer + UP: up.reshape(*up.shape, *[1] * (down.ndim - 2))}
    return {layer + DOWN: np.ascontiguousarray(down.T), layer + UP: np.ascontiguousarray(up.T)}
