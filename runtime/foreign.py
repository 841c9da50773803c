"""Exported folders without a manifest of ours: those that optimum-onnx and optimum-intel write.

Their interfaces follow from the configurations that lie beside the graphs; the engine that opens a graph compares it
with its interface. Nothing certifies what they compute.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from anamorph.artifact import DRAFT, PORTABLE, UNVERIFIED, Artifact, FileRecord, Part
from anamorph.checkpoint import Checkpoint, component_config
from anamorph.config import Config
from anamorph.denoiser_interfaces import even
from anamorph.errors import ArtifactError
from anamorph.interface import Interface
from anamorph.model_interfaces import interfaces

FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
"""Format -> the graph's file in each component's folder."""
WEIGHTS = ("*.safetensors", "*pytorch_model*.bin")
PREFIXES = ("ORT", "OV")
"""What optimum-onnx and optimum-intel may put before the pipeline's class in model_index.json."""
STATUS = f"{UNVERIFIED}: exported by another tool, which leaves no certificate"


def foreign_format(folder: Path) -> str | None:
    """The format of a folder that holds graphs, and no weights beside them; None where it is something else.

    Raises ArtifactError: it holds graphs of several formats.
    """
    if (folder / DRAFT).exists():
        return None
    graphs = {form: found for form, name in FILES.items() if (found := list(folder.glob(f"*/{name}")))}
    places = {path.parent for found in graphs.values() for path in found}
    if any(next(place.glob(pattern), None) for place in places for pattern in WEIGHTS):
        return None
    if len(graphs) > 1:
        raise ArtifactError(f"{folder} holds graphs in {' and '.join(graphs)}; expected one format; keep one of them")
    return next(iter(graphs), None)


def pipeline_class(name: str) -> str:
    """`ORTStableDiffusionPipeline` -> `StableDiffusionPipeline`."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def read_foreign(opened: Checkpoint, form: str) -> Artifact:
    """Describe such a folder.

    All files are read once for their SHA-256, so that what an engine opens later is what was found now.
    Raises ConfigError: a component's class or configuration is not served.
    """
    folder = opened.folder
    parts = {
        name: _part(folder, component, file, interface)
        for component, slot in opened.components.items()
        if slot is not None
        for name, file, interface in _functions(opened, form, component, slot[1])
    }
    total = hashlib.sha256()
    for part in parts.values():
        for name, record in part.files.items():
            total.update(name.encode() + bytes.fromhex(record.sha256))
    source = {"name": "", "sha256": total.hexdigest()}
    return Artifact(folder, form, PORTABLE, parts, source, {"status": STATUS}, {})


def _functions(opened: Checkpoint, form: str, component: str, class_name: str) -> Iterator[tuple[str, Path, Interface]]:
    """Part, file and interface of everything that a component's class can do and the folder has a graph for."""
    folder = opened.folder
    places = (component, f"{component}_encoder", f"{component}_decoder")
    if not any((folder / place / FILES[form]).is_file() for place in places):
        return  # a scheduler, a tokenizer, or a model that the tool has left as it was
    known = interfaces(class_name, component, opened.refining)
    for name, declare in known.items():
        file = folder / name / FILES[form]
        if file.is_file():
            config = component_config(file.parent)
            yield name, file, _declared(declare(config), config)


def _declared(interface: Interface, config: Config) -> Interface:
    """The interface with the sizes that a UNet halves evenly; only the first output is sure to be there."""
    interface = even(interface, config)
    first, *rest = interface.outputs
    return replace(interface, outputs=(first, *(replace(port, optional=True) for port in rest)))


def _part(folder: Path, component: str, file: Path, interface: Interface) -> Part:
    files = {
        path.relative_to(folder).as_posix(): FileRecord.of(path)
        for path in sorted(file.parent.iterdir())
        if path.is_file() and path.suffix != ".json"
    }
    return Part(component, file.relative_to(folder).as_posix(), files, interface, "unknown", STATUS)
