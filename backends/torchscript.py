"""TorchScript archives, on the processor, in float32.

Loading one runs code of its own: TorchScript, a small language without access to Python, but with operations that read
and write files. So its sources are read first, and what calls anything but operations on tensors is refused.
"""

import ast
import importlib.util
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from anamorph.artifact import Artifact
from anamorph.backends.eager import INSTALL, Eager
from anamorph.backends.numpy_program import artifact_of
from anamorph.backends.torch_arrays import TorchArrays
from anamorph.backends.torch_graph import TorchGraph
from anamorph.components import Component
from anamorph.engine import Backend, Costs, Placement, Program, Target
from anamorph.errors import ArtifactError
from anamorph.plugins import hookimpl
from anamorph.rewrites import noted

FORMAT = "torchscript"
FILES = ("from_file", "save", "load")
"""Operations on tensors that reach files."""
SPACES = ("aten", "prim")
"""Namespaces of operations that PyTorch itself brings."""
PLAIN = ("annotate", "uninitialized", "unchecked_cast", "int", "float", "bool", "list", "len", "range", "getattr")
MOST = 64 * 2**20
"""Sources of one archive are never larger (bytes); weights are not read."""


def check_code(path: Path) -> None:
    """Raise ArtifactError where an archive's code does anything but compute with tensors when it is called."""
    try:
        with zipfile.ZipFile(path) as archive:
            sources = [info for info in archive.infolist() if info.filename.endswith(".py")]
            if sum(info.file_size for info in sources) > MOST:
                raise ArtifactError(f"{path} holds more than {MOST} bytes of code; it is refused")
            for info in sources:
                for name in _strange(ast.parse(archive.read(info).decode("utf-8"))):
                    raise ArtifactError(f"{path} calls {name} in {info.filename}, which is no operation on tensors")
    except (zipfile.BadZipFile, SyntaxError, ValueError, OSError) as error:
        raise ArtifactError(f"{path} is no TorchScript archive ({error}); export the checkpoint again") from None


def _strange(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in ("__setstate__", "__getstate__"):
            yield node.name  # the first runs while the archive is loaded
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if not _computes(name.split(".")):
                yield name


def _computes(path: list[str]) -> bool:
    """Whether a called name is an operation on tensors, a plain function, or a function of the archive's own."""
    if path[-1] in FILES:
        return False
    if path[0] == "ops":
        return path[1] in SPACES
    return path[0] in ("torch", "__torch__") or len(path) > 1 or path[0] in PLAIN


class TorchScript(Eager):
    """Opens exported folders in TorchScript's format."""

    name = FORMAT
    formats = (FORMAT,)
    rank: int | None = 1
    places: Mapping[str, tuple[str, ...]] = MappingProxyType({"cpu": ("float32",)})
    costs = Costs()
    concurrent = False  # warnings are silenced for all threads
    options: Mapping[str, str] = MappingProxyType({})

    def unavailable(self) -> str | None:
        return None if importlib.util.find_spec("torch") else INSTALL

    def devices(self) -> tuple[str, ...]:
        return tuple(self.places)

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        artifact = artifact_of(component, self.name, self.formats)
        return {part: _open(artifact, part, target) for part in parts}


def _open(artifact: Artifact, part: str, target: Target) -> TorchGraph:
    import torch

    path = artifact.open_part(part)
    check_code(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch would rather see torch.export
            module: Any = torch.jit.load(path, map_location=target.device).eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ArtifactError(f"{path} cannot be opened by TorchScript: {reason}") from None
    device = torch.device(target.device)
    details = noted(artifact.parts[part].rewrites)
    placement = Placement(part, FORMAT, str(device), "float32", details)
    return TorchGraph(module, artifact.parts[part].interface, placement, TorchArrays(device), broadcasts=True)


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [TorchScript()]
