"""Giving an OpenVINO model its weights without copying them, and without widening them."""

from collections.abc import Mapping
from typing import Any

from anamorph.linked import Linked

WEIGHTLESS = "WeightlessCacheAttribute_0"
"""Under which OpenVINO keeps with a constant where in a file its bytes lie."""
PRECISIONS = {"F32": "FP32", "F16": "FP16", "BF16": "BF16"}
TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def put_weights(model: Any, weights: Mapping[str, Linked]) -> None:
    """Replace the parameters that stand for weights by constants on the same memory, which must outlive the model."""
    _replace(model, {name: _constant(weight) for name, weight in weights.items()})


def _constant(weight: Linked) -> Any:
    import openvino

    kind = getattr(openvino.Type, TYPES[weight.dtype])
    tensor = openvino.Tensor(weight.values, list(weight.values.shape), kind)
    return openvino.op.Constant(tensor, shared_memory=True)


def put_mapped_weights(model: Any, weights: Mapping[str, Linked], core: Any) -> None:
    """The same with weights that are mapped from one file; the constants stay known as parts of it.

    A compiled model that is stored leaves such constants in their file. Only OpenVINO's reader of graphs makes them.
    """
    import openvino

    places = [weight.place for weight in weights.values() if weight.place is not None]
    layers, edges = [], []
    for number, (weight, place) in enumerate(zip(weights.values(), places, strict=True)):
        shape, port = ",".join(map(str, weight.values.shape)), _port(weight)
        layers.append(
            f'<layer id="{2 * number}" name="{number}" type="Const" version="opset1"><data element_type='
            f'"{TYPES[weight.dtype]}" shape="{shape}" offset="{place.begin}" size="{weight.values.nbytes}"/>'
            f'<output>{port}</output></layer><layer id="{2 * number + 1}" name="to {number}" type="Result" '
            f'version="opset1"><input>{port}</input></layer>'
        )
        edges.append(f'<edge from-layer="{2 * number}" from-port="0" to-layer="{2 * number + 1}" to-port="0"/>')
    text = f'<net name="weights" version="11"><layers>{"".join(layers)}</layers><edges>{"".join(edges)}</edges></net>'
    whole = places[0].whole
    holder = core.read_model(text.encode(), openvino.Tensor(whole, [whole.size], openvino.Type.u8))
    made = {node.get_friendly_name(): node for node in holder.get_ops() if node.get_type_name() == "Constant"}
    _replace(model, {name: made[str(number)] for number, name in enumerate(weights)})


def _port(weight: Linked) -> str:
    sizes = "".join(f"<dim>{size}</dim>" for size in weight.values.shape)
    return f'<port id="0" precision="{PRECISIONS[weight.dtype]}">{sizes}</port>'


def forget_files(model: Any) -> None:
    """Let a compiled model that is stored take all constants along that the model has by now."""
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and WEIGHTLESS in (info := node.get_rt_info()):
            del info[WEIGHTLESS]


def exchange_weights(model: Any, weights: Mapping[str, Linked]) -> None:
    """Replace constants by others of the same names."""
    for node in [node for node in model.get_ops() if node.get_friendly_name() in weights]:
        other = _constant(weights[node.get_friendly_name()])
        other.set_friendly_name(node.get_friendly_name())
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(other.output(0))
    model.validate_nodes_and_infer_types()


def _replace(model: Any, constants: Mapping[str, Any]) -> None:
    """Put constants in the place of inputs; where these are of a wider type, readers get it by a conversion."""
    from openvino import opset13

    for port in [port for port in model.inputs if port.names & set(constants)]:
        constant = constants[port.any_name]
        constant.set_friendly_name(port.any_name)  # by which adapters find it
        readers, given = port.get_target_inputs(), constant.output(0)
        wide = given if given.get_element_type() == port.get_element_type() else None
        for reader in readers:
            if reader.get_node().get_type_name() == "Convert":
                reader.replace_source_output(given)
                continue
            wide = wide or opset13.convert(constant, port.get_element_type()).output(0)
            reader.replace_source_output(wide)
        model.remove_parameter(port.get_node())
    model.validate_nodes_and_infer_types()
