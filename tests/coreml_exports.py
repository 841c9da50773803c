"""Exports to Core ML that several tests share, opened with PyTorch in Core ML's place."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exported import once, shared_place, trace_once
from parity import relative

from anamorph.artifact import NATIVE, Artifact, FileRecord, Part, read_artifact
from anamorph.backends.coreml import CoreMlProgram, open_part
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.cli import main
from anamorph.components import Component
from anamorph.denoiser_interfaces import even
from anamorph.exporters import coreml as exporter
from anamorph.exporters.formats import Writing
from anamorph.exporters.references import load
from anamorph.exporters.settling import read_components
from anamorph.exporters.static import fixed, joined
from anamorph.exporters.storing import Storing
from anamorph.exporting import CoreMl, ExportOptions
from anamorph.interface import Axis, Interface
from anamorph.plugins import get_exporter
from anamorph.probes import probe
from anamorph.rewrites import SPLIT_EINSUM

EXACT = 1e-5
"""Relative L2 difference of attention that was rewritten (float32)."""
BOUND = 1e-4
"""The same of a program run in float32: numbers such as 1 / sqrt(d) are float16 in it, as the weights are."""
HANDED = 1e-3
"""The same of a program in two pieces: what the first hands over is float16."""
PARTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
VERSION = "some/model"


def split(checkpoint: Path) -> Path:
    """An export as it is by default."""

    def make(out: Path) -> None:
        source = open_checkpoint(Source(str(checkpoint)))
        assert get_exporter(["coreml"]).export(source, out, ExportOptions(), lambda _: None) == []

    return once(shared_place() / f"coreml-{checkpoint.name}", make)


def apples(checkpoint: Path) -> Path:
    """An export for Apple's tools, by command."""

    def make(out: Path) -> None:
        wishes = ["--attention", "original", "--chunk-unet", "--apple-names", VERSION]
        assert main(["export", str(checkpoint), str(out), "--to", "coreml", *wishes, "--json"]) == 0

    return once(shared_place() / f"coreml-apples-{checkpoint.name}", make)


def component_of(checkpoint: Path, part: str) -> Component:
    return next(c for c in read_components(open_checkpoint(Source(str(checkpoint)))) if part in c.parts)


@functools.cache
def alone(checkpoint: Path, part: str, wishes: CoreMl, *sizes: tuple[int, int]) -> CoreMlProgram:
    """One part, written for these sizes of latents and opened."""
    component = component_of(checkpoint, part)
    rewrites = (SPLIT_EINSUM,) if part == "unet" and wishes.attention == "split_einsum" else ()
    interface = even(component.interface(part), component.config).required
    interface = joined([fixed(interface.limited(_axes(size))) for size in sizes or [(8, 8)]])
    place = shared_place() / f"coreml-{checkpoint.name}-{part}-{wishes.palette}-{len(sizes)}" / part

    def make(out: Path) -> None:
        module = load(component)
        module.rewrite(rewrites)
        out.mkdir(parents=True)
        trace = functools.partial(trace_once, module, module.method(part))
        exporter.write(Writing(interface, trace, out, Storing("float16"), ExportOptions(size=(64, 64), coreml=wishes)))

    return made(once(place, make), interface)


def _axes(size: tuple[int, int]) -> dict[str, Axis]:
    named = zip(("latent_height", "latent_width", "batch"), (*size, 2), strict=True)
    return {name: Axis(name, 1, count, count) for name, count in named}


def made(place: Path, interface: Interface) -> CoreMlProgram:
    """What lies in a part's folder, opened."""
    name = interface.component
    files = {p.relative_to(place.parent).as_posix(): FileRecord.of(p) for p in place.rglob("*") if p.is_file()}
    first = min(file for file in files if file.endswith("Manifest.json"))
    part = Part(name, first, files, interface, "float16", "unverified")
    return open_part(Artifact(place.parent, "coreml", NATIVE, {name: part}, {}, {}, {}), name, "ALL")


def opened(folder: Path, part: str) -> CoreMlProgram:
    return open_part(read_artifact(folder), part, "ALL")


def rounded(checkpoint: Path, part: str) -> Any:
    """The PyTorch model of a part, with the weights that float16 holds."""
    module = load(component_of(checkpoint, part)).half().float()
    return getattr(module, module.method(part))


def inputs_of(interface: Interface, *, whole: bool = False, **sizes: int) -> dict[str, Any]:
    """Inputs that float16 holds; only of whole timesteps for Apple's tools."""
    least = {name: axis.minimum for name, axis in interface.axes.items()}
    given = probe(interface, {**least, **sizes})
    kept = () if whole else ("timestep",)
    return {
        name: value if value.dtype == np.int64 or name in kept else value.astype(np.float16).astype(np.float32)
        for name, value in given.items()
    }


def difference(session: CoreMlProgram, model: Any, inputs: Mapping[str, Any]) -> float:
    """How far a program is from PyTorch, at worst of its outputs."""
    with torch.no_grad():
        expected = model(*map(torch.from_numpy, inputs.values()))
    found = session(inputs)
    pairs = zip(session.interface.outputs, expected, strict=True)
    return max(relative(np.asarray(found[port.name]), value.numpy()) for port, value in pairs)
