"""Where arrays live between the calls of components: NumPy here, an engine's own kind in its plug-in."""

import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = Any
"""A NumPy array or an engine's own array; the runtime only adds, multiplies, slices and asks for the shape."""


class Arrays(Protocol):
    """The few operations that the runtime needs on arrays of one kind and place."""

    key: str
    """Two components whose keys are equal hand arrays to each other without conversion."""
    asynchronous: bool
    """Whether reading a value waits for a device, so that checks are put off until the end of a loop."""

    def put(self, value: NDArray[Any]) -> Array:
        """From NumPy."""

    def accept(self, value: Any) -> Array:
        """From whatever a caller has: NumPy, a PyTorch tensor on any device, or an array of this kind (float32)."""

    def get(self, value: Array) -> NDArray[Any]:
        """To NumPy."""

    def concat(self, values: Sequence[Array], axis: int = 0) -> Array:
        """Join along an axis."""

    def finite(self, value: Array) -> Any:
        """A truth value (maybe still on its way): no NaN and no infinity."""


class NumpyArrays:
    """NumPy on the host."""

    key = "numpy"
    asynchronous = False

    def put(self, value: NDArray[Any]) -> Array:
        return value

    def accept(self, value: Any) -> Array:
        return to_numpy(value).astype(np.float32, copy=False)

    def get(self, value: Array) -> NDArray[Any]:
        return np.asarray(value)

    def concat(self, values: Sequence[Array], axis: int = 0) -> Array:
        return np.concatenate(values, axis)

    def finite(self, value: Array) -> Any:
        return bool(np.isfinite(value).all())


def to_numpy(value: Any) -> NDArray[Any]:
    """A NumPy array from what a caller may pass: NumPy, or a PyTorch tensor on any device."""
    torch = sys.modules.get("torch")  # a tensor can only exist where its maker has imported PyTorch
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    return np.asarray(value)
