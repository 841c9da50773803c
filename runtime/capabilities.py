"""What works on this machine, said before anything is loaded: task x engine x device x precision x sizes.

Everything is computed from what plug-ins declare, from configurations and from headers of weight files.
"""

import importlib.metadata
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement

from anamorph.autoencoder_interfaces import vae_scale_factor
from anamorph.cache import cache_folder
from anamorph.components import CHECKPOINT, UNEXPORTED, Component
from anamorph.config import Config
from anamorph.denoiser_interfaces import even, unet_multiple
from anamorph.engine import PRECISIONS, SIZES, Backend
from anamorph.errors import BackendError
from anamorph.exporting import LINKED
from anamorph.guard import missing, places_here
from anamorph.interface import Axis, Interface
from anamorph.machine import free_memory
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.plugins import GROUP, get_exporter, list_backends

TENSORS = 4
"""Feature maps of the largest size that an autoencoder holds at a time."""
AUTOENCODERS = ("vae", "vqvae")
NOT_CHECKED = ("test", "dev")
"""Extras that nothing needs to draw."""


@dataclass(frozen=True)
class Needs:
    """What a model asks for: numbers of floating point in all its parts, whether it is an export, and its sizes.

    `largest` is the number of values in the largest feature map of one picture, `content` what engines must open.
    `sizes` are those that the model takes, `graph_sizes` those that its exports take.
    """

    content: str
    parameters: int
    largest: int
    sizes: str
    graph_sizes: str
    kept_back: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One combination; `reason` is None where it works. `memory` and `disk` are bytes, without the engine's own code.

    `sizes` says which pictures it draws, `note` what else is done.
    """

    task: str
    engine: str
    device: str
    precision: str
    sizes: str
    reason: str | None
    memory: int | None = None
    disk: int | None = None
    note: str = ""


def matrix(tasks: Sequence[str], needs: Needs | None = None) -> list[Cell]:
    """All combinations of these tasks with what engines declare, test doubles left out; `needs` are a model's."""
    engines = [backend for _, backend in sorted(list_backends().items()) if not backend.double]
    return [cell for backend in engines for cell in _cells(backend, tasks, needs)]


def _cells(backend: Backend, tasks: Sequence[str], needs: Needs | None) -> Iterator[Cell]:
    reason, here = missing(backend), {}
    if reason is None:
        try:
            here = places_here(backend)
        except BackendError as error:
            reason = str(error)
    reason = reason or _closed(backend, needs)
    every = {**{device: precisions for device, precisions in backend.places.items() if device not in here}, **here}
    for device, declared in every.items():
        for precision in PRECISIONS:
            if precision not in declared and precision not in backend.places.get(device, ()):
                continue
            lost = reason or _absent(backend, device, precision, here)
            memory, disk = (None, None) if needs is None else _costs(backend, precision, needs)
            lost = lost or _too_much(memory, disk)
            for task in tasks:
                yield Cell(task, backend.name, device, precision, _sizes(backend, needs), lost, memory, disk,
                           _note(backend, needs))  # fmt: skip


def _closed(backend: Backend, needs: Needs | None) -> str | None:
    """Why the engine does not open what the model is, not even after an export, or None."""
    content = CHECKPOINT if needs is None else needs.content
    if content in backend.formats:
        return None
    if content != CHECKPOINT:
        return f"it opens {', '.join(backend.formats)}, and this is {content}"
    try:
        get_exporter(backend.formats)
    except BackendError as error:
        return str(error)
    return None


def _absent(backend: Backend, device: str, precision: str, here: dict[str, tuple[str, ...]]) -> str | None:
    if device not in here:
        return f"this machine has no {device}"
    return None if precision in here[device] else f"this machine has no {precision} for {backend.name}"


def _costs(backend: Backend, precision: str, needs: Needs) -> tuple[int, int]:
    """Bytes of memory and of the user's cache."""
    width = PRECISIONS[precision] // 8
    memory = needs.parameters * width * backend.costs.memory + TENSORS * needs.largest * width
    if needs.content != CHECKPOINT or CHECKPOINT in backend.formats:
        written = 0
    else:
        storage = get_exporter(backend.formats).storages[0]
        written = 0 if storage == LINKED else needs.parameters * PRECISIONS[storage] // 8
    return int(memory), int(needs.parameters * backend.costs.disk.get(precision, 0.0)) + written


def _too_much(memory: int | None, disk: int | None) -> str | None:
    free = free_memory()
    if memory is not None and free is not None and memory > free:
        return f"it takes about {gigabytes(memory)} of memory, and {gigabytes(free)} are free"
    place = next(path for path in (cache_folder(), *cache_folder().parents) if path.is_dir())
    if disk and disk > (left := shutil.disk_usage(place).free):
        return f"it keeps about {gigabytes(disk)} in {place}, and {gigabytes(left)} are free"
    return None


def gigabytes(number: int) -> str:
    """`3.4 GB`, or megabytes below one of them."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _sizes(backend: Backend, needs: Needs | None) -> str:
    served = SIZES[backend.sizes]
    if needs is None:
        return served
    own = needs.sizes if CHECKPOINT in backend.formats else needs.graph_sizes
    return own + served.removeprefix(SIZES["any"])


def _note(backend: Backend, needs: Needs | None) -> str:
    if needs is None or CHECKPOINT in backend.formats or needs.content != CHECKPOINT:
        return ""
    made = f"exported to {backend.formats[0]} at first use"
    return made if not needs.kept_back else f"{made}, but for {', '.join(needs.kept_back)}"


def needs_of(
    class_name: str, models: Mapping[str, tuple[str, Config]], content: str, parameters: int, taken: Interface | None
) -> Needs:
    """What a checkpoint of that class asks for, from the class and configuration of each model.

    `parameters` were counted in its headers; `taken` is the interface of an exported denoiser.
    """
    slot = DiffusionPipeline.registry[class_name].DENOISER
    denoiser, config = models[slot]
    plain = taken or Component(slot, denoiser, config).interface(slot)
    graph = taken or even(plain, config)
    factor, channels = 1, config.get("in_channels", 1)
    for name in AUTOENCODERS:
        if name in models:
            decoder = models[name][1]
            levels = decoder.get("block_out_channels") or decoder["decoder_block_out_channels"]
            factor, channels = vae_scale_factor(decoder), levels[min(1, len(levels) - 1)]
    side = factor * int(config.get("sample_size") or unet_multiple(config))
    kept_back = tuple(name for name, (kind, _) in models.items() if kind in UNEXPORTED)
    sizes, graph_sizes = (_pictures(interface.axes, factor) for interface in (plain, graph))
    return Needs(content, parameters, side * side * channels, sizes, graph_sizes, kept_back)


def _pictures(axes: dict[str, Axis], factor: int) -> str:
    """Heights and widths in pixels, and numbers of pictures, that a denoiser's axes allow."""
    if "latent_height" not in axes:
        return "its one size"
    sides = [_side(axes[name], factor) for name in ("latent_height", "latent_width")]
    size = sides[0] if sides[0] == sides[1] else f"{sides[0]} high, {sides[1]} wide"
    batch = axes.get("batch")
    fixed = batch is not None and batch.minimum == batch.maximum
    return f"{size}, {batch.minimum} in a batch alone" if batch is not None and fixed else size


def _side(axis: Axis, factor: int) -> str:
    if axis.minimum == axis.maximum:
        return f"{axis.minimum * factor} px alone"
    step = axis.multiple * factor
    return "any size" if step == 1 else f"multiples of {step} px"


def conflicts() -> list[str]:
    """One sentence for each installed package that some plug-in needs in another version, with its remedy."""
    found: dict[str, None] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        for text in entry.dist.requires or () if entry.dist is not None else ():
            if (sentence := _conflict(entry.dist.name if entry.dist else GROUP, text)) is not None:
                found[sentence] = None
    return list(found)


def _conflict(package: str, text: str) -> str | None:
    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        return f"{package} declares {text!r}, which is no requirement; report it to its author"
    marker = requirement.marker
    extra = None if marker is None else str(marker).partition('extra == "')[2].partition('"')[0]
    if extra in NOT_CHECKED or (marker is not None and not marker.evaluate({"extra": extra or ""})):
        return None
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if requirement.specifier.contains(version, prereleases=True):
        return None
    wanted = f"{requirement.name}{requirement.specifier}"
    return f"{requirement.name} {version} is installed, {package} needs {wanted}; run: pip install '{wanted}'"
