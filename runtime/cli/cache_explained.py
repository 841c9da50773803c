"""Why a start would find what it needs in the cache or not, part by part, without opening anything."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anamorph.artifact import Artifact, read_artifact
from anamorph.cache import cache_folder
from anamorph.checkpoint import Checkpoint, Source, open_checkpoint
from anamorph.cli.common import folder_of, given
from anamorph.components import CHECKPOINT, Component
from anamorph.engine import Backend, Keeping, Target
from anamorph.entries import ANY, every, nearest
from anamorph.errors import AnamorphError
from anamorph.exporting import Exporter, cached_options, export_place
from anamorph.pipelines import DiffusionPipeline
from anamorph.pipelines.nets import spread
from anamorph.pipelines.slots import models, parts_of, read_slot
from anamorph.pipelines.wishes import Wishes
from anamorph.plugins import get_exporter
from anamorph.rewrites import Wish


@dataclass(frozen=True)
class Explained:
    """One part on the engine that would run it, and what the cache holds for it."""

    part: str
    engine: str
    lines: list[str]


def explained(options: argparse.Namespace) -> Iterator[Explained]:
    """A row for each part of a model."""
    checkpoint = open_checkpoint(Source(folder_of(options.model), variant=options.variant))
    kind = DiffusionPipeline._class_for(checkpoint.class_name, str(checkpoint.folder))
    slots = spread(kind.SLOTS, checkpoint.components)
    parts = parts_of(slots)
    wishes = Wishes.of(given(options), [*models(slots), *parts])
    components = {name: read_slot(checkpoint, name, slot) for name, slot in models(slots).items()}
    for part, name in parts.items():
        if (component := components[name]) is None:
            continue
        backend = wishes.backend_of(component, part)
        target = wishes.target_of(component, part, backend)
        told = f"{backend.name} on {target.device} in {target.precision}"
        yield Explained(part, told, list(_lines(component, part, backend, target, wishes.rewrites)))


def _lines(component: Component, part: str, backend: Backend, target: Target, rewrites: Wish) -> Iterator[str]:
    artifact = component.artifact
    if artifact is None and CHECKPOINT in backend.formats:
        yield f"{backend.name} opens the checkpoint itself; nothing is exported"
        return
    if artifact is None:
        assert component.checkpoint is not None
        exporter = get_exporter(backend.formats)
        place = export_place(component.checkpoint, exporter, cached_options(exporter, rewrites))
        artifact = _artifact(place, component.checkpoint.folder)
        if artifact is None:
            yield f"export: not found, it will be made; {_nearest_export(component.checkpoint, exporter)}"
            return
        yield f"export: found, {place}"
    if isinstance(backend, Keeping):
        yield from _compiled(backend, artifact, part, target)


def _compiled(backend: Keeping, artifact: Artifact, part: str, target: Target) -> Iterator[str]:
    key = backend.key(artifact, part, target)
    found = [entry for entry in every() if set(key.differences(entry.key)) <= {"shape"}]
    for entry in found:
        shape = "all sizes" if entry.key.shape == ANY else entry.key.shape
        yield f"compiled: found for {shape}, {entry.folder}"
    if found:
        return
    close = nearest(key)
    if close is None:
        yield "compiled: not found, it will be made; the cache has nothing for a part of this name"
        return
    differing = {name: both for name, both in key.differences(close.key).items() if name != "shape"}
    yield f"compiled: not found, it will be made; the nearest is {close.folder}, which differs in"
    for name, (here, there) in differing.items():
        yield f"  {name}: {here} here, {there} there"


def _artifact(place: Path, checkpoint: Path) -> Artifact | None:
    try:
        return read_artifact(place, checkpoint) if place.is_dir() else None
    except AnamorphError:
        return None


def _nearest_export(checkpoint: Checkpoint, exporter: Exporter) -> str:
    """What the export of the same weights, or of others, that is there differs in."""
    digest, versions = checkpoint.digest(), dict(exporter.fingerprint())
    places = sorted((cache_folder() / "exports").glob(f"[!.]*-{exporter.format}-*"))
    found = [one for place in places if (one := _artifact(place, checkpoint.folder)) is not None]
    same = next((one for one in found if one.source["sha256"] == digest), None)
    if same is None:
        return "the cache has none of these weights"
    there = dict(same.versions)
    differing = [name for name in {**versions, **there} if versions.get(name) != there.get(name)]
    said = ", ".join(f"{name}: {versions.get(name)} here, {there.get(name)} there" for name in sorted(differing))
    return f"{same.folder} differs in {said or 'configurations, vocabulary or variant'}"
