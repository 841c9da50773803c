"""The engine: each part is one function of JAX, compiled for every shape that it meets."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from anamorph import hookimpl
from anamorph.arrays import Array
from anamorph.backends.eager import load_module
from anamorph.components import Component
from anamorph.engine import Backend, Costs, Graph, Placement, Program, Target
from anamorph.errors import BackendError
from anamorph.interface import Axis, Interface
from anamorph_jax.arrays import JaxArrays


@dataclass(frozen=True)
class JaxProgram(Graph):
    """One part with its weights, which every device holds."""

    function: Callable[..., Any]
    weights: Any
    mesh: Any
    interface: Interface
    placement: Placement
    arrays: JaxArrays

    def session(self) -> "JaxProgram":
        """Functions of JAX have no state, so a session is the program itself."""
        return self

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        given = tuple(self._spread(port.axes, inputs.get(port.name)) for port in self.interface.inputs)
        results = self.function(self.weights, given)
        return {port.name: value for port, value in zip(self.interface.outputs, results, strict=True)}

    def _spread(self, axes: Sequence[Any], value: Array | None) -> Array | None:
        """The value with its batch dealt out to all devices where it can be divided, or whole on each of them."""
        from jax import device_put
        from jax.sharding import NamedSharding, PartitionSpec

        if value is None:
            return None
        batched = bool(axes) and isinstance(axes[0], Axis) and axes[0].name == "batch"
        dealt = batched and value.shape[0] % self.mesh.size == 0
        return device_put(value, NamedSharding(self.mesh, PartitionSpec("batch" if dealt else None)))


class Jax:
    """JAX on the processor; `shards` simulated devices share the pictures of a batch."""

    name = "jax"
    formats = ("checkpoint",)
    rank: int | None = None
    double = False
    places: Mapping[str, tuple[str, ...]] = MappingProxyType({"cpu": ("float32",)})
    sizes = "each"
    costs = Costs(memory=2.0)  # PyTorch's copy of the weights lives until they are JAX's
    options: Mapping[str, str] = MappingProxyType({"shards": "how many of JAX's devices a batch is dealt out to"})

    def unavailable(self) -> str | None:
        lost = [name for name in ("torch", "jax", "torchax") if not importlib.util.find_spec(name)]
        return f"{' and '.join(lost)} not installed; run: pip install anamorph-jax" if lost else None

    def devices(self) -> tuple[str, ...]:
        return tuple(self.places)

    def precisions(self, device: str) -> tuple[str, ...]:
        return self.places[device]

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        mesh = _mesh(dict(target.options).get("shards", "1"))
        module = load_module(replace(component, rewrites=()), target)
        shards = {"shards": str(mesh.size)} if mesh.size > 1 else {}
        opened: dict[str, Program] = {}
        for part in parts:
            function, weights = _translated(module, part, mesh)
            placement = Placement(part, self.name, target.device, target.precision, shards)
            opened[part] = JaxProgram(function, weights, mesh, component.interface(part), placement, JaxArrays())
        return opened


def _mesh(wish: str) -> Any:
    """The devices that a batch is dealt out to; raises BackendError where there are fewer than wished for."""
    import jax

    here = jax.devices("cpu")
    if not wish.isdecimal() or not 1 <= int(wish) <= len(here):
        raise BackendError(
            f"option shards of jax is {wish!r}, expected 1 to {len(here)}, the devices of JAX here; the variable "
            "XLA_FLAGS=--xla_force_host_platform_device_count=N makes N of the processor"
        )
    return jax.sharding.Mesh(here[: int(wish)], ("batch",))


def _translated(module: Any, part: str, mesh: Any) -> tuple[Callable[..., Any], Any]:
    """A part as a compiled function of its weights and inputs, and the weights on all devices."""
    import jax
    import torchax
    from jax.sharding import NamedSharding, PartitionSpec

    from anamorph.exporters.trace import as_module

    weights, function = torchax.extract_jax(as_module(module, module.method(part)))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(function), jax.device_put(weights, everywhere)


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [Jax()]
