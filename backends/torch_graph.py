"""What engines share that run exported graphs with PyTorch's own runtimes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from anamorph.arrays import Array
from anamorph.backends.torch_arrays import TorchArrays
from anamorph.engine import Graph, Placement
from anamorph.interface import Axis, Interface, Port


@dataclass(frozen=True)
class TorchGraph(Graph):
    """One part as a function of tensors in the order of its interface; calls change nothing."""

    function: Callable[..., tuple[Any, ...]]
    interface: Interface
    placement: Placement
    arrays: TorchArrays
    broadcasts: bool
    """Whether a graph takes zeros of size 1 for what is absent; others were compiled for sizes that fit together."""

    def session(self) -> "TorchGraph":
        """A call mutates nothing, so a session is the program itself."""
        return self

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        sizes = {} if self.broadcasts else self.interface.sizes_of(inputs)
        values = []
        for port in self.interface.inputs:
            dtype = getattr(torch, port.dtype)
            if port.name in inputs:
                values.append(inputs[port.name].to(self.arrays.device, dtype).contiguous())
            else:
                shape = self.interface.absent(port) if self.broadcasts else self._whole(port, sizes)
                values.append(torch.zeros(shape, dtype=dtype, device=self.arrays.device))
        with torch.inference_mode():
            results = self.function(*values)
        return {port.name: value for port, value in zip(self.interface.outputs, results, strict=True)}

    def _whole(self, port: Port, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of an absent input as if it were there; axes of its own have their least size."""
        least = {axis.name: max(axis.minimum, axis.multiple) for axis in port.axes if isinstance(axis, Axis)}
        (shape,) = Interface("", (), (port,)).output_shapes({**least, **sizes}).values()
        return shape
