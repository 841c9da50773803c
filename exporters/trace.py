"""One `torch.export` per part: which sizes it shall take, and the graph that takes them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anamorph.artifact import PORTABLE
from anamorph.components import Component
from anamorph.conditions import IMAGE_BIAS, IMAGE_KEYS, IMAGE_MASKS, IMAGE_VALUES
from anamorph.denoiser_interfaces import even
from anamorph.errors import BackendError, InputError
from anamorph.exporting import ExportOptions
from anamorph.interface import Axis, Interface, Port, Scaled
from anamorph.native import takes_branches
from anamorph.probes import probe

if TYPE_CHECKING:
    import torch


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
        apart = branches if alike and takes_branches(interface) else 1
        limits["batch"] = _fixed(Axis("batch"), options.batch * branches // apart)
        limits["branches"] = _fixed(Axis("branches"), apart)
    own = tuple(factor * size for size in first.axes[2:] if isinstance(size, int))
    if first.name == "sample" and own and options.size not in (None, own):
        raise InputError(f"this model draws {own[0]}x{own[1]} pixels only; leave the size out")
    return interface.limited(limits)


def without_images(interface: Interface) -> Interface:
    """The same without the optional inputs for pictures as prompts."""
    inputs = (
        port
        for port in interface.inputs
        if not (port.optional and port.name.startswith((IMAGE_KEYS, IMAGE_VALUES, IMAGE_BIAS, IMAGE_MASKS)))
    )
    return replace(interface, inputs=tuple(inputs))


def _fixed(axis: Axis, size: int) -> Axis:
    if (refusal := axis.refusal(size)) is not None:
        raise InputError(f"this model cannot be exported for that size: {refusal}")
    return replace(axis, minimum=size, maximum=size)


def with_scalars(interface: Interface, axes: tuple[int, ...]) -> Interface:
    """The interface as the file has it: single numbers get the dimensions `axes`."""
    return replace(interface, inputs=tuple(replace(port, axes=port.axes or axes) for port in interface.inputs))


def trace(module: "torch.nn.Module", method: str, interface: Interface) -> "torch.export.ExportedProgram":
    """Export one method of a model for all sizes of the interface.

    Raises BackendError: PyTorch cannot trace it.
    """
    import torch

    from anamorph.exporters.sizes import from_required

    sizes = {name: _example(axis, index) for index, (name, axis) in enumerate(interface.axes.items())}
    values = tuple(torch.from_numpy(value) for value in probe(interface, sizes).values())
    shapes = tuple(dict(_dynamic(port, interface.axes)) for port in interface.inputs)
    try:
        with torch.no_grad():
            program = torch.export.export(as_module(module, method), values, dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # torch.export raises many unrelated types
        raise BackendError(
            f"PyTorch cannot trace {interface.component}: {str(error).strip().splitlines()[0]}"
        ) from error
    from_required(program, interface)
    return program


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
