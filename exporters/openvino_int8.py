"""int8 for OpenVINO, by NNCF's post-training quantisation (quantised once; groups are switched off in its result)."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.artifact import Artifact
from anamorph.backends.openvino_devices import core
from anamorph.backends.openvino_models import SCALAR
from anamorph.backends.openvino_weights import put_weights
from anamorph.exporters.calibration import OUTPUT, Sample
from anamorph.exporters.openvino import NAME
from anamorph.exporters.quantization import Layers, group_of, grouped
from anamorph.linked import Linked

PRODUCTS = frozenset({"Convolution", "MatMul"})
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
MOVES = frozenset({"Transpose", "Reshape", "Concat", "Split", "VariadicSplit", "Unsqueeze", "Squeeze", "Interpolate"})


class OpenVinoLayers(Layers):
    """A model with quantisers before every layer; those of no chosen group are taken out."""

    def __init__(self, model: Any, layers: Iterable[str], weights: Mapping[str, Linked]) -> None:
        self.model, self.groups = model, grouped(layers)
        self.weights = weights  # read where they are mapped

    def run(self, quantized: Iterable[str], samples: Sequence[Sample]) -> list[NDArray[Any]]:
        request = core().compile_model(self._with(quantized), "CPU", EXACT).create_infer_request()
        outputs = []
        for sample in samples:
            request.infer(_fed(sample))
            outputs.append(np.array(request.get_tensor(OUTPUT).data))
        return outputs

    def write(self, quantized: Iterable[str], folder: Path) -> str:
        import openvino
        from openvino._offline_transformations import compress_quantize_weights_transformation

        model = self._with(quantized)
        compress_quantize_weights_transformation(model)
        openvino.save_model(model, folder / NAME, compress_to_fp16=False)
        return NAME

    def _with(self, quantized: Iterable[str]) -> Any:
        chosen = frozenset(quantized)
        model = self.model.clone()
        for node in model.get_ordered_ops():
            if (
                node.get_type_name() == "FakeQuantize"
                and not {group_of(name) for name in _readers(node.output(0))} & chosen
            ):
                for reader in node.output(0).get_target_inputs():
                    reader.replace_source_output(node.input_value(0))
        model.validate_nodes_and_infer_types()
        return model


def opened(artifact: Artifact, part: str, samples: Sequence[Sample]) -> OpenVinoLayers:
    """The part of a written folder, quantised with ranges from these samples."""
    os.environ["NNCF_CI"] = "1"  # else it tells its makers
    import nncf
    from openvino.passes import ConstantFolding, Manager

    model = core().read_model(artifact.open_part(part))
    layers = _name_layers(model, artifact.parts[part].constants)
    weights = artifact.open_weights(part)
    put_weights(model, weights)
    _widen(model)
    folding = Manager()
    folding.register_pass(ConstantFolding())  # weights that follow from others become constants
    folding.run_passes(model)
    quantized = nncf.quantize(
        model,
        nncf.Dataset([_fed(sample) for sample in samples]),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER,
        # The processor's fused attention takes no whole numbers.
        ignored_scope=nncf.IgnoredScope(types=["ScaledDotProductAttention"], validate=False),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            disable_bias_correction=True, backend_params={"compress_weights": False}
        ),
    )
    return OpenVinoLayers(quantized, layers, weights)


def _fed(sample: Sample) -> dict[str, NDArray[Any]]:
    return {name: value.reshape(value.shape or SCALAR) for name, value in sample.inputs.items()}


def _name_layers(model: Any, weights: Iterable[str]) -> list[str]:
    """Call each product by the path of its layer, and the second one of a layer by a number more; returns the names."""
    known = frozenset(weights)
    found: list[str] = []
    for node in model.get_ordered_ops():
        if node.get_type_name() in PRODUCTS and (weight := _weight(node.input_value(1).get_node(), known)) is not None:
            layer = weight.rsplit(".", 1)[0]
            node.set_friendly_name(layer if layer not in found else f"{layer}.{len(found)}")
            found.append(node.get_friendly_name())
    return found


def _weight(node: Any, known: frozenset[str]) -> str | None:
    """The weight that a value follows from, or None where it follows from what the model is given, too."""
    waiting = [node]
    seen: set[str] = set()
    found: set[str] = set()
    while waiting:
        node = waiting.pop()
        named = known & {*node.output(0).get_names(), node.get_friendly_name()}
        if node.get_type_name() == "Parameter" and not named:
            return None
        found |= named
        above = [] if named else [value.get_node() for value in node.input_values()]
        waiting += [each for each in above if each.get_name() not in seen]
        seen |= {each.get_name() for each in above}
    return min(found, default=None)


def _widen(model: Any) -> None:
    """Constants that the graph converts to float32, in float32: quantisers find them then."""
    import openvino

    for node in model.get_ordered_ops():
        source = node.input_value(0).get_node() if node.get_type_name() == "Convert" else None
        if source is not None and source.get_type_name() == "Constant" and source.get_element_type().is_real():
            wide = openvino.op.Constant(source.get_data(dtype=np.float32))
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(wide.output(0))
    model.validate_nodes_and_infer_types()


def _readers(value: Any) -> Iterator[str]:
    """The layers that read a value, perhaps behind operations that only move numbers."""
    for port in value.get_target_inputs():
        node = port.get_node()
        if node.get_type_name() in PRODUCTS:
            yield node.get_friendly_name()
        elif node.get_type_name() in MOVES:
            for output in node.outputs():
                yield from _readers(output)
