"""ONNX Runtime in float32, on the processor (which has no bfloat16 kernels) or by another execution provider."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from anamorph.arrays import Array, NumpyArrays
from anamorph.artifact import Artifact, Part
from anamorph.backends.buckets import COMPILED, FOUND
from anamorph.backends.cores import physical_cores
from anamorph.backends.numpy_program import GraphPort, agreed, artifact_of, imported, prepared
from anamorph.backends.onnx_files import external_locations, with_outputs
from anamorph.backends.onnx_lora import fused_weights, with_inputs
from anamorph.backends.onnx_providers import HOST, OPTIONS, PROVIDERS, RECORD, Choice, available
from anamorph.components import Component
from anamorph.engine import Backend, Costs, Graph, Placement, Program, Target
from anamorph.entries import ANY, Entry, Key, discard, find, keep
from anamorph.errors import AnamorphError, ArtifactError, OutputError
from anamorph.interface import Interface
from anamorph.linked import Linked
from anamorph.lora.factors import Change, Layers
from anamorph.lora.ports import adaptable, digest_of
from anamorph.machine import package_version
from anamorph.plugins import hookimpl
from anamorph.rewrites import noted

BFLOAT16 = 16
"""ONNX's number of this type (onnx.proto, TensorProto.DataType)."""
TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}
"""ONNX Runtime's names of types -> those of an interface."""
OPTIMISED, WEIGHTS = "model.onnx", "weights.bin"
SAVING = {
    "session.optimized_model_external_initializers_file_name": WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}
"""How an optimised model is stored: its weights beside it, mapped. Not as kernels pack them, which it can store, too:
ONNX Runtime 1.31 ends the process when it runs some of the models that it stored so, such as a safety checker."""
LAYOUT = 2
"""Raised whenever the same graph is optimised in another way, so that older entries of the cache are not taken."""


@dataclass(frozen=True)
class OnnxProgram(Graph):
    """One model file in ONNX Runtime; `InferenceSession.run` may be called by several threads at once."""

    engine: Any
    interface: Interface
    placement: Placement
    arrays: NumpyArrays
    choice: Choice
    weights: Mapping[str, Linked]
    """Kept, because ONNX Runtime reads linked weights where they are mapped."""
    exported: Part
    """The record of what was exported."""

    def layers(self) -> Layers:
        """See `anamorph.lora.adapting.Adaptable`."""
        return adaptable(self.placement.part, self.exported)

    def ranks(self, rank: int) -> int | None:  # noqa: ARG002 - ranks are open
        """See `anamorph.lora.adapting.Adaptable`."""
        return None

    def session(self) -> "OnnxProgram":
        """A run mutates nothing, so a session is the program itself."""
        return self

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        values = prepared(self.interface, inputs)
        names = [port.name for port in self.interface.outputs]
        return dict(zip(names, self.choice.run(self.engine, names, values), strict=True))


class OnnxRuntime:
    """Opens exported folders in ONNX format."""

    name = "onnxruntime"
    formats = ("onnx",)
    rank: int | None = 10
    double = False
    places: Mapping[str, tuple[str, ...]] = MappingProxyType(dict.fromkeys(PROVIDERS, ("float32",)))
    sizes = "any"
    costs = Costs(disk=4.0)
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

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            values = prepared(program.interface, inputs)
            return dict(zip(names, program.engine.run(list(names), values), strict=True))

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
    engine, origin = (None, COMPILED) if inner or source.fused or not choice.plain else _cached(source)
    linked: Mapping[str, Linked] = {}
    if engine is None:
        linked = source.weights()
        try:
            engine = _session(source.model(inner), path.parent, linked, _options(), choice)
        except AnamorphError:
            raise
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types
            raise ArtifactError(f"{path} cannot be opened by ONNX Runtime: {_first_line(error)}") from None
    read_back = {} if choice.plain else choice.assigned(engine)
    threads = engine.get_session_options().intra_op_num_threads
    told = {"provider": engine.get_providers()[0], "threads": str(threads)}
    details = {**told, **read_back, **noted(exported.rewrites)}
    placement = Placement(part, "onnxruntime", target.device, "float32", details, (f"{origin}, for all sizes",))
    inputs = {port.name: _port(port) for port in engine.get_inputs()}
    outputs = {port.name for port in engine.get_outputs()}
    interface = agreed(path, declared, inputs, outputs)
    return OnnxProgram(engine, interface, placement, NumpyArrays(), choice, linked, exported)


@dataclass(frozen=True)
class Source:
    """A part that is opened: its file, and the layers that adapters change while it runs, or have changed before."""

    artifact: Artifact
    part: str
    path: Path
    adapted: Layers
    fused: Change

    @property
    def exported(self) -> Part:
        """The record of what was exported."""
        return self.artifact.parts[self.part]

    def model(self, further: Sequence[str] = ()) -> str | bytes:
        """What ONNX Runtime reads: the file, or a graph that was made of it."""
        if self.adapted:
            model = with_inputs(self.path, self.exported, self.adapted)
        elif further:
            model = self.path.read_bytes()
        else:
            return str(self.path)
        return with_outputs(model, further)

    def weights(self) -> dict[str, Linked]:
        """The weights that are handed over: those that lie in the checkpoint, and those that adapters have changed."""
        linked = self.artifact.open_weights(self.part)
        return {**linked, **(fused_weights(self.path, self.exported, self.fused, linked) if self.fused else {})}

    @property
    def key(self) -> Key:
        """What the entry of an optimised model in the cache depends on; it serves all sizes."""
        settings = {"threads": physical_cores(), "provider": HOST, "layout": LAYOUT}
        if self.adapted:
            settings["adapted"] = digest_of(self.adapted)
        files = self.exported
        return Key.of(self.part, package_version("onnxruntime"), files.files, files.linked, ANY, "float32", settings)


def _cached(source: Source) -> tuple[Any | None, str]:
    """The session of a part's optimised model, made now if it is not in the cache; None where that does not take it."""
    folder = source.path.parent

    def optimise(draft: Path) -> None:
        options = _options()
        options.optimized_model_filepath = str(draft / OPTIMISED)
        for name, value in SAVING.items():
            options.add_session_config_entry(name, value)
        try:
            _session(source.model(), folder, source.weights(), options)
        except AnamorphError:
            raise
        except Exception as error:  # of the disk or of the model: that is opened once more, without the cache
            raise OutputError(f"ONNX Runtime cannot write to {draft} ({_first_line(error)}); free the disk") from None

    key = source.key
    ways: dict[str, Callable[[], Entry | None]] = {FOUND: lambda: find(key), COMPILED: lambda: keep(key, optimise)}
    for origin, look in ways.items():
        if (entry := look()) is None:
            continue
        options = _options()
        options.graph_optimization_level = imported("onnxruntime", "onnx").GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return _session(str(entry.folder / OPTIMISED), entry.folder, {}, options), origin
        except Exception as error:
            discard(entry.folder, f"ONNX Runtime does not take {entry.folder} ({_first_line(error)})")
    return None, COMPILED


def _options() -> Any:
    options = imported("onnxruntime", "onnx").SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors are raised; its warnings about unused initialisers help nobody
    return options


def _session(
    model: str | bytes, folder: Path, linked: Mapping[str, Linked], options: Any, choice: Choice | None = None
) -> Any:
    """Open a model file, or a model that comes as bytes and does not know the `folder` where its weights lie.

    Without a choice the processor runs it.
    """
    options.add_external_initializers(list(linked), [value_of(weight) for weight in linked.values()])
    if isinstance(model, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    providers: list[Any] = [HOST]
    if choice is not None:
        options.add_session_config_entry(RECORD, "1")
        providers = choice.listed()
    return imported("onnxruntime", "onnx").InferenceSession(model, options, providers=providers)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _port(port: Any) -> GraphPort:
    sizes = (size if isinstance(size, int) else None for size in port.shape)
    return GraphPort(TYPES.get(port.type, port.type), tuple(sizes))


def value_of(weight: Linked) -> Any:
    """A mapped tensor as a value of ONNX Runtime, which reads it where it lies."""
    import onnxruntime

    if weight.dtype == "BF16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(weight.values, BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(weight.values)


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
