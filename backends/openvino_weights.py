"""Giving an OpenVINO model its weights without copying them, and without widening them."""

from collections.abc import Mapping
from typing import Any

from anamorph.linked import Linked


def put_weights(model: Any, weights: Mapping[str, Linked]) -> None:
    """Replace the parameters that stand for weights by constants on the same memory, which must outlive the model."""
    import openvino

    kinds = {"F32": openvino.Type.f32, "F16": openvino.Type.f16, "BF16": openvino.Type.bf16}
    for port in [port for port in model.inputs if port.names & set(weights)]:
        weight = weights[port.any_name]
        tensor = openvino.Tensor(weight.values, list(weight.values.shape), kinds[weight.dtype])
        constant = openvino.op.Constant(tensor, shared_memory=True)
        for reader in port.get_target_inputs():
            reader.replace_source_output(constant.output(0))
        model.remove_parameter(port.get_node())
    model.validate_nodes_and_infer_types()


def multiply_narrow(model: Any) -> None:
    """Multiply by matrices that are stored in bfloat16 as they are, for a model that runs in bfloat16.

    A graph widens them to float32, because that is the type of its values. OpenVINO would do so when it compiles, keep
    the result, and round it again: four more bytes for every weight.
    """
    from openvino import Type, opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or (narrow := _narrow(node.input_value(1))) is None:
            continue
        turned = node.get_attributes()
        x = opset13.convert(node.input_value(0), Type.bf16)
        product = opset13.matmul(x, narrow, turned["transpose_a"], turned["transpose_b"])
        product.set_friendly_name(node.get_friendly_name())
        wide = opset13.convert(product, node.get_output_element_type(0))
        wide.output(0).set_names(node.output(0).get_names())
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(wide.output(0))
    model.validate_nodes_and_infer_types()


def _narrow(value: Any) -> Any | None:
    """The bfloat16 constant that a conversion to float32 widens, or None where the value is something else."""
    import openvino

    node = value.get_node()
    if node.get_type_name() != "Convert":
        return None
    source = node.input_value(0)
    constant = source.get_node().get_type_name() == "Constant"
    return source if constant and source.get_element_type() == openvino.Type.bf16 else None
