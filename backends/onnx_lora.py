"""ONNX graphs with adapters: inputs for factors beside the layers that take them, and weights that are changed.

Layers are found by the record of where the graph's constants come from. A layer that is a product or a convolution gets
a branch beside it, y + (x down) up; where a graph uses a weight otherwise, up down is added to the weight itself.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.artifact import Part
from anamorph.backends.numpy_program import imported
from anamorph.errors import BackendError
from anamorph.interface import Axis, Port
from anamorph.linked import TRANSPOSED, Linked
from anamorph.lora.factors import Change, Layers, added
from anamorph.lora.ports import DOWN, UP, factor_ports, layer_of, layers_of
from anamorph.weights import NUMPY, Stored, as_stored, floats

TYPES = {1: "F32", 10: "F16", 16: "BF16"}
"""ONNX's number of a type (onnx.proto, TensorProto.DataType) -> its name in safetensors."""
FLOAT = 1
THROUGH = ("Cast", "Transpose")
"""What may lie between a weight and the layer that uses it."""


def with_inputs(path: Path, part: Part, adapted: Layers) -> bytes:
    """The graph with inputs for the factors of those of the layers that it has.

    Raises BackendError: one of them is not in the graph, or is used in a way that cannot be changed.
    """
    onnx = imported("onnx", "onnx")
    model = onnx.load(path, load_external_data=False)
    here = layers_of(part)
    taken = {layer: shape for layer, shape in adapted.items() if layer in here}
    graph = _Graph(model.graph, onnx.helper)
    for name, constant in part.constants.items():
        layer = layer_of(constant.tensor)
        if layer in taken:
            graph.adapt(name, layer, taken[layer])
    graph.write()
    model.graph.input.extend(_value_info(onnx.helper, port) for port in factor_ports(taken))
    serialised: bytes = model.SerializeToString()
    return serialised


def _value_info(helper: Any, port: Port) -> Any:
    return helper.make_tensor_value_info(
        port.name, FLOAT, [axis.name if isinstance(axis, Axis) else axis for axis in port.axes]
    )


class _Graph:
    """A graph whose nodes are changed one layer after another; new ones stand before or behind those of before."""

    def __init__(self, graph: Any, helper: Any) -> None:
        self.graph, self.helper = graph, helper
        self.constants = {tensor.name for tensor in graph.initializer}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.behind: dict[str, list[Any]] = {}
        """Output of a node, or "" for the beginning -> the nodes that follow it."""

    def write(self) -> None:
        """Put the nodes into the graph."""
        nodes = list(self.behind.pop("", ()))
        for node in self.graph.node:
            nodes.append(node)
            for output in list(node.output):
                nodes += self.behind.pop(output, ())
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def adapt(self, weight: str, layer: str, shape: tuple[int, ...]) -> None:
        """Let a layer take factors."""
        uses = list(self._uses(weight))
        if not uses:
            raise BackendError(f"the graph does not use the weight of {layer}; export the checkpoint again")
        if all(_is_layer(node, value) for node, value in uses):
            for number, (node, _) in enumerate(uses):
                self._branch(node, layer, f"{layer}.{number}")
        elif len(shape) > 2:
            self._add_to(weight, layer, shape)
        else:
            raise BackendError(f"the graph uses the weight of {layer} in {uses[0][0].op_type}, which takes no factors")

    def _uses(self, value: str) -> Iterator[tuple[Any, str]]:
        """The nodes that use a weight, and under which name."""
        for node in self.readers.get(value, ()):
            if node.op_type in THROUGH:
                yield from self._uses(node.output[0])
            else:
                yield node, value

    def _branch(self, node: Any, layer: str, name: str) -> None:
        x, end = node.input[0], self._end(node)
        y, plain = end.output[0], f"{name}.lora_plain"
        end.output[0] = plain
        if node.op_type == "MatMul":
            low = self.helper.make_node("MatMul", [x, layer + DOWN], [f"{name}.lora_low"])
            high = self.helper.make_node("MatMul", [low.output[0], layer + UP], [f"{name}.lora_high"])
        else:
            low = self.helper.make_node("Conv", [x, layer + DOWN], [f"{name}.lora_low"])
            low.attribute.extend(node.attribute)
            high = self.helper.make_node("Conv", [low.output[0], layer + UP], [f"{name}.lora_high"])
        total = self.helper.make_node("Add", [plain, high.output[0]], [y])
        self.behind[plain] = [low, high, total]

    def _end(self, node: Any) -> Any:
        """The node that ends a layer: the addition of its bias, if it has one, or the product itself."""
        readers = self.readers.get(node.output[0], ())
        if len(readers) == 1 and readers[0].op_type == "Add" and set(readers[0].input) & self.constants:
            return readers[0]
        return node

    def _add_to(self, weight: str, layer: str, shape: tuple[int, ...]) -> None:
        """Add the product of the factors to the weight wherever it is used in float32."""
        value = weight
        for node in self.readers[weight]:
            if node.op_type == "Cast":
                value = node.output[0]
        rows, full = f"{layer}.lora_rows", f"{layer}.lora_shape"
        for name, sizes in {rows: [0, -1], full: list(shape)}.items():
            self.graph.initializer.append(self.helper.make_tensor(name, 7, [len(sizes)], sizes))
        make, total = self.helper.make_node, f"{layer}.lora_weight"
        readers = self.readers[value]
        nodes = [
            make("Reshape", [layer + DOWN, rows], [f"{layer}.lora_low"]),
            make("Reshape", [layer + UP, rows], [f"{layer}.lora_high"]),
            make("MatMul", [f"{layer}.lora_high", f"{layer}.lora_low"], [f"{layer}.lora_product"]),
            make("Reshape", [f"{layer}.lora_product", full], [f"{layer}.lora_change"]),
            make("Add", [value, f"{layer}.lora_change"], [total]),
        ]
        for node in readers:
            node.input[:] = [total if name == value else name for name in node.input]
        place = "" if value in self.constants else value
        self.behind.setdefault(place, []).extend(nodes)


def _is_layer(node: Any, weight: str) -> bool:
    """Whether a node multiplies or convolves by a weight."""
    plain = all(attribute.name != "group" or attribute.i == 1 for attribute in node.attribute)
    return node.op_type in ("MatMul", "Conv") and node.input[1] == weight and plain


def fused_weights(path: Path, part: Part, fused: Change, linked: Mapping[str, Linked]) -> dict[str, Linked]:
    """The weights that fused adapters change, by the names and in the types and orders of the graph."""
    tensors = {
        tensor.name: tensor
        for tensor in imported("onnx", "onnx").load(path, load_external_data=False).graph.initializer
    }
    changed = {}
    for name, constant in part.constants.items():
        layer = layer_of(constant.tensor)
        if layer is None or layer not in fused:
            continue
        base = linked[name] if name in linked else _stored(tensors[name], path.parent)
        turned = constant.transform == TRANSPOSED and name not in linked
        values = floats(Stored(base.values, base.dtype), path)
        total = added(values.T if turned else values, fused[layer])
        changed[name] = Linked(np.ascontiguousarray(as_stored(total.T if turned else total, base.dtype)), base.dtype)
    return changed


def _stored(tensor: Any, folder: Path) -> Linked:
    """A weight as the model file holds it, in itself or beside it."""
    kind = TYPES[tensor.data_type]
    where = {entry.key: entry.value for entry in tensor.external_data}
    values: NDArray[Any]
    if where:
        values = np.memmap(folder / where["location"], np.uint8, "r", int(where["offset"]), (int(where["length"]),))
    else:
        values = np.frombuffer(tensor.raw_data, np.uint8)
    return Linked(values.view(NUMPY[kind]).reshape(tuple(tensor.dims)), kind)
