"""ONNX Runtime in float32, on the processor (which has no bfloat16 kernels) or by another execution provider."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from anamorph.arrays import Array, NumpyArrays
from anamorph.artifact import Artifact, Part
from anamorph.backends.buckets import SPARED, Buckets, Sizes
from anamorph.backends.numpy_program import GraphPort, agreed, artifact_of, prepared
from anamorph.backends.onnx_files import external_locations
from anamorph.backends.onnx_models import Model, Source
from anamorph.backends.onnx_providers import OPTIONS, PROVIDERS, Choice, available
from anamorph.components import Component
from anamorph.engine import Backend, Costs, Graph, Placement, Program, Target
from anamorph.entries import Key
from anamorph.errors import ArtifactError
from anamorph.interface import Interface
from anamorph.lora.factors import Layers
from anamorph.lora.ports import adaptable, is_factor, is_rank
from anamorph.machine import free_memory
from anamorph.memory import OwnSizes, Saving
from anamorph.plugins import hookimpl
from anamorph.rewrites import noted

TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}
"""ONNX Runtime's names of types -> those of an interface."""


@dataclass(frozen=True)
class OnnxProgram(Graph):
    """A part with its models; `InferenceSession.run` may be called by several threads at once."""

    interface: Interface
    placed: Placement
    arrays: NumpyArrays
    choice: Choice
    exported: Part
    """The record of what was exported."""
    buckets: Buckets[Model]

    @property
    def placement(self) -> Placement:
        """Read back from ONNX Runtime."""
        return replace(self.placed, history=tuple(self.buckets.history))

    def layers(self) -> Layers:
        """See `anamorph.lora.adapting.Adaptable`."""
        return adaptable(self.placed.part, self.exported)

    def ranks(self, rank: int) -> int | None:  # noqa: ARG002 - ranks are open
        """See `anamorph.lora.adapting.Adaptable`."""
        return None

    def session(self) -> "OnnxProgram":
        """A run mutates nothing, so a session is the program itself."""
        return self

    def spare(self, saving: Saving) -> str | None:
        """Take the number of sizes that have a model of their own; see `Program.spare`."""
        if not isinstance(saving, OwnSizes) or not self.choice.plain:
            return super().spare(saving)
        self.buckets.spare(saving)
        return None

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        values = prepared(self.interface, inputs)
        shapes = {name: value.shape for name, value in values.items() if not is_factor(name)}  # ranks stay open
        axes = {name: size for name, size in self.interface.sizes_of(inputs).items() if not is_rank(name)}
        made = self.buckets.take(Sizes(shapes, [name for name in inputs if name in shapes], axes))
        names = [port.name for port in self.interface.outputs]
        return dict(zip(names, self.choice.run(made.engine, names, values), strict=True))


class OnnxRuntime:
    """Opens exported folders in ONNX format."""

    name = "onnxruntime"
    formats = ("onnx",)
    rank: int | None = 10
    double = False
    places: Mapping[str, tuple[str, ...]] = MappingProxyType(dict.fromkeys(PROVIDERS, ("float32",)))
    sizes = "any"
    costs = Costs(disk={"float32": 4.0})
    concurrent = True
    options: Mapping[str, str] = MappingProxyType(OPTIONS)

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("onnxruntime"):
            return None
        return "ONNX Runtime is not installed; run: pip install 'anamorph[onnx]'"

    def devices(self) -> tuple[str, ...]:
        return available()

    def precisions(self, device: str) -> tuple[str, ...]:
        return self.places[device]

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        artifact = artifact_of(component, self.name, self.formats)
        return {part: _open(artifact, part, target, component=component) for part in parts}

    def key(self, artifact: Artifact, part: str, target: Target) -> Key:  # noqa: ARG002 - there is one target
        return Source(artifact, part, artifact.folder / artifact.parts[part].file, {}, {}).key

    def inner_values(
        self, artifact: Artifact, part: str, names: Sequence[str]
    ) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        program = _open(artifact, part, Target(), names)
        common = program.buckets.make(None)

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            values = prepared(program.interface, inputs)
            return dict(zip(names, common.engine.run(list(names), values), strict=True))

        return run


def _open(
    artifact: Artifact, part: str, target: Target, further: Sequence[str] = (), component: Component | None = None
) -> OnnxProgram:
    """Open a part, for the adapters of its component; `further` values of its graph become outputs."""
    path = artifact.open_part(part)
    _check_locations(artifact, part, path)
    exported = artifact.parts[part]
    declared = exported.interface if component is None else component.interface(part)
    inner = [name for name in further if name not in {port.name for port in declared.outputs}]
    choice = Choice.of(target)
    choice.check_sizes(part, declared)
    source = Source(artifact, part, path, *(({}, {}) if component is None else (component.adapted, component.fused)))
    common = source.opened(choice, inner)
    read_back = {} if choice.plain else choice.assigned(common.engine)
    threads = common.engine.get_session_options().intra_op_num_threads
    told = {"provider": common.engine.get_providers()[0], "threads": str(threads)}
    placement = Placement(
        part, "onnxruntime", target.device, "float32", {**told, **read_back, **noted(exported.rewrites)}
    )
    inputs = {port.name: _port(port) for port in common.engine.get_inputs()}
    outputs = {port.name for port in common.engine.get_outputs()}
    interface = agreed(path, declared, inputs, outputs)
    return OnnxProgram(interface, placement, NumpyArrays(), choice, exported, _buckets(common, exported, choice))


def _buckets(common: Model, exported: Part, choice: Choice) -> Buckets[Model]:
    """The model for all sizes, which is there already, and those for single ones."""

    def fits() -> bool:
        free = free_memory()
        return free is None or free > SPARED * exported.size

    def make(sizes: Sizes | None) -> Model:
        return common if sizes is None else common.fixed(sizes)

    def alone(sizes: Sizes) -> bool:
        return common.dimensions(sizes) is not None

    history = [f"{common.origin}, for all sizes"]
    return Buckets(make, fits, alone, choice.own_sizes, history=history, common=common)


def _port(port: Any) -> GraphPort:
    sizes = (size if isinstance(size, int) else None for size in port.shape)
    return GraphPort(TYPES.get(port.type, port.type), tuple(sizes))


def _check_locations(artifact: Artifact, part: str, path: Path) -> None:
    recorded = {artifact.folder / name for name in artifact.parts[part].files}
    for location in external_locations(path):
        if location in artifact.parts[part].linked:
            continue  # never read from there: every such weight is handed over
        if path.parent / location not in recorded or ".." in Path(location).parts:
            raise ArtifactError(
                f"{path} reads weights from {location!r}, which its artifact does not record; it is refused"
            )


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [OnnxRuntime()]
