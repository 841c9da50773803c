"""ONNX Runtime on the processor, in float32: it has no bfloat16 kernels there."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from anamorph.arrays import Array, NumpyArrays
from anamorph.artifact import Artifact
from anamorph.backends.cores import physical_cores
from anamorph.backends.numpy_program import GraphPort, agreed, artifact_of, checked, imported, prepared
from anamorph.backends.onnx_files import external_locations, with_outputs
from anamorph.components import Component
from anamorph.engine import Backend, Graph, Placement, Program, Target, check_target
from anamorph.errors import ArtifactError
from anamorph.interface import Interface
from anamorph.linked import Linked
from anamorph.plugins import hookimpl
from anamorph.rewrites import noted

PROVIDER = "CPUExecutionProvider"
BFLOAT16 = 16
"""ONNX's number of this type (onnx.proto, TensorProto.DataType)."""
TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}
"""ONNX Runtime's names of types -> those of an interface."""


@dataclass(frozen=True)
class OnnxProgram(Graph):
    """One model file in ONNX Runtime; `InferenceSession.run` may be called by several threads at once."""

    engine: Any
    interface: Interface
    placement: Placement
    arrays: NumpyArrays
    weights: Mapping[str, Linked]
    """Kept, because ONNX Runtime reads linked weights where they are mapped."""

    def session(self) -> "OnnxProgram":
        """A run mutates nothing, so a session is the program itself."""
        return self

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        values, sizes = prepared(self.interface, inputs)
        names = [port.name for port in self.interface.outputs]
        results = self.engine.run(names, values)
        return checked(self.interface, sizes, dict(zip(names, results, strict=True)))


class OnnxRuntime:
    """Opens exported folders in ONNX format."""

    name = "onnxruntime"
    formats = ("onnx",)
    rank: int | None = 10
    double = False

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("onnxruntime"):
            return None
        return "ONNX Runtime is not installed; run: pip install 'anamorph[onnx]'"

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def precisions(self, device: str) -> tuple[str, ...]:  # noqa: ARG002 - there is one device
        return ("float32",)

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        check_target(self, target)
        artifact = artifact_of(component, self.name, self.formats)
        return {part: _open(artifact, part, target) for part in parts}


def inner_values(
    artifact: Artifact, part: str, names: Sequence[str]
) -> Callable[[Mapping[str, Array]], dict[str, NDArray[Any]]]:
    """A part as a function from its inputs to values inside its graph, in float32."""
    program = _open(artifact, part, Target(), names)

    def run(inputs: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
        values, _ = prepared(program.interface, inputs)
        return dict(zip(names, program.engine.run(list(names), values), strict=True))

    return run


def _open(artifact: Artifact, part: str, target: Target, further: Sequence[str] = ()) -> OnnxProgram:
    """Open a part; `further` values of its graph become outputs."""
    onnxruntime = imported("onnxruntime", "onnx")
    path = artifact.open_part(part)
    _check_locations(artifact, part, path)
    linked = artifact.open_weights(part)
    options = onnxruntime.SessionOptions()
    options.add_external_initializers(list(linked), [_value(weight) for weight in linked.values()])
    options.intra_op_num_threads = physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors are raised; its warnings about unused initialisers help nobody
    inner = [name for name in further if name not in {port.name for port in artifact.parts[part].interface.outputs}]
    if inner:  # a model that comes as bytes does not know where its weights lie
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    model = with_outputs(path, inner) if inner else str(path)
    try:
        engine = onnxruntime.InferenceSession(model, options, providers=[PROVIDER])
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types
        raise ArtifactError(f"{path} cannot be opened by ONNX Runtime: {str(error).splitlines()[0]}") from None
    threads = engine.get_session_options().intra_op_num_threads
    details = {"provider": engine.get_providers()[0], "threads": str(threads)}
    details |= noted(artifact.parts[part].rewrites)
    placement = Placement(part, "onnxruntime", target.device, "float32", details)
    inputs = {port.name: _port(port) for port in engine.get_inputs()}
    outputs = {port.name for port in engine.get_outputs()}
    interface = agreed(path, artifact.parts[part].interface, inputs, outputs)
    return OnnxProgram(engine, interface, placement, NumpyArrays(), linked)


def _port(port: Any) -> GraphPort:
    sizes = (size if isinstance(size, int) else None for size in port.shape)
    return GraphPort(TYPES.get(port.type, port.type), tuple(sizes))


def _value(weight: Linked) -> Any:
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
