"""OpenVINO on the processor, in float32 or bfloat16: pinned, because left alone it chooses bfloat16 by itself."""

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array, NumpyArrays
from anamorph.artifact import Artifact
from anamorph.backends.cores import physical_cores
from anamorph.backends.numpy_program import GraphPort, agreed, artifact_of, checked, imported, prepared
from anamorph.backends.openvino_angles import cut_angles
from anamorph.backends.openvino_files import check_ir
from anamorph.backends.openvino_weights import multiply_narrow, put_weights
from anamorph.components import Component
from anamorph.engine import Backend, Graph, Placement, Program, Target, check_target
from anamorph.errors import ArtifactError, BackendError
from anamorph.interface import Interface, size_of
from anamorph.linked import Linked
from anamorph.plugins import hookimpl
from anamorph.rewrites import noted

HINTS = {"float32": "f32", "bfloat16": "bf16"}
EXACT = "float32"
DEVICE = "CPU"
TYPES = {"f32": "float32", "i64": "int64"}
"""OpenVINO's names of types -> those of an interface."""
SCALAR = (1,)
"""The shape of single numbers in OpenVINO's files, as other tools feed them."""


@dataclass(frozen=True)
class OpenVinoProgram(Graph):
    """One compiled model; each session has an infer request of its own, because a request holds its outputs."""

    compiled: Any
    interface: Interface
    placement: Placement
    arrays: NumpyArrays
    weights: Mapping[str, Linked]
    """Kept, because OpenVINO reads linked weights where they are mapped."""
    angles: Any | None = None
    """What computes angles of the compiled model in float32; see `openvino_angles`."""

    def session(self) -> "OpenVinoSession":
        """A caller with buffers of its own."""
        angles = None if self.angles is None else self.angles.create_infer_request()
        return OpenVinoSession(self, self.compiled.create_infer_request(), angles)


@dataclass(frozen=True)
class OpenVinoSession:
    """Runs one infer request; results are copies, because the next call overwrites the request's own."""

    program: OpenVinoProgram
    request: Any
    angles: Any | None

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        interface = self.program.interface
        values, sizes = prepared(interface, inputs)
        given = {name: value.reshape(value.shape or SCALAR) for name, value in values.items()}
        if self.angles is not None:
            given |= _inferred(self.angles, given)
        _inferred(self.request, given)
        outputs = {port.name: np.array(self.request.get_tensor(port.name).data) for port in interface.outputs}
        return checked(interface, sizes, outputs)


def _inferred(request: Any, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Run a request with those of the values that it takes; its outputs, on memory that its next call overwrites."""
    taken = {name for port in request.model_inputs for name in port.names}
    request.infer({name: value for name, value in given.items() if name in taken}, share_inputs=True)
    return {name: request.get_tensor(name).data for port in request.model_outputs for name in port.names}


class OpenVino:
    """Opens exported folders in OpenVINO's IR format."""

    name = "openvino"
    formats = ("openvino",)
    rank: int | None = 10
    double = False

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("openvino"):
            return None
        return "OpenVINO is not installed; run: pip install 'anamorph[openvino]'"

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def precisions(self, device: str) -> tuple[str, ...]:  # noqa: ARG002 - there is one device
        capable = "BF16" in core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
        return ("float32", "bfloat16") if capable else ("float32",)

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        check_target(self, target)
        artifact = artifact_of(component, self.name, self.formats)
        return {part: _open(artifact, part, target) for part in parts}


@functools.cache
def core() -> Any:
    """OpenVINO's entry point; one per process, because each loads the plug-ins of all devices."""
    return imported("openvino", "openvino").Core()


def inner_values(
    artifact: Artifact, part: str, names: Sequence[str]
) -> Callable[[Mapping[str, Array]], dict[str, NDArray[Any]]]:
    """A part as a function from its inputs to values inside its graph, in float32."""
    session = _open(artifact, part, Target(), names).session()

    def run(inputs: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
        session(inputs)
        return {name: np.array(session.request.get_tensor(name).data) for name in names}

    return run


def _open(artifact: Artifact, part: str, target: Target, further: Sequence[str] = ()) -> OpenVinoProgram:
    """Open a part; `further` values of its graph become outputs."""
    path, interface = artifact.open_part(part), artifact.parts[part].interface
    check_ir(artifact, part, path)
    try:
        model = core().read_model(path)
        weights = artifact.open_weights(part)
        put_weights(model, weights)
        _take_floats(model, interface)
        if inner := [name for name in further if name not in {port.name for port in interface.outputs}]:
            model.add_outputs(inner)
        declared = {port.name for port in interface.inputs}
        inputs = {min(port.names, key=lambda name: name not in declared): _port(port) for port in model.inputs}
        outputs = {name for port in model.outputs for name in port.names}
        angles = cut_angles(model) if target.precision != EXACT else None
        if target.precision == "bfloat16":
            multiply_narrow(model)
        if angles is not None:
            angles = core().compile_model(angles, DEVICE, _settings(EXACT))
        compiled = core().compile_model(model, DEVICE, _settings(target.precision))
    except RuntimeError as error:
        raise ArtifactError(f"{path} cannot be opened by OpenVINO: {str(error).strip().splitlines()[-1]}") from None
    placement = _placement(compiled, part, target, noted(artifact.parts[part].rewrites))
    served = agreed(path, interface, inputs, outputs, SCALAR)
    return _settled(OpenVinoProgram(compiled, served, placement, NumpyArrays(), weights, angles))


def _settings(precision: str) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "EXECUTION_MODE_HINT": "ACCURACY" if precision == EXACT else "PERFORMANCE",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": physical_cores(),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }


def _settled(program: OpenVinoProgram) -> OpenVinoProgram:
    """The program after one call in which every open axis is longer than its shortest.

    OpenVINO 2026.4 settles its fused attention at the first call of a compiled model. Where that has a single key
    (a picture whose smallest level is one pixel, a text of one token), all later calls of 16 keys or more return
    wrong values.
    """
    axes = program.interface.axes
    sizes = {
        name: max(axis.minimum, min(2 * axis.multiple, axis.maximum or 2 * axis.multiple))
        for name, axis in axes.items()
    }
    if any(axis.minimum != axis.maximum for axis in axes.values()):
        ports = program.interface.required.inputs
        shapes = {port.name: tuple(size_of(dimension, sizes) for dimension in port.axes) for port in ports}
        program.session()({port.name: np.zeros(shapes[port.name], port.dtype) for port in ports})
    return program


def _port(port: Any) -> GraphPort:
    kind = port.element_type.to_string()
    sizes = (size.get_length() if size.is_static else None for size in port.partial_shape)
    return GraphPort(TYPES.get(kind, kind), tuple(sizes))


def _placement(compiled: Any, part: str, target: Target, notes: Mapping[str, str]) -> Placement:
    runs = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    names = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
    if (precision := names.get(runs, runs)) != target.precision:
        raise BackendError(f"OpenVINO compiled {part} for {precision} instead of {target.precision}; update openvino")
    threads = compiled.get_property("INFERENCE_NUM_THREADS")
    mode = compiled.get_property("EXECUTION_MODE_HINT")
    details = {"mode": str(mode).rsplit(".", 1)[-1].lower(), "threads": str(threads), **notes}
    return Placement(part, "openvino", target.device, precision, details)


def _take_floats(model: Any, interface: Interface) -> None:
    """Let inputs that files hold as whole numbers (the timestep, as other tools feed it) take our float32.

    Schedulers with fractional timesteps would lose them otherwise.
    """
    import openvino

    whole = {port.name for port in interface.inputs if port.dtype == "float32"}
    for port in model.inputs:
        if not port.names & whole or port.element_type != openvino.Type.i64:
            continue
        old = port.get_node()
        new = openvino.op.Parameter(openvino.Type.f32, old.get_partial_shape())
        new.output(0).set_names(port.names)
        for reader in port.get_target_inputs():  # their conversion to float32 no longer does anything
            reader.replace_source_output(new.output(0))
        model.remove_parameter(old)
        model.add_parameters([new])
    model.validate_nodes_and_infer_types()


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [OpenVino()]
