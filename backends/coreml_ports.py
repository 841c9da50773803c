"""Inputs and outputs of Core ML packages, by the names and layouts of apple/ml-stable-diffusion."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.interface import Interface, Port

STATES = "encoder_hidden_states"
"""What attention looks at: [B, S, D] lies as [B, D, 1, S], which the Neural Engine needs not move."""
EXACT = ("timestep", "time_ids")
"""Numbers whose sines are taken, and which float16 would round."""
CHECKED = ("images", "adjustment")
"""What Apple's safety checker takes besides, to return pictures; we ask for its scores alone."""
NAMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "out_sample": {"out_sample": "noise_pred"},
        "latent_parameters": {"sample": "x", "latent_parameters": "latent"},
        "latents": {"sample": "x", "latents": "latent"},
        "sample": {"latent_sample": "z", "sample": "image"},
        "last_hidden_state": {"pooler_output": "pooled_outputs"},
        "text_embeds": {"text_embeds": "pooled_outputs"},
    }
)
"""First output of a part -> its ports that packages call otherwise."""


def package_names(interface: Interface) -> dict[str, str]:
    """Port -> what it is called in a package, where names hold no dots."""
    other = NAMES.get(interface.outputs[0].name, {})
    ports = (*interface.inputs, *interface.outputs)
    return {port.name: other.get(port.name, port.name.replace(".", "_")) for port in ports}


def package_shape(port: Port, shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """The shape of an input in a package of so many rows: a single number is given to each."""
    if port.name == STATES and len(shape) == 3:
        return shape[0], shape[2], 1, shape[1]
    return shape or (rows,)


def port_shape(port: Port, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a package's input as its port has it."""
    return (shape[0], shape[3], shape[1]) if port.name == STATES and len(shape) == 4 else shape


def package_value(port: Port, value: NDArray[Any], rows: int) -> NDArray[Any]:
    """An input as a package of so many rows takes it."""
    if not port.axes:
        return np.broadcast_to(value, (rows,))
    value = np.broadcast_to(value, (rows, *value.shape[1:]))
    laid = value.transpose(0, 2, 1) if port.name == STATES and value.ndim == 3 else value
    return laid.reshape(package_shape(port, value.shape, rows))
