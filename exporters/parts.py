"""One part of an artifact: where its weights come from, and its record."""

from pathlib import Path
from typing import TYPE_CHECKING

from anamorph.artifact import UNVERIFIED, FileRecord, Part
from anamorph.checkpoint import Checkpoint
from anamorph.components import Component
from anamorph.exporting import LINKED, ExportOptions, Report
from anamorph.interface import Interface
from anamorph.weights import find_weights

if TYPE_CHECKING:
    from anamorph.exporters.storing import Storing, Written
    from anamorph.models.base import Model


def storing_of(
    checkpoint: Checkpoint, component: Component, module: "Model", options: ExportOptions, report: Report
) -> "Storing":
    """How one component's weights are stored, with their names and places in the checkpoint."""
    from anamorph.exporters.storing import Origin, Storing

    weights = find_weights(component.stored, component.stem, component.variant)
    if weights.pickled:
        origins = {name: Origin(module.stored_name(name)) for name in module.state_dict()}
        if options.storage == LINKED:
            report(f"{component.name}: its weights are pickles, which cannot be mapped; they are copied")
            return Storing("float32", origins=origins)
    else:
        origins = {
            module.rename(name): Origin(name, entry.file.relative_to(checkpoint.folder).as_posix(), entry)
            for name, entry in weights.entries().items()
        }
    linked = options.storage == LINKED
    return Storing("float32" if linked else str(options.storage), linked, origins)


def record_of(
    component: Component,
    written: "Written",
    place: Path,
    draft: Path,
    interface: Interface,
    rewrites: tuple[str, ...],
    storing: "Storing",
) -> Part:
    """The record of a part that has just been written into `place`."""
    found = (path for root in written.roots or (place,) for path in sorted(root.rglob("*")) if path.is_file())
    files = {path.relative_to(draft).as_posix(): FileRecord.of(path) for path in found}
    links = {
        origin.file: origin.entry.file
        for origin in storing.origins.values()
        if storing.linked and origin.file is not None and origin.entry is not None
    }
    return Part(
        component.name,
        (place / written.file).relative_to(draft).as_posix(),
        files,
        interface,
        written.storage or (LINKED if storing.linked else storing.dtype),
        _PENDING,
        rewrites=rewrites,
        taps=written.taps,
        constants=written.constants,
        linked={name: FileRecord.of(path) for name, path in links.items()},
    )


_PENDING = f"{UNVERIFIED}: the export has not finished"
