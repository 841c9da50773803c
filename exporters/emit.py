"""From an exported PyTorch graph to an ONNX model: the writer that every format starts from.

Each operation that a model uses has one entry in `operators.OPERATORS`. Weights keep the names of the checkpoint and
are written once, one after another, so that exporting needs little more memory than the largest tensor.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anamorph.errors import BackendError
from anamorph.exporters.operators import OPERATORS, Size
from anamorph.exporters.taps import block_outputs
from anamorph.interface import Axis, Dimension, Interface, Port, Scaled

OPSET, IR_VERSION = 18, 10
DATA = "model.onnx_data"
ALIGNMENT = 4096
"""Weights begin at multiples of this, so that engines can map them (bytes)."""
INLINE = 1024
"""Constants up to this size stay in the model file (bytes)."""
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}
NUMPY_TYPES = {
    torch.float32: np.dtype(np.float32), torch.int64: np.dtype(np.int64), torch.int32: np.dtype(np.int32),
    torch.bool: np.dtype(np.bool_),
}  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """A tensor of the checkpoint as the graph uses it; matrices of linear layers are stored transposed."""

    name: str
    value: torch.Tensor
    transposed: bool = False

    def array(self) -> NDArray[Any]:
        """The values in the order of the file."""
        value = self.value.detach()
        return (value.t() if self.transposed else value).contiguous().numpy()


@dataclass
class Builder:
    """Collects the nodes and constants of one graph."""

    storage: str = "float32"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)
    small: list[TensorProto] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    uses: dict[str, str] = field(default_factory=dict)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output; returns that output's name."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Add a node with several outputs."""
        number = len(self.nodes)
        names = [f"{kind}_{number}" if outputs == 1 else f"{kind}_{number}.{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"n{number}", **attributes))
        return names

    def constant(self, value: Any, dtype: Any = None) -> str:
        """A constant inside the model file; equal ones are shared."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = f"c{len(self.constants)}"
            self.small.append(numpy_helper.from_array(array, self.constants[key]))
        return self.constants[key]

    def sizes(self, values: Sequence["int | Size"]) -> str:
        """Whole numbers, known now or only when the graph runs, as one tensor."""
        if all(isinstance(value, int) for value in values):
            return self.constant(values, np.int64)
        parts = [value.name if isinstance(value, Size) else self.constant([value], np.int64) for value in values]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def weight(self, weight: Weight) -> str:
        """A weight as a value of the graph, in float32 whatever the type in which it is stored."""
        name = f"{weight.name}.transposed" if weight.transposed else weight.name
        if name not in self.weights:
            self.weights[name] = weight
            narrow = self.storage != "float32" and weight.value.is_floating_point()
            self.uses[name] = self.op("Cast", name, to=TensorProto.FLOAT) if narrow else name
        return self.uses[name]


def emit(
    program: torch.export.ExportedProgram, interface: Interface, folder: Path, storage: str = "float32"
) -> dict[str, str]:
    """Write `model.onnx` and `model.onnx_data` into `folder`; returns block -> name of the value that it ends with.

    `interface` names the inputs and outputs in the order of the program's. `storage` is the type of the weights on
    disk; the graph computes in float32.
    Raises BackendError: the graph holds an operation that has no entry in the table.
    """
    builder = Builder(storage)
    values = _Values(builder, program)
    inputs = iter(interface.inputs)
    outputs: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name not in values.weights:
                values[node] = next(inputs).name
        elif node.op == "call_function":
            values.call(node)
        elif node.op == "output":
            for port, result in zip(interface.outputs, node.args[0], strict=True):
                builder.nodes.append(helper.make_node("Identity", [values.tensor(result)], [port.name]))
                outputs[values.tensor(result)] = port.name
    _write(builder, interface, folder)
    # Formats may drop the name of a value in favour of the output's.
    return {path: outputs.get(name, name) for path, name in values.taps({port.name for port in interface.inputs})}


class _Values:
    """What each node of the PyTorch graph has become: a name, a size, a constant, a weight or a tuple of names."""

    def __init__(self, builder: Builder, program: torch.export.ExportedProgram) -> None:
        self.builder = builder
        self.known: dict[Any, Any] = {}
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.weights = {
            key: Weight(name.removeprefix("model."), program.state_dict[name]) for key, name in names.items()
        }
        for key, name in signature.inputs_to_lifted_tensor_constants.items():
            self.weights[key] = program.constants[name]

    def __setitem__(self, node: Any, value: Any) -> None:
        self.known[node] = value

    def resolve(self, value: Any) -> Any:
        """The value of an argument: nodes replaced by what they have become."""
        if isinstance(value, torch.fx.Node):
            return self.weights[value.name] if value.name in self.weights else self.known[value]
        if isinstance(value, list | tuple):
            return [self.resolve(item) for item in value]
        return value

    def tensor(self, value: Any) -> str:
        """An argument as the name of a tensor."""
        found = self.resolve(value)
        if isinstance(found, Weight):
            return self.builder.weight(found)
        if isinstance(found, torch.Tensor):
            return self.builder.constant(found.detach().numpy())
        if not isinstance(found, str):
            raise TypeError(f"{value} is no tensor of the graph")
        return found

    def taps(self, inputs: set[str]) -> Iterator[tuple[str, str]]:
        """Each block and the value that it ends with, where that is one tensor that the graph computes."""
        for path, node in block_outputs(self.known).items():
            name = self.known[node]
            if isinstance(name, str) and name not in inputs:
                yield path, name

    def call(self, node: Any) -> None:
        """Translate one operation; one that depends on constants alone is computed now, by PyTorch itself."""
        arguments = self.resolve(node.args), {key: self.resolve(value) for key, value in node.kwargs.items()}
        if all(_known_now(value) for value in _leaves(arguments)):
            self[node] = node.target(*arguments[0], **arguments[1])
            return
        name = str(node.target)
        if name not in OPERATORS:
            raise BackendError(f"the exporter has no rule for the operation {name}; add one to exporters/operators.py")
        self[node] = OPERATORS[name](Call(self, node, _bind(node)))


@dataclass(frozen=True)
class Call:
    """One operation of the PyTorch graph while it is translated: arguments by the names of its schema."""

    values: _Values
    node: Any
    arguments: Mapping[str, Any]

    @property
    def builder(self) -> Builder:
        """Where the translation goes."""
        return self.values.builder

    def __getitem__(self, name: str) -> Any:
        """An argument: numbers as they are, a run-time size as `Size`, tensors as whatever they have become."""
        return self.values.resolve(self.arguments[name])

    def tensor(self, name: str) -> str:
        """An argument as the name of a tensor."""
        return self.values.tensor(self.arguments[name])

    def tensors(self, name: str) -> list[str]:
        """A list of tensors as names."""
        return [self.values.tensor(value) for value in self.arguments[name]]

    def shape(self, name: str) -> Sequence[Any]:
        """The traced shape of a tensor; sizes that vary are symbols."""
        shape: Sequence[Any] = self.arguments[name].meta["val"].shape
        return shape

    @property
    def result(self) -> Any:
        """The traced result: its shape and type."""
        return self.node.meta["val"]


def _bind(node: Any) -> dict[str, Any]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return {f"arg{index}": value for index, value in enumerate(node.args)}
    bound = {}
    for index, argument in enumerate(node.target._schema.arguments):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        bound[argument.name] = given
    return bound


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _known_now(value: Any) -> bool:
    return not isinstance(value, str | Size | Weight)


def _write(builder: Builder, interface: Interface, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    initialisers = list(builder.small)
    with (folder / DATA).open("wb") as file:
        for name, weight in builder.weights.items():
            array = weight.array()
            if builder.storage == "float16" and array.dtype == np.float32:
                array = _narrowed(array, name)
            tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
            if array.nbytes <= INLINE:
                tensor.raw_data = array.tobytes()
            else:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                tensor.data_location = TensorProto.EXTERNAL
                place = {"location": DATA, "offset": file.tell(), "length": array.nbytes}
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))
                file.write(array.data)
            initialisers.append(tensor)
    inputs, outputs = ([_value_info(port) for port in ports] for ports in (interface.inputs, interface.outputs))
    graph = helper.make_graph(builder.nodes, interface.component, inputs, outputs, initialisers)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="anamorph"
    )
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def _narrowed(array: NDArray[Any], name: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise BackendError(f"weight {name} has values beyond float16's range; export with dtype fp32")
    return narrow


def _value_info(port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, TYPES[port.dtype], [_dimension(axis) for axis in port.axes])


def _dimension(axis: Dimension) -> int | str:
    if isinstance(axis, int):
        return axis
    if isinstance(axis, Scaled):
        return f"{axis.axis}*{axis.numerator}" if axis.denominator == 1 else f"{axis.axis}/{axis.denominator}"
    return fixed_size(axis) or axis.name


def fixed_size(axis: Axis) -> int | None:
    """The only size that an axis takes, or None where it takes several."""
    return axis.minimum if axis.minimum == axis.maximum else None
