"""One `torch.export` per part: which sizes it shall take, and the graph that takes them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anamorph.artifact import PORTABLE
from anamorph.components import Component, even
from anamorph.errors import ArtifactError, BackendError, InputError
from anamorph.exporting import ExportOptions
from anamorph.interface import Axis, Interface, Port, Scaled, size_of
from anamorph.native import is_branched

if TYPE_CHECKING:
    import torch

TIMESTEP = 637.25
"""A timestep between two training steps, as Karras schedules have them."""
SEQUENCE = 77


def part_interface(
    component: Component, part: str, options: ExportOptions, factor: int, branches: int = 1, alike: bool = True
) -> Interface:
    """The sizes that the exported part takes; `factor` is the autoencoder's pixels per latent.

    A UNet's latents must halve evenly on each level. A fixed batch of N pictures makes N `branches` for this part,
    or N and so many branches apart where these are `alike`; prompts may come in any number.
    Raises InputError: the fixed size is none that the model takes.
    """
    interface = even(component.interface(part), component.config)
    if options.signature == PORTABLE:
        interface = interface.required
    limits: dict[str, Axis] = {}
    if options.size is not None:
        for side, pixels in zip(("height", "width"), options.size, strict=True):
            if pixels < factor or pixels % factor:
                raise InputError(f"{side} {pixels} is no positive multiple of {factor} pixels")
            latent = f"latent_{side}"
            limits[latent] = _fixed(interface.axes.get(latent, Axis(latent)), pixels // factor)
            limits[side] = _fixed(Axis(side, factor, factor), pixels)
    first = interface.inputs[0]
    if options.batch is not None and first.name != "input_ids":
        apart = branches if alike and is_branched(interface.outputs[0]) else 1
        limits["batch"] = _fixed(Axis("batch"), options.batch * branches // apart)
        limits["branches"] = _fixed(Axis("branches"), apart)
    own = tuple(factor * size for size in first.axes[2:] if isinstance(size, int))
    if first.name == "sample" and own and options.size not in (None, own):
        raise InputError(f"this model draws {own[0]}x{own[1]} pixels only; leave the size out")
    return interface.limited(limits)


def _fixed(axis: Axis, size: int) -> Axis:
    if (refusal := axis.refusal(size)) is not None:
        raise InputError(f"this model cannot be exported for that size: {refusal}")
    return replace(axis, minimum=size, maximum=size)


def with_scalars(interface: Interface, axes: tuple[int, ...]) -> Interface:
    """The interface as the file has it: single numbers get the dimensions `axes`."""
    return replace(interface, inputs=tuple(replace(port, axes=port.axes or axes) for port in interface.inputs))


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


def trace(module: "torch.nn.Module", method: str, interface: Interface) -> "torch.export.ExportedProgram":
    """Export one method of a model for all sizes of the interface.

    Raises BackendError: PyTorch cannot trace it.
    """
    import torch

    sizes = {name: _example(axis, index) for index, (name, axis) in enumerate(interface.axes.items())}
    values = tuple(torch.from_numpy(value) for value in probe(interface, sizes).values())
    shapes = tuple(dict(_dynamic(port, interface.axes)) for port in interface.inputs)
    try:
        with torch.no_grad():
            return torch.export.export(as_module(module, method), values, dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # torch.export raises many unrelated types
        raise BackendError(
            f"PyTorch cannot trace {interface.component}: {str(error).strip().splitlines()[0]}"
        ) from error


def _example(axis: Axis, index: int) -> int:
    """A size to trace with: 1 would be taken for granted, and equal sizes for one size."""
    if axis.minimum == axis.maximum:
        return axis.minimum
    size = axis.multiple * (index + 2)
    return size if axis.maximum is None else min(size, axis.maximum)


def _dynamic(port: Port, axes: Mapping[str, Axis]) -> Iterator[tuple[int, Any]]:
    """Number of a dimension that varies -> how it varies: a multiple of a size that stands for its axis."""
    for index, dimension in enumerate(port.axes):
        if isinstance(dimension, int):
            continue
        axis = dimension if isinstance(dimension, Axis) else axes[dimension.axis]
        if axis.minimum == axis.maximum:
            continue
        times = axis.multiple
        if isinstance(dimension, Scaled):
            times = times * dimension.numerator // dimension.denominator
        size = _symbol(axis)
        yield index, size if times == 1 else times * size


def _symbol(axis: Axis) -> Any:
    from torch.export import Dim

    least = max(1, axis.minimum // axis.multiple)
    most = None if axis.maximum is None else axis.maximum // axis.multiple
    return Dim(axis.name if axis.multiple == 1 else f"_{axis.name}", min=least, max=most)


def as_module(module: "torch.nn.Module", method: str) -> "torch.nn.Module":
    """A module whose call is `method` of `module`."""
    import torch

    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            function: Callable[..., tuple[torch.Tensor, ...]] = getattr(self.model, method)
            return function(*values)

    return Part()
