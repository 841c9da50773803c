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
from onnx import TensorProto, helper, numpy_helper

from anamorph.errors import BackendError
from anamorph.exporters import operators_layers, operators_shapes  # noqa: F401 - they enter their rules
from anamorph.exporters.nodes import bound_arguments, leaves
from anamorph.exporters.onnx_tensors import DATA, MODEL, TYPES, linked_tensor, stored_tensor, type_of
from anamorph.exporters.operators import ONNX_RUNTIME, OPERATORS, Size
from anamorph.exporters.storing import INLINE, Origin, Storing, Weight, Written
from anamorph.exporters.taps import block_outputs
from anamorph.interface import Axis, Dimension, Interface, Port, Scaled
from anamorph.linked import AS_STORED, TRANSPOSED, Constant

VERSIONS, IR_VERSION = {"": 18, ONNX_RUNTIME: 1}, 10
"""Domain of operations -> its version; that of files."""


@dataclass
class Builder:
    """Collects the nodes and constants of one graph."""

    storing: Storing = field(default_factory=Storing)
    for_converter: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)
    small: list[TensorProto] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    uses: dict[tuple[str, bool], str] = field(default_factory=dict)

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
        key = (weight.name, weight.transposed)
        if key not in self.uses:
            apart = self.as_input(weight) or self.storing.link(weight) is not None
            self.uses[key] = self._apart(weight) if apart else self._own(weight)
        return self.uses[key]

    def as_input(self, weight: Weight) -> bool:
        """Whether the graph takes the weight as an input."""
        return self.for_converter and weight.value.nbytes > INLINE and weight.value.is_floating_point()

    def _own(self, weight: Weight) -> str:
        name = f"{weight.name}.transposed" if weight.transposed else weight.name
        self.weights[name] = weight
        narrow = self.storing.dtype != "float32" and weight.value.is_floating_point()
        return self.op("Cast", name, to=TensorProto.FLOAT) if narrow else name

    def _apart(self, weight: Weight) -> str:
        """A tensor as the checkpoint holds it; the graph casts and transposes."""
        self.weights[weight.name] = Weight(weight.name, weight.value)
        narrow = type_of(self.storing, weight) != TensorProto.FLOAT
        value = self.op("Cast", weight.name, to=TensorProto.FLOAT) if narrow else weight.name
        return self.op("Transpose", value, perm=[1, 0]) if weight.transposed else value

    def provenance(self) -> dict[str, Constant]:
        """Where each weight of the graph comes from."""
        found = {}
        for name, weight in self.weights.items():
            origin = self.storing.origins.get(weight.name, Origin(weight.name))
            transform = TRANSPOSED if weight.transposed else AS_STORED
            linked = self.storing.link(weight) is not None
            found[name] = Constant(origin.tensor, tuple(weight.value.shape), transform, linked)
        return found


def emit(
    program: torch.export.ExportedProgram,
    interface: Interface,
    folder: Path,
    storing: Storing,
    for_converter: bool = False,
) -> Written:
    """Write `model.onnx` and, for weights that are not linked, `model.onnx_data` into `folder`.

    `interface` names the inputs and outputs in the order of the program's. The graph computes in float32. Linked
    weights are external data in the checkpoint's files. Converters that would fold weights get all large ones as
    further inputs, in the order of the checkpoint and in the type of `storing`, and put them back themselves;
    for them, nothing is written as ONNX Runtime in particular likes it.
    Raises BackendError: the graph holds an operation that has no entry in the table, or a weight does not fit its type.
    """
    builder = Builder(storing, for_converter)
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
    taps = dict(values.taps({port.name for port in interface.inputs}))
    return Written(MODEL, {path: outputs.get(name, name) for path, name in taps.items()}, builder.provenance())


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

    def size(self, node: Any, dimension: int) -> Size:
        """A size of a tensor."""
        return Size(self.builder.op("Shape", self.tensor(node), start=dimension, end=dimension + 1))

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
        if all(_known_now(value) for value in leaves(arguments)):
            self[node] = node.target(*arguments[0], **arguments[1])
            return
        name = str(node.target)
        if name not in OPERATORS:
            raise BackendError(f"the exporter has no rule for the operation {name}; add one to exporters/operators.py")
        self[node] = OPERATORS[name](Call(self, node, bound_arguments(node)))


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


def _ratio(size: Any, other: Any) -> tuple[int, int] | None:
    """Numerator and denominator of size / other, where both are symbolic and one is a fixed share of the other."""
    if isinstance(size, int) or isinstance(other, int):
        return None
    share = size.node.expr / other.node.expr
    return (int(share.p), int(share.q)) if share.is_Rational else None


def _known_now(value: Any) -> bool:
    return not isinstance(value, str | Size | Weight)


def _write(builder: Builder, interface: Interface, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    initialisers, further = list(builder.small), []
    with (folder / DATA).open("wb") as file:
        for name, weight in builder.weights.items():
            if builder.as_input(weight):
                shape = list(weight.value.shape)
                further.append(helper.make_tensor_value_info(name, type_of(builder.storing, weight), shape))
            elif builder.storing.link(weight) is None:
                initialisers.append(stored_tensor(name, weight.stored(builder.storing.dtype), file))
            else:
                initialisers.append(linked_tensor(name, weight, builder.storing.origins[weight.name]))
    if not (folder / DATA).stat().st_size:
        (folder / DATA).unlink()
    inputs, outputs = ([_value_info(port) for port in ports] for ports in (interface.inputs, interface.outputs))
    graph = helper.make_graph(builder.nodes, interface.component, [*inputs, *further], outputs, initialisers)
    used = {node.domain for node in builder.nodes}
    opsets = [helper.make_opsetid(domain, VERSIONS[domain]) for domain in sorted(used | {""})]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="anamorph")
    (folder / MODEL).write_bytes(model.SerializeToString())


def _value_info(port: Port) -> onnx.ValueInfoProto:
    kind = TYPES[getattr(torch, port.dtype)]
    # A missing optional input has other sizes than the rest: its dimensions must not count as the same.
    prefix = f"{port.name}." if port.optional else ""
    dimensions = [_dimension(axis) for axis in port.axes]
    shape = [prefix + size if isinstance(size, str) else size for size in dimensions]
    return helper.make_tensor_value_info(port.name, kind, shape)


def _dimension(axis: Dimension) -> int | str:
    if isinstance(axis, int):
        return axis
    if isinstance(axis, Scaled):
        return f"{axis.axis}*{axis.numerator}" if axis.denominator == 1 else f"{axis.axis}/{axis.denominator}"
    return fixed_size(axis) or axis.name


def fixed_size(axis: Axis) -> int | None:
    """The only size that an axis takes, or None where it takes several."""
    return axis.minimum if axis.minimum == axis.maximum else None
