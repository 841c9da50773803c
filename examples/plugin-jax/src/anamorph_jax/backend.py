"""The engine: each part is traced once and compiled by XLA for every shape that it meets."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from anamorph import hookimpl
from anamorph.arrays import Array
from anamorph.backends.eager import load_module
from anamorph.components import Component
from anamorph.denoiser_interfaces import even
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
        import jax.numpy as jnp

        absent = {port.name: self.interface.absent(port) for port in self.interface.inputs if port.name not in inputs}
        given = {**inputs, **{name: jnp.zeros(shape) for name, shape in absent.items()}}
        results = self.function(
            self.weights, [self._dealt(port.axes, given[port.name]) for port in self.interface.inputs]
        )
        return {port.name: value for port, value in zip(self.interface.outputs, results, strict=True)}

    def _dealt(self, axes: Sequence[Any], value: Array) -> Array:
        """The value with its batch dealt out to all devices where it can be divided, or whole on each of them."""
        from jax import device_put
        from jax.sharding import NamedSharding, PartitionSpec

        batched = bool(axes) and isinstance(axes[0], Axis) and axes[0].name == "batch"
        rule = PartitionSpec("batch") if batched and value.shape[0] % self.mesh.size == 0 else PartitionSpec()
        return device_put(value, NamedSharding(self.mesh, rule))


class Jax:
    """JAX on the processor; with `shards`, several of its devices share the pictures of a batch."""

    name = "jax"
    formats = ("checkpoint",)
    rank: int | None = None
    double = False
    places: Mapping[str, tuple[str, ...]] = MappingProxyType({"cpu": ("float32",)})
    sizes = "each"
    costs = Costs(memory=2.0)  # PyTorch's copy of the weights lives until they are JAX's
    options: Mapping[str, str] = MappingProxyType({"shards": "how many of JAX's devices a batch is dealt out to"})

    def unavailable(self) -> str | None:
        lost = [name for name in ("torch", "jax") if not importlib.util.find_spec(name)]
        return f"{' and '.join(lost)} not installed; run: pip install anamorph-jax" if lost else None

    def devices(self) -> tuple[str, ...]:
        return tuple(self.places)

    def precisions(self, device: str) -> tuple[str, ...]:
        return self.places[device]

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        from jax import device_put, jit
        from jax.sharding import NamedSharding, PartitionSpec

        from anamorph.exporters.trace import trace
        from anamorph_jax.graph import Graph as Traced
        from anamorph_jax.graph import weights_of

        mesh = _mesh(dict(target.options).get("shards", "1"))
        shards = {"shards": str(mesh.size)} if mesh.size > 1 else {}
        module, opened = load_module(component, replace(target, options=())), dict[str, Program]()
        for part in parts:
            interface = even(component.interface(part), component.config)
            program = trace(module, module.method(part), interface)
            weights = device_put(weights_of(program), NamedSharding(mesh, PartitionSpec()))
            placement = Placement(part, self.name, target.device, target.precision, shards)
            function = jit(Traced(program, interface).__call__)
            opened[part] = JaxProgram(function, weights, mesh, interface, placement, JaxArrays())
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


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [Jax()]
