"""ONNX, opset 18, in the folders that optimum-onnx reads."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from anamorph.exporters.folder import FolderExporter
from anamorph.exporters.formats import Format, for_all_sizes
from anamorph.exporting import LINKED, STORAGE, Exporter
from anamorph.interface import Interface
from anamorph.plugins import hookimpl

if TYPE_CHECKING:
    import torch

    from anamorph.exporters.storing import Storing, Written


def write(program: "torch.export.ExportedProgram", interface: Interface, folder: Path, storing: "Storing") -> "Written":
    """Write `model.onnx` and those of its weights that are not linked."""
    from anamorph.exporters.emit import emit

    return emit(program, interface, folder, storing)


def unavailable() -> str | None:
    """None, or what is missing."""
    missing = [name for name in ("torch", "onnx") if not importlib.util.find_spec(name)]
    return f"{' and '.join(missing)} not installed; run: pip install 'anamorph[torch,onnx]'" if missing else None


@hookimpl
def anamorph_exporters() -> list[Exporter]:
    kind = Format("onnx", ("torch", "onnx"), for_all_sizes(write), unavailable, (LINKED, *STORAGE))
    return [FolderExporter(kind)]
