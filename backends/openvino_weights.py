"""Giving an OpenVINO model its weights without copying them."""

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
