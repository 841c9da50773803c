"""int8 for ONNX Runtime, by its static quantisation: ranges are measured once, quantisers put before chosen layers."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from anamorph.artifact import Artifact
from anamorph.backends.onnx_models import value_of
from anamorph.exporters.calibration import OUTPUT, Sample
from anamorph.exporters.onnx_tensors import DATA, MODEL
from anamorph.exporters.quantization import Layers, grouped
from anamorph.exporters.storing import INLINE

PRODUCTS = ("Conv", "MatMul", "Gemm")
RANGES = "ranges.json"


class OnnxLayers(Layers):
    """A model whose weights stand before its layers; `place` holds it and is removed with this object."""

    def __init__(self, place: "tempfile.TemporaryDirectory[str]", nodes: Mapping[str, str], samples: Sequence[Sample]):
        self.place, self.samples = place, samples
        self.nodes = {layer: node for node, layer in nodes.items()}
        self.groups = grouped(self.nodes)

    def run(self, quantized: Iterable[str], samples: Sequence[Sample]) -> list[NDArray[Any]]:
        import onnxruntime

        with tempfile.TemporaryDirectory(dir=self.place.name) as folder:
            path = self._written(quantized, Path(folder))
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            return [np.asarray(session.run([OUTPUT], dict(sample.inputs))[0]) for sample in samples]

    def write(self, quantized: Iterable[str], folder: Path) -> str:
        return self._written(quantized, folder).name

    def _written(self, quantized: Iterable[str], folder: Path) -> Path:
        from onnxruntime import quantization as ort

        source = Path(self.place.name)
        nodes = [self.nodes[layer] for group in quantized for layer in self.groups[group]]
        if not nodes:  # an empty list would mean all
            model = onnx.load(source / MODEL)
            onnx.save(model, folder / MODEL, save_as_external_data=True, location=DATA, size_threshold=INLINE)
            return folder / MODEL
        ort.quantize_static(
            source / MODEL,
            folder / MODEL,
            Calls(self.samples),
            quant_format=ort.QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            nodes_to_quantize=nodes,
            use_external_data_format=True,
            calibration_cache_path=source / RANGES,
            extra_options={"QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}},
        )
        return folder / MODEL


class Calls:
    """Samples, one after another, as ONNX Runtime's calibration reads them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.left: Iterator[Sample] = iter(samples)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """The inputs of the next call, None after the last."""
        sample = next(self.left, None)
        return None if sample is None else dict(sample.inputs)


def opened(artifact: Artifact, part: str, samples: Sequence[Sample]) -> OnnxLayers:
    """The part of a written folder, with everything that follows from weights alone computed."""
    import onnxruntime

    path, weights = artifact.open_part(part), artifact.open_weights(part)
    place = tempfile.TemporaryDirectory(prefix="anamorph-")
    options = onnxruntime.SessionOptions()
    options.add_external_initializers(list(weights), [value_of(weight) for weight in weights.values()])
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(Path(place.name) / MODEL)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", DATA)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", str(INLINE))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    origins = _origins(onnx.load(path, load_external_data=False).graph)
    model = onnx.load(Path(place.name) / MODEL, load_external_data=False)
    return OnnxLayers(place, _layers(model.graph, origins), samples)


def _origins(graph: Any) -> dict[str, str]:
    """Value of the graph -> the first weight from which alone it follows."""
    found = {tensor.name: tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.input and all(name in found for name in node.input if name):
            named = [found[name] for name in node.input if name and "." in found[name]]
            found |= dict.fromkeys(node.output, (named or [found[node.input[0]]])[0])
    return found


def _layers(graph: Any, origins: Mapping[str, str]) -> dict[str, str]:
    """Name of each product with a weight -> its layer."""
    found: dict[str, str] = {}
    for node in graph.node:
        weight = origins.get(node.input[1]) if node.op_type in PRODUCTS else None
        if weight is not None:
            layer = weight.removesuffix(".transposed").rsplit(".", 1)[0]
            found[node.name] = layer if layer not in found.values() else f"{layer}.{len(found)}"
    return found
