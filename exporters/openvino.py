"""OpenVINO IR in the folders that optimum-intel and openvino-genai read, made from the ONNX graph."""

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anamorph.bert_tokenizer import BertTokenizer
from anamorph.errors import OutputError
from anamorph.exporters import openvino_tokenizer
from anamorph.exporters.folder import FolderExporter
from anamorph.exporters.formats import Format, for_all_sizes
from anamorph.exporting import LINKED, STORAGE, Exporter
from anamorph.interface import Interface
from anamorph.pipelines.slots import Tokenizer
from anamorph.plugins import hookimpl

if TYPE_CHECKING:
    import torch

    from anamorph.exporters.storing import Storing, Written

NAME = "openvino_model.xml"


def write(program: "torch.export.ExportedProgram", interface: Interface, folder: Path, storing: "Storing") -> "Written":
    """Write `openvino_model.xml` and `.bin`; linked weights are parameters of the model, to be replaced on opening."""
    import openvino
    from openvino._offline_transformations import apply_moc_transformations

    from anamorph.backends.openvino_weights import put_weights
    from anamorph.exporters.emit import emit
    from anamorph.exporters.storing import Weight

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        written = emit(program, interface, Path(draft), storing, for_converter=True)
        # Not convert_model: it tells its makers of every conversion, and waits a second for the answer.
        model = openvino.Core().read_model(Path(draft) / written.file)
        apply_moc_transformations(model, cf=False, smart_reshape=True)  # as convert_model does
        model = _with_whole_timestep(model)
    _keep_names(model, interface)
    asked = [port.any_name for port in model.inputs if port.any_name in written.constants]
    own = [name for name in asked if not written.constants[name].linked]
    weights = {name: storing.values(Weight(name, program.state_dict[f"model.{name}"])) for name in own}
    put_weights(model, weights)
    try:
        # Left to itself, OpenVINO halves the weights' precision here.
        openvino.save_model(model, folder / NAME, compress_to_fp16=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise OutputError(f"OpenVINO cannot write {folder / NAME} ({reason}); free the disk") from None
    return replace(written, file=NAME, taps=_kept(written.taps, folder / NAME))


def _kept(taps: Mapping[str, str], file: Path) -> dict[str, str]:
    """The tap points whose names OpenVINO has kept: its own rewriting of the graph may drop a value."""
    import openvino

    model = openvino.Core().read_model(file)
    names = {name for node in model.get_ops() for port in node.outputs() for name in port.names}
    return {block: name for block, name in taps.items() if name in names}


def _with_whole_timestep(model: Any) -> Any:
    """Declare the timestep as int64, which is what openvino-genai feeds; our engine takes the conversion out again."""
    import openvino

    if not any("timestep" in port.names for port in model.inputs):
        return model
    steps = openvino.preprocess.PrePostProcessor(model)
    steps.input("timestep").tensor().set_element_type(openvino.Type.i64)
    return steps.build()


def _keep_names(model: Any, interface: Interface) -> None:
    """Take away the names that inputs and outputs inherit from nodes beside them: loaders may meet those first."""
    for port in interface.inputs:
        model.input(port.name).get_tensor().set_names({port.name})
    for port in interface.outputs:
        model.output(port.name).get_tensor().set_names({port.name})


def unavailable() -> str | None:
    """None, or what is missing."""
    missing = [name for name in ("torch", "onnx", "openvino") if not importlib.util.find_spec(name)]
    return (
        f"{' and '.join(missing)} not installed; run: pip install 'anamorph[torch,onnx,openvino]'" if missing else None
    )


def root_files(storage: str) -> Mapping[str, str]:
    """The file by which optimum-intel knows its folders."""
    values = {
        "dtype": {"float16": "fp16", "bfloat16": "bf16"}.get(storage, "fp32"),
        "quantization_config": None,
        "save_onnx_model": False,
    }
    return {"openvino_config.json": json.dumps(values, indent=2) + "\n"}


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> str | None:
    """Write the tokenizer as a graph for openvino-genai; None, or why it is missing."""
    if isinstance(tokenizer, BertTokenizer):
        return "left out the tokenizer's graph, which openvino-genai needs for CLIP's alone"
    if (missing := openvino_tokenizer.unavailable()) is not None:
        return f"left out the tokenizer's graph, which openvino-genai needs: {missing}"
    openvino_tokenizer.write(tokenizer, folder)
    return None


@hookimpl
def anamorph_exporters() -> list[Exporter]:
    packages = ("torch", "onnx", "openvino")
    writing = for_all_sizes(write, (1,))
    kind = Format("openvino", packages, writing, unavailable, (LINKED, *STORAGE), root_files, write_tokenizer)
    return [FolderExporter(kind)]
