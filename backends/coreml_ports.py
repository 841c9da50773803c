"""Inputs and outputs of Core ML packages, by the names, types and layouts of apple/ml-stable-diffusion."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.interface import Interface, Port

ROWS = 4
"""Dimensions of what attention looks at: [B, S, D] lies as [B, D, 1, S]."""
STATES = "encoder_hidden_states"
EXACT = ("timestep", "time_ids")
"""Numbers whose sines are taken: float16 cannot tell all of them apart."""
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
"""First output of a part -> its ports by other names than ours."""


def package_names(interface: Interface) -> dict[str, str]:
    """Port -> what it is called in a package, where names hold no dots."""
    other = NAMES.get(interface.outputs[0].name, {})
    ports = (*interface.inputs, *interface.outputs)
    return {port.name: other.get(port.name, port.name.replace(".", "_")) for port in ports}


def package_shape(port: Port, shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """The shape of an input in a package: single numbers are given to each row of the batch."""
    if port.name == STATES and len(shape) == ROWS - 1:
        return shape[0], shape[2], 1, shape[1]
    return shape or (batch,)


def package_value(port: Port, value: NDArray[Any], rows: int) -> NDArray[Any]:
    """An input laid out as a package of so many rows takes it."""
    if value.ndim == 0:
        return np.broadcast_to(value, (rows,))
    if port.name == STATES and value.ndim == ROWS - 1:
        return value.transpose(0, 2, 1)[:, :, None, :]
    return value
