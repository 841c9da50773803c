"""What goes into and comes out of a component, declared once.

Example inputs for export, dynamic axes, partial shapes, run-time checks and the artifact's manifest are all
computed from these declarations.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from anamorph.errors import InputError


@dataclass(frozen=True)
class Axis:
    """A named dimension: any multiple of `multiple` from `minimum` to `maximum` (None: no bound)."""

    name: str
    multiple: int = 1
    minimum: int = 1
    maximum: int | None = None

    def refusal(self, size: int) -> str | None:
        """Why `size` does not fit this axis, or None."""
        if self.minimum == self.maximum != size:
            return f"{self.name} is {size}, expected {self.minimum}"
        if size < self.minimum or (self.maximum is not None and size > self.maximum):
            top = "or more" if self.maximum is None else f"to {self.maximum}"
            return f"{self.name} is {size}, expected {self.minimum} {top}"
        if size % self.multiple:
            return f"{self.name} is {size}, expected a multiple of {self.multiple}"
        return None


@dataclass(frozen=True)
class Scaled:
    """A dimension that follows from another input's: `axis` times `numerator` over `denominator`, rounded up."""

    axis: str
    numerator: int = 1
    denominator: int = 1


Dimension = Axis | Scaled | int
BATCH = Axis("batch")
"""How many pictures (or texts) a call of a model is about."""


def size_of(dimension: Dimension, sizes: Mapping[str, int]) -> int:
    """The size of a dimension, given those of the named axes."""
    if isinstance(dimension, int):
        return dimension
    if isinstance(dimension, Axis):
        return sizes[dimension.name]
    return -(-sizes[dimension.axis] * dimension.numerator // dimension.denominator)


@dataclass(frozen=True)
class Port:
    """One input or output: its dimensions (a named Axis, one that follows from it, or a fixed size) and its type.

    `dtype` is what callers pass ("float32", "int64"). In which precision an engine computes inside, and in which
    type an artifact stores its weights, are facts of the engine and the artifact and do not show here.
    An `optional` input is a term that is added or multiplied into others: where a caller leaves it out, zeros of the
    shape `Interface.absent` take its place and broadcast, so that one graph serves with and without it. An optional
    output may be missing from graphs that other tools have exported.
    Whole numbers lie in 0 .. `below` - 1 (tokens of a vocabulary, classes); None: no bound is known. `exact` numbers
    are handed over unrounded whatever the precision: bfloat16 cannot tell a timestep of 999 from 1000.
    """

    name: str
    axes: tuple[Dimension, ...]
    dtype: str = "float32"
    optional: bool = False
    below: int | None = None
    exact: bool = False


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of one component, in order.

    Where `sizes` are listed, each as pairs of an axis and its size, no others are taken together.
    """

    component: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    sizes: tuple[tuple[tuple[str, int], ...], ...] = ()

    def check(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        """Compare the arrays of a call with the declaration; returns the size of each named axis.

        Raises InputError: an input is missing or unknown, has another rank, or a size that its axis excludes.
        """
        ports = {port.name: port for port in self.inputs}
        missing = [name for name, port in ports.items() if not port.optional and name not in inputs]
        unknown = [name for name in inputs if name not in ports]
        if missing or unknown:
            what = [f"misses {', '.join(missing)}"] * bool(missing) + [f"got {', '.join(unknown)}"] * bool(unknown)
            raise InputError(f"{self.component} {' and '.join(what)}; its inputs are {', '.join(ports)}")
        sizes: dict[str, int] = {}
        for name, value in inputs.items():
            self._check_port(ports[name], tuple(int(size) for size in value.shape), sizes)
        self._check_listed(sizes)
        return sizes

    def _check_listed(self, sizes: Mapping[str, int]) -> None:
        if not self.sizes or any(set(listed) <= set(sizes.items()) for listed in self.sizes):
            return
        known = "; ".join(", ".join(f"{axis} {size}" for axis, size in listed) for listed in self.sizes)
        given = ", ".join(f"{axis} {sizes[axis]}" for axis, _ in self.sizes[0])
        raise InputError(f"{self.component} was made for {known}, but {given} is asked for; take a size of these")

    def sizes_of(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        """The size of each named axis in a call that was checked; for engines, whose calls are (`anamorph.guard`)."""
        ports = {port.name: port for port in self.inputs}
        return {
            axis.name: int(size)
            for name, value in inputs.items()
            for axis, size in zip(ports[name].axes, value.shape, strict=True)
            if isinstance(axis, Axis)
        }

    def check_values(self, inputs: Mapping[str, Any]) -> None:
        """Compare whole numbers with the range that their port declares; engines look these up without asking.

        Raises InputError: a number is outside.
        """
        for port in self.inputs:
            value = inputs.get(port.name)
            if port.below is None or value is None or not math.prod(value.shape):
                continue
            low, high = int(value.min()), int(value.max())
            if low < 0 or high >= port.below:
                raise InputError(
                    f"{self.component}: {port.name} holds {low if low < 0 else high}, expected 0 to {port.below - 1}"
                )

    def output_shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of all outputs for these sizes of the axes."""
        return {port.name: tuple(size_of(dimension, sizes) for dimension in port.axes) for port in self.outputs}

    @property
    def axes(self) -> dict[str, Axis]:
        """All named axes of the inputs."""
        return {axis.name: axis for port in self.inputs for axis in port.axes if isinstance(axis, Axis)}

    def absent(self, port: Port) -> tuple[int, ...]:
        """Shape of the zeros that stand for a missing optional input: 1 wherever the size is open."""
        return self._absent[port.name]

    @cached_property
    def _absent(self) -> dict[str, tuple[int, ...]]:
        """Kept, because engines ask at each call, and adapters may bring hundreds of ports."""
        fixed = {name: axis.minimum for name, axis in self.axes.items() if axis.minimum == axis.maximum}

        def size(dimension: Dimension) -> int:
            if isinstance(dimension, int):
                return dimension
            name = dimension.name if isinstance(dimension, Axis) else dimension.axis
            return size_of(dimension, fixed) if name in fixed else 1

        return {port.name: tuple(map(size, port.axes)) for port in self.inputs}

    @property
    def required(self) -> "Interface":
        """The same without its optional inputs: the signature that the loaders of other tools feed."""
        return replace(self, inputs=tuple(port for port in self.inputs if not port.optional))

    def limited(self, limits: Mapping[str, Axis]) -> "Interface":
        """The same with some of its axes replaced by name."""

        def port(value: Port) -> Port:
            axes = (limits.get(axis.name, axis) if isinstance(axis, Axis) else axis for axis in value.axes)
            return replace(value, axes=tuple(axes))

        return replace(self, inputs=tuple(map(port, self.inputs)), outputs=tuple(map(port, self.outputs)))

    def _check_port(self, port: Port, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        where = f"{self.component}: input {port.name} of shape {list(shape)}"
        if len(shape) != len(port.axes):
            raise InputError(f"{where} has {len(shape)} dimensions, expected {len(port.axes)}")
        for axis, size in zip(port.axes, shape, strict=True):
            if not isinstance(axis, Axis):
                if size != (expected := size_of(axis, sizes)):
                    raise InputError(f"{where}: a dimension is {size}, expected {expected}")
                continue
            if (refusal := axis.refusal(size)) is not None:
                raise InputError(f"{where}: {refusal}")
            if sizes.setdefault(axis.name, size) != size:
                raise InputError(f"{where}: {axis.name} is {size} here and {sizes[axis.name]} in another input")
