"""What engines that take and return NumPy arrays share: casting inputs, and checking calls and results."""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array
from anamorph.artifact import Artifact
from anamorph.components import Component
from anamorph.errors import BackendError, BackendUnavailable
from anamorph.interface import Interface


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


def prepared(interface: Interface, inputs: Mapping[str, Array]) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
    """All inputs as contiguous arrays of the declared types, and the size of each named axis; raises InputError."""
    sizes = interface.check(inputs)
    values = {
        port.name: np.asarray(inputs[port.name], dtype=port.dtype, order="C")
        if port.name in inputs
        else np.zeros(interface.absent(port), port.dtype)
        for port in interface.inputs
    }
    return values, sizes


def checked(interface: Interface, sizes: Mapping[str, int], outputs: dict[str, NDArray[Any]]) -> dict[str, Array]:
    """The outputs, if their shapes are those that the interface promises.

    Raises BackendError: an engine that was called outside its graph's sizes may return a stale or cut result.
    """
    for name, shape in interface.output_shapes(sizes).items():
        if outputs[name].shape != shape:
            raise BackendError(
                f"{interface.component} returned {name} of shape {list(outputs[name].shape)}, expected {list(shape)}; "
                "export it again"
            )
    return outputs
