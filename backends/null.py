"""An engine that computes nothing: every output is zero. Orchestration is tested with it, without weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from anamorph.arrays import Array, NumpyArrays
from anamorph.components import CHECKPOINT, Component
from anamorph.engine import Backend, Costs, Graph, Placement, Program, Session, Target
from anamorph.interface import Interface
from anamorph.plugins import hookimpl


@dataclass(frozen=True)
class NullProgram(Graph):
    """Answers zeros of the declared shapes."""

    interface: Interface
    placement: Placement
    arrays: NumpyArrays

    def session(self) -> Session:
        return self

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        shapes = self.interface.output_shapes(self.interface.sizes_of(inputs))
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


class Null:
    """Opens anything, computes zeros."""

    name = "null"
    formats = (CHECKPOINT,)
    rank: int | None = None
    double = True
    places: Mapping[str, tuple[str, ...]] = MappingProxyType({"cpu": ("float32",)})
    sizes = "any"
    costs = Costs()
    options: Mapping[str, str] = MappingProxyType({})

    def unavailable(self) -> str | None:
        return None

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def precisions(self, device: str) -> tuple[str, ...]:  # noqa: ARG002 - the same on every device
        return self.places["cpu"]

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        placement = {part: Placement(part, self.name, target.device, target.precision) for part in parts}
        return {part: NullProgram(component.interface(part), placement[part], NumpyArrays()) for part in parts}


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [Null()]
