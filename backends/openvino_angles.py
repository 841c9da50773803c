"""Sines and cosines of timesteps in float32, where the rest of a graph runs in bfloat16.

OpenVINO rounds every value between two operations: a timestep of 999 becomes 1000, and an angle of 999 is off by more
than a radian. What leads to the angles is therefore compiled on its own; it costs microseconds.
"""

from collections.abc import Iterator
from typing import Any

HEAVY = frozenset({"Convolution", "MatMul", "GroupConvolution", "ScaledDotProductAttention"})
"""Operations that do not lead to the angle of an input."""


def cut_angles(model: Any) -> Any | None:
    """Replace sines and cosines of inputs by new inputs, and return what computes these, or None if there are none.

    The returned model's outputs have the names of the new inputs. Inputs that only led to angles leave the model.
    """
    import openvino

    waves = [node for node in model.get_ordered_ops() if node.get_type_name() in ("Sin", "Cos") and _is_angle(node)]
    if not waves:
        return None
    led = {name for wave in waves for node in _ancestors(wave) for name in _names(node)}
    sources = [port.get_node() for port in model.inputs if port.names & led]
    for number, wave in enumerate(waves):
        value = openvino.op.Parameter(openvino.Type.f32, wave.output(0).get_partial_shape())
        value.output(0).set_names({f"angle_{number}"})
        for reader in wave.output(0).get_target_inputs():
            reader.replace_source_output(value.output(0))
        wave.output(0).set_names({f"angle_{number}"})
        model.add_parameters([value])
    angles = openvino.Model([wave.output(0) for wave in waves], sources, "angles")
    needed = {name for node in model.get_ordered_ops() for each in _inputs(node) for name in _names(each)}
    for source in sources:
        if not set(_names(source)) & needed:
            model.remove_parameter(source)
    model.validate_nodes_and_infer_types()
    return angles


def _is_angle(node: Any) -> bool:
    kinds = {each.get_type_name() for each in _ancestors(node)}
    return "Parameter" in kinds and not kinds & HEAVY


def _ancestors(node: Any) -> Iterator[Any]:
    for each in _inputs(node):
        yield each
        yield from _ancestors(each)


def _inputs(node: Any) -> list[Any]:
    return [port.get_source_output().get_node() for port in node.inputs()]


def _names(node: Any) -> list[str]:
    return sorted(node.output(0).get_names()) if node.get_type_name() == "Parameter" else []
