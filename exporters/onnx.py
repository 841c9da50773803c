"""ONNX, opset 18, in the folders that optimum-onnx reads."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from anamorph.exporters.folder import FolderExporter, Format, Writing
from anamorph.exporting import Exporter
from anamorph.interface import Interface
from anamorph.pipelines.slots import Tokenizer
from anamorph.plugins import hookimpl

if TYPE_CHECKING:
    import torch

    from anamorph.exporters.storing import Storing, Written


def write(program: "torch.export.ExportedProgram", interface: Interface, folder: Path, storing: "Storing") -> "Written":
    """Write `model.onnx` and those of its weights that are not linked."""
    from anamorph.exporters.emit import emit

    return emit(program, interface, folder, storing)


def _write(writing: Writing) -> "Written":
    """Write the graph for all sizes."""
    return write(writing.trace(writing.interface), writing.interface, writing.folder, writing.storing)


def unavailable() -> str | None:
    """None, or what is missing."""
    missing = [name for name in ("torch", "onnx") if not importlib.util.find_spec(name)]
    return f"{' and '.join(missing)} not installed; run: pip install 'anamorph[torch,onnx]'" if missing else None


def root_files(storage: str) -> Mapping[str, str]:  # noqa: ARG001 - other formats have some
    """ONNX folders have no file of their own at the root."""
    return {}


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Readers of ONNX folders take the vocabulary files."""


@hookimpl
def anamorph_exporters() -> list[Exporter]:
    return [FolderExporter(Format("onnx", ("torch", "onnx"), _write, unavailable, root_files, write_tokenizer))]
