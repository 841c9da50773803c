"""OpenVINO IR in the folders that optimum-intel and openvino-genai read, made from the ONNX graph."""

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anamorph.errors import OutputError
from anamorph.exporters import openvino_tokenizer
from anamorph.exporters.folder import FolderExporter, Format
from anamorph.exporting import Exporter
from anamorph.interface import Interface
from anamorph.plugins import hookimpl
from anamorph.tokenizer import ClipTokenizer

if TYPE_CHECKING:
    import torch

NAME = "openvino_model.xml"


def write(
    program: "torch.export.ExportedProgram", interface: Interface, folder: Path, storage: str
) -> tuple[str, Mapping[str, str]]:
    """Write `openvino_model.xml` and `.bin`; returns the name of the file to open, and its tap points."""
    import openvino

    from anamorph.exporters.emit import emit

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        taps = emit(program, interface, Path(draft))
        model = _with_whole_timestep(openvino.convert_model(Path(draft) / "model.onnx"))
        _keep_names(model, interface)
        try:
            # Left to itself, OpenVINO halves the weights' precision here.
            openvino.save_model(model, folder / NAME, compress_to_fp16=storage == "float16")
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise OutputError(f"OpenVINO cannot write {folder / NAME} ({reason}); free the disk") from None
        del model  # its weights are mapped from the draft
    return NAME, _kept(taps, folder / NAME)


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
        "dtype": "fp16" if storage == "float16" else "fp32",
        "quantization_config": None,
        "save_onnx_model": False,
    }
    return {"openvino_config.json": json.dumps(values, indent=2) + "\n"}


def write_tokenizer(tokenizer: ClipTokenizer, folder: Path) -> str | None:
    """Write the tokenizer as a graph for openvino-genai; None, or why it is missing."""
    if (missing := openvino_tokenizer.unavailable()) is not None:
        return f"left out the tokenizer's graph, which openvino-genai needs: {missing}"
    openvino_tokenizer.write(tokenizer, folder)
    return None


@hookimpl
def anamorph_exporters() -> list[Exporter]:
    packages = ("torch", "onnx", "openvino")
    return [FolderExporter(Format("openvino", packages, (1,), write, unavailable, root_files, write_tokenizer))]
