"""What engines that take and return NumPy arrays share: casting inputs, and checking calls and results."""

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array
from anamorph.artifact import Artifact
from anamorph.components import Component
from anamorph.errors import ArtifactError, BackendError, BackendUnavailable
from anamorph.interface import Axis, Interface, Port


def imported(package: str, extra: str) -> Any:
    """An engine's package, which `extra` of anamorph installs.

    Raises BackendUnavailable: it is installed but broken.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise BackendUnavailable(
            f"{package} is installed but cannot be imported ({error}); "
            f"run: pip install --force-reinstall 'anamorph[{extra}]'"
        ) from None


def artifact_of(component: Component, engine: str, formats: tuple[str, ...]) -> Artifact:
    """The exported folder that a component comes from.

    Raises BackendError: it comes from a checkpoint, or was exported in another format.
    """
    artifact = component.artifact
    if artifact is None or artifact.format not in formats:
        raise BackendError(f"engine {engine} opens {', '.join(formats)}, but {component.name} is a {component.content}")
    return artifact


@dataclass(frozen=True)
class GraphPort:
    """An input as an opened graph has it; open sizes are None."""

    dtype: str
    shape: tuple[int | None, ...]


def agreed(
    file: Path,
    interface: Interface,
    inputs: Mapping[str, GraphPort],
    outputs: Collection[str],
    scalar: tuple[int, ...] = (),
) -> Interface:
    """The interface as far as the graph serves it: without optional ports that it lacks, its fixed sizes as limits.

    `scalar` is the shape that the graph gives to single numbers.
    Raises ArtifactError: an input or output is missing, or one has another type or another number of dimensions.
    """
    needed = [port.name for port in (*interface.inputs, *interface.outputs) if not port.optional]
    if missing := [name for name in needed if name not in inputs and name not in outputs]:
        raise ArtifactError(f"{file} has no {', '.join(missing)}, which {interface.component} needs")
    if strange := [name for name in inputs if name not in {port.name for port in interface.inputs}]:
        raise ArtifactError(f"{file} wants {', '.join(strange)}, which nothing feeds to {interface.component}")
    limits: dict[str, Axis] = {}
    ports = tuple(port for port in interface.inputs if port.name in inputs)
    for port in ports:
        limits |= _fixed_axes(file, port, inputs[port.name], scalar)
    kept = replace(interface, inputs=ports, outputs=tuple(port for port in interface.outputs if port.name in outputs))
    return kept.limited(limits)


def _fixed_axes(file: Path, port: Port, found: GraphPort, scalar: tuple[int, ...]) -> dict[str, Axis]:
    """The named axes of a port that have one size in the graph."""
    expected = tuple(axis if isinstance(axis, int) else None for axis in port.axes) or scalar
    if found.dtype != port.dtype or len(found.shape) != len(expected):
        raise ArtifactError(
            f"{file}: {port.name} is {found.dtype} with {len(found.shape)} dimensions, "
            f"expected {port.dtype} with {len(expected)}; export the checkpoint again"
        )
    for size, wanted in zip(found.shape, expected, strict=True):
        if None not in (size, wanted) and size != wanted:
            raise ArtifactError(f"{file}: {port.name} has a dimension {size}, expected {wanted}")
    sizes = zip(port.axes, found.shape, strict=False)  # single numbers have no axes
    named = {axis: size for axis, size in sizes if isinstance(axis, Axis) and size is not None}
    for axis, size in named.items():
        if (refusal := axis.refusal(size)) is not None:
            raise ArtifactError(f"{file}: {port.name} takes one size only, and {refusal}")
    return {axis.name: replace(axis, minimum=size, maximum=size) for axis, size in named.items()}


def prepared(interface: Interface, inputs: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
    """All inputs as contiguous arrays of the declared types, with what stands for absent ones."""
    return {
        port.name: np.asarray(inputs[port.name], dtype=port.dtype, order="C")
        if port.name in inputs
        else np.zeros(interface.absent(port), port.dtype)
        for port in interface.inputs
    }
