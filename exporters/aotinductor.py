"""Packages of AOTInductor for this processor: each part compiled ahead of time, weights inside."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from anamorph.errors import BackendError
from anamorph.exporters.folder import FolderExporter
from anamorph.exporters.formats import Format, for_all_sizes
from anamorph.exporting import Exporter
from anamorph.interface import Interface
from anamorph.plugins import hookimpl

if TYPE_CHECKING:
    import torch

    from anamorph.exporters.storing import Storing, Written

FILE = "model.pt2"


def write(program: "torch.export.ExportedProgram", interface: Interface, folder: Path, _: "Storing") -> "Written":
    """Compile and write `model.pt2`. Raises BackendError: Inductor or the C++ compiler fails."""
    import torch

    from anamorph.backends.compile import keep_code
    from anamorph.exporters.storing import Written

    folder.mkdir(parents=True, exist_ok=True)
    keep_code()
    try:
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(program, package_path=str(folder / FILE))
    except Exception as error:  # Inductor raises many unrelated types
        reason = str(error).strip().splitlines()[0]
        raise BackendError(f"AOTInductor cannot compile {interface.component}: {reason}") from error
    return Written(FILE, {}, {})


def unavailable() -> str | None:
    """None, or what is missing."""
    if not importlib.util.find_spec("torch"):
        return "torch not installed; run: pip install 'anamorph[torch]'"
    if not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
        return "AOTInductor needs a C++ compiler; run: apt-get install g++"
    return None


@hookimpl
def anamorph_exporters() -> list[Exporter]:
    return [
        FolderExporter(Format("aotinductor", ("torch",), for_all_sizes(write), unavailable, native=True, images=False))
    ]
