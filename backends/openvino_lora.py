"""OpenVINO models with adapters: inputs for factors beside the layers that take them, and weights that are changed.

As in ONNX graphs (see `onnx_lora`): y + (x down) up, or up down is added to the weight itself. The latter also for
convolutions of several taps, because OpenVINO has none with an open number of channels.
"""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from anamorph.artifact import Part
from anamorph.errors import BackendError
from anamorph.interface import Axis
from anamorph.linked import Linked
from anamorph.lora.factors import Change, Layers, added
from anamorph.lora.ports import DOWN, UP, factor_ports, layer_of
from anamorph.weights import Stored, as_stored, floats

THROUGH = ("Convert", "Transpose")
"""What may lie between a weight and the layer that uses it."""
PRODUCTS = ("MatMul", "Convolution")
NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


def put_inputs(model: Any, part: Part, adapted: Layers) -> None:
    """Let the model take the factors of those of the layers that it has; weights still have their names.

    Raises BackendError: a layer is used in a way that cannot be changed.
    """
    import openvino

    named = dict(_weights(model, part, adapted))
    inputs = {}
    for port in factor_ports({layer: adapted[layer] for layer in named}):
        sizes = [-1 if isinstance(axis, Axis) else axis for axis in port.axes]
        value = openvino.op.Parameter(openvino.Type.f32, openvino.PartialShape(sizes))
        value.output(0).set_names({port.name})
        value.set_friendly_name(port.name)
        inputs[port.name] = value
    for layer, weight in named.items():
        _adapt(weight, layer, inputs[layer + DOWN].output(0), inputs[layer + UP].output(0), adapted[layer])
    model.add_parameters(list(inputs.values()))
    model.validate_nodes_and_infer_types()


def _weights(model: Any, part: Part, layers: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Layer -> the node that is its weight, for those that the model has."""
    wanted = {name: layer_of(constant.tensor) for name, constant in part.constants.items()}
    for node in model.get_ops():
        layer = wanted.get(node.get_friendly_name())
        if layer is not None and layer in layers and node.get_type_name() in ("Parameter", "Constant"):
            yield layer, node


def _adapt(weight: Any, layer: str, down: Any, up: Any, shape: tuple[int, ...]) -> None:
    uses = list(_uses(weight.output(0)))
    if prod(shape[2:]) == 1 and all(_is_layer(port) for port in uses):
        for port in uses:
            _branch(port.get_node(), down, up)
    elif len(shape) > 2:
        _add_to(weight, down, up, shape)
    else:
        raise BackendError(f"the graph uses the weight of {layer} in a way that takes no factors; open the checkpoint")


def _uses(value: Any) -> Iterator[Any]:
    """The inputs of nodes that take a weight."""
    for port in value.get_target_inputs():
        node = port.get_node()
        if node.get_type_name() in THROUGH and port.get_index() == 0:
            yield from _uses(node.output(0))
        else:
            yield port


def _is_layer(port: Any) -> bool:
    """Whether a node multiplies or convolves by a weight, pixel by pixel in their order."""
    node = port.get_node()
    strides = node.get_attributes().get("strides", [])
    return node.get_type_name() in PRODUCTS and port.get_index() == 1 and all(step == 1 for step in strides)


def _branch(node: Any, down: Any, up: Any) -> None:
    from openvino import opset13

    x, end = node.input_value(0), _end(node)
    if node.get_type_name() == "MatMul":
        turned = bool(node.get_attributes()["transpose_a"])
        change = opset13.matmul(opset13.matmul(x, down, turned, False), up, False, False)
    else:  # a product for each pixel: up (down x) with x [B, in, h w]
        rows = opset13.constant(np.array([0, -1], np.int64))
        low, high = (opset13.reshape(one, rows, True) for one in (down, up))
        pixels = opset13.reshape(x, opset13.constant(np.array([0, 0, -1], np.int64)), True)
        product = opset13.matmul(high, opset13.matmul(low, pixels, False, False), False, False)
        change = opset13.reshape(product, opset13.shape_of(end.output(0)), False)
    readers = [port for port in end.output(0).get_target_inputs() if port.get_node().get_type_name() != "ShapeOf"]
    total = opset13.add(end.output(0), change)
    _pass_names(end.output(0), total.output(0))
    for reader in readers:
        reader.replace_source_output(total.output(0))


def _end(node: Any) -> Any:
    """The node that ends a layer: the addition of its bias, if it has one, or the product itself."""
    readers = list(node.output(0).get_target_inputs())
    if len(readers) != 1 or readers[0].get_node().get_type_name() != "Add":
        return node
    total = readers[0].get_node()
    other = total.input_value(1 - readers[0].get_index()).get_node()
    while other.get_type_name() in ("Convert", "Reshape", "Unsqueeze"):
        other = other.input_value(0).get_node()
    return total if other.get_type_name() in ("Constant", "Parameter") else node


def _pass_names(before: Any, after: Any) -> None:
    """The value that blocks end with, and outputs, keep their names."""
    names = before.get_names()
    before.set_names(set())
    after.set_names(names)


def _add_to(weight: Any, down: Any, up: Any, shape: tuple[int, ...]) -> None:
    """Add the product of the factors to a weight wherever it is used in float32."""
    from openvino import opset13

    value = weight.output(0)
    for port in value.get_target_inputs():
        if port.get_node().get_type_name() == "Convert":
            value = port.get_node().output(0)
    readers = list(value.get_target_inputs())
    rows = opset13.constant(np.array([0, -1], np.int64))
    low, high = (opset13.reshape(one, rows, True) for one in (down, up))
    product = opset13.matmul(high, low, False, False)
    change = opset13.reshape(product, opset13.constant(np.array(shape, np.int64)), False)
    total = opset13.add(value, change)
    for reader in readers:
        reader.replace_source_output(total.output(0))


def fused_weights(model: Any, path: Path, part: Part, fused: Change, linked: Mapping[str, Linked]) -> dict[str, Linked]:
    """The weights that fused adapters change, by the names of their nodes, in the types in which they are stored."""
    changed = {}
    for layer, node in _weights(model, part, fused):
        name = node.get_friendly_name()
        base = linked[name] if name in linked else _held(node)
        total = added(floats(Stored(base.values, base.dtype), path), fused[layer])
        changed[name] = Linked(np.ascontiguousarray(as_stored(total, base.dtype)), base.dtype)
    return changed


def _held(node: Any) -> Linked:
    kind = NAMES[node.get_element_type().to_string()]
    bits = node.data.view(np.uint16) if kind == "BF16" else node.data
    return Linked(bits.reshape(tuple(node.get_output_shape(0))), kind)
