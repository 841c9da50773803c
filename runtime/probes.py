"""Inputs to compare engines at: the same at each call, of sizes that an interface takes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.errors import ArtifactError
from anamorph.interface import Interface, Port, size_of

TIMESTEP = 637.25
"""A timestep between two training steps, as Karras schedules have them."""
SEQUENCE = 77


def probe_sizes(interface: Interface) -> list[dict[str, int]]:
    """Two sets of sizes to compare at, the smallest and an uneven one, or those that the interface lists; one where it
    leaves no choice.

    Even the smallest level of the uneven one has more than 16 pixels, from where engines take their fast paths.
    """
    if interface.sizes:
        least = {name: axis.minimum for name, axis in interface.axes.items()}
        return [{**least, **dict(listed)} for listed in interface.sizes]
    smallest, uneven = {}, {}
    for name, axis in interface.axes.items():
        times = {"height": 5, "width": 4, "latent_height": 5, "latent_width": 4}.get(name, 3)
        both = (axis.minimum, times * axis.multiple) if name != "sequence" else (SEQUENCE, 9)
        top = axis.maximum if axis.maximum is not None else max(both)
        smallest[name], uneven[name] = (min(max(size, axis.minimum), top) for size in both)
    return [smallest] if smallest == uneven else [smallest, uneven]


def probes(interface: Interface) -> list[dict[str, NDArray[Any]]]:
    """Inputs to compare at, the same at each call: every size of `probe_sizes` without and with optional inputs.

    Normal noise, a fractional timestep, texts that end with the last token of the vocabulary.
    """
    signatures = [interface.required, interface] if interface.required != interface else [interface]
    return [probe(signature, sizes) for sizes in probe_sizes(interface) for signature in signatures]


def probe(interface: Interface, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """Inputs of these sizes."""
    random = np.random.default_rng(20240229)
    return {port.name: _probe_port(port, sizes, random) for port in interface.inputs}


def _probe_port(port: Port, sizes: Mapping[str, int], random: np.random.Generator) -> NDArray[Any]:
    shape = tuple(size_of(axis, sizes) for axis in port.axes)
    if port.name in ("timestep", "timesteps"):
        return np.asarray(TIMESTEP - 40 * np.indices(shape).sum(0), np.float32)
    if port.dtype == "float32":
        return random.standard_normal(shape, np.float32)
    if port.below is None:
        raise ArtifactError(f"nothing says how many values {port.name} may have; export the checkpoint again")
    last = port.below - 1
    whole: NDArray[np.int64] = random.integers(0, last, shape) if last else np.zeros(shape, np.int64)
    if len(shape) == 2:
        for row, text in enumerate(whole):  # texts of different lengths, filled up with the end token
            text[max(1, len(text) // (row + 2)) :] = last
    return whole
