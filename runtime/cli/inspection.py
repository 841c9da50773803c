"""What a model is made of and what it can do here, without reading its weights."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anamorph.artifact import Artifact
from anamorph.capabilities import Needs, needs_of
from anamorph.checkpoint import Checkpoint, Source, component_config, open_checkpoint
from anamorph.components import CHECKPOINT
from anamorph.config import Config
from anamorph.errors import BackendError, CheckpointError, ConfigError
from anamorph.guard import missing
from anamorph.lora.names import CHANGED
from anamorph.lora.ports import adaptable
from anamorph.pipelines import DiffusionPipeline, LatentDiffusion
from anamorph.pipelines.auto import tasks_of_class
from anamorph.pipelines.slots import parts_of
from anamorph.plugins import installed
from anamorph.weights import WIDTH, find_weights

if TYPE_CHECKING:
    from anamorph.original.kinds import Kind

TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8",
         "F8_E5M2": "float8"}  # fmt: skip
VARIANT = re.compile(r"(?:model|pytorch_model)\.([a-z]\w*)(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
PICKLED = "pickle"


@dataclass(frozen=True)
class Row:
    """One component: `parameters` counts numbers of floating point, None where only loading would tell; bytes."""

    name: str
    class_name: str
    parameters: int | None = None
    bytes: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Report:
    """What was found; `tasks` maps what the model does to the class for it, `engines` each to how or why not.

    `adapters` says of each component that adapters (LoRA) are made for how it takes them, or why not.
    """

    model: str
    pipeline: str
    format: str
    components: list[Row]
    variants: list[str]
    tasks: dict[str, str]
    engines: dict[str, str]
    adapters: dict[str, str]


def inspect(model: str, variant: str | None = None) -> Report:
    """Look at a folder, an exported folder, a file or a hub id that is in the cache.

    Raises CheckpointError: there is none, or its files are damaged.
    """
    if Path(model).expanduser().is_file():
        return _file(model)
    checkpoint = open_checkpoint(Source(model, local_files_only=True, variant=variant))
    artifact = checkpoint.artifact
    rows = [
        Row(name, slot[1]) if artifact is None else _exported(artifact, name, slot[1])
        for name, slot in checkpoint.components.items()
        if slot is not None
    ]
    if artifact is None:
        rows = [_stored(checkpoint, row) for row in rows]
    places = {row.name: _model_place(checkpoint, row) for row in rows}
    configs = {name: component_config(place) for name, place in places.items() if place is not None}
    form = CHECKPOINT if artifact is None else artifact.format
    parts = None if artifact is None else set(artifact.parts)
    tasks = tasks_of(checkpoint.class_name, configs, parts)
    return Report(
        str(checkpoint.folder),
        checkpoint.class_name,
        form,
        rows,
        _variants(checkpoint.folder),
        tasks,
        engines_for(form),
        adapters_for([row.name for row in rows if row.name in configs], artifact),
    )


def adapters_for(names: Iterable[str], artifact: Artifact | None) -> dict[str, str]:
    """Component -> how it takes adapters."""
    found = {}
    for name in (name for name in CHANGED if name in names):
        parts = {} if artifact is None else {n: p for n, p in artifact.parts.items() if p.component == name}
        try:
            layers = {layer for part in parts.items() for layer in adaptable(*part)}
        except BackendError as error:
            found[name] = f"takes none: {error}"
        else:
            found[name] = "takes them hot or fused" + (f", in {len(layers)} layers" if parts else "")
    return found


def needs(model: str, variant: str | None = None) -> Needs:
    """What a model asks for before it can draw; see `anamorph.capabilities`. Raises what `inspect` raises.

    Raises ConfigError: it is of a class that this version does not have.
    """
    report = inspect(model, variant)
    if report.pipeline not in DiffusionPipeline.registry:
        raise ConfigError(
            f"{report.model} is a {report.pipeline}, which this version does not have; it has "
            f"{', '.join(DiffusionPipeline.registry)}"
        )
    parameters = sum(row.parameters or (row.bytes or 0) // _width(row) for row in report.components)
    if Path(model).expanduser().is_file():
        models = {found.slot: (found.class_name, Config(found.config)) for found in _recognised(model).models}
        return needs_of(report.pipeline, models, CHECKPOINT, parameters, None)
    checkpoint = open_checkpoint(Source(model, local_files_only=True, variant=variant))
    artifact, models = checkpoint.artifact, dict[str, tuple[str, Config]]()
    for name, slot in checkpoint.components.items():
        place = None if slot is None else _config_place(checkpoint, Row(name, slot[1]))
        if slot is not None and place is not None:
            models[name] = (slot[1], component_config(place))
    taken = None if artifact is None else artifact.parts[DiffusionPipeline.registry[report.pipeline].DENOISER].interface
    return needs_of(report.pipeline, models, CHECKPOINT if artifact is None else artifact.format, parameters, taken)


def _width(row: Row) -> int:
    """Bytes of a number in files that do not tell; most hold four."""
    return 2 if row.dtype in ("float16", "bfloat16") else 4


def _config_place(checkpoint: Checkpoint, row: Row) -> Path | None:
    """As `_model_place`; the parts of an exported model lie apart."""
    artifact = checkpoint.artifact
    if artifact is None:
        return _model_place(checkpoint, row)
    parts = [part for part in artifact.parts.values() if part.component == row.name]
    return (artifact.folder / parts[0].file).parent if parts else None


def _model_place(checkpoint: Checkpoint, row: Row) -> Path | None:
    """Where a model has its configuration; None for what is no model, like a scheduler."""
    place = checkpoint.folder if checkpoint.flat else checkpoint.folder / row.name
    if not (place / "config.json").is_file():
        return None
    return None if checkpoint.flat and component_config(place).get("_class_name") != row.class_name else place


def _stored(checkpoint: Checkpoint, row: Row) -> Row:
    """With what the headers of its weight files say; as it is where it has none."""
    place = _model_place(checkpoint, row)
    if place is None:
        checkpoint.place(row.name)
        return row
    slot = checkpoint.components[row.name]
    stem = _DIFFUSERS if slot is None or slot[0] == "diffusers" else "model"
    try:
        weights = find_weights(place, stem, checkpoint.variant)
    except CheckpointError:
        if checkpoint.variant is None:
            raise
        weights = find_weights(place, stem)  # as loading does: components without the variant have plain weights
    size = sum(file.stat().st_size for file in weights.files)
    if weights.pickled:
        return Row(row.name, row.class_name, None, size, PICKLED)
    entries = weights.entries().values()
    return Row(row.name, row.class_name, *_counted((entry.dtype, entry.shape) for entry in entries))


_DIFFUSERS = "diffusion_pytorch_model"


def _counted(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[int, int, str]:
    """Parameters, bytes and types of tensors."""
    sizes: dict[str, int] = {}
    for dtype, shape in tensors:
        sizes[dtype] = sizes.get(dtype, 0) + prod(shape)
    floating = {dtype: count for dtype, count in sizes.items() if dtype in TYPES}
    names = sorted(floating, key=lambda dtype: -floating[dtype])
    total = sum(count * WIDTH[dtype] for dtype, count in sizes.items())
    return sum(floating.values()), total, ", ".join(TYPES[dtype] for dtype in names)


def _exported(artifact: Artifact, name: str, class_name: str) -> Row:
    parts = [part for part in artifact.parts.values() if part.component == name]
    if not parts:
        return Row(name, class_name)
    own = {file: record.size for part in parts for file, record in part.files.items()}
    return Row(name, class_name, None, sum(own.values()), ", ".join(sorted({part.storage for part in parts})))


def _file(model: str) -> Report:
    """One file of the original layout, as the folder that it would be converted to."""
    from anamorph.original.reading import find_file

    path, kind = find_file(model), _recognised(model)
    rows = [
        Row(found.slot, found.class_name, *_counted((v.dtype, v.values.shape) for v in found.tensors.values()))
        for found in kind.models
    ]
    rows.append(Row("scheduler", str(kind.scheduler["_class_name"])))
    tasks = tasks_of(kind.class_name, {found.slot: found.config for found in kind.models}, None)
    adapters = adapters_for([found.slot for found in kind.models], None)
    return Report(str(path), kind.class_name, "single file", rows, [], tasks, engines_for(CHECKPOINT), adapters)


def _recognised(model: str) -> "Kind":
    from anamorph.original.kinds import recognise
    from anamorph.original.reading import find_file, open_original

    return recognise(open_original(find_file(model)))


def tasks_of(class_name: str, configs: Mapping[str, Mapping[str, Any]], parts: set[str] | None) -> dict[str, str]:
    """What a checkpoint of that class can do -> the class that does it; `parts` are those that were exported."""
    named, registry = tasks_of_class(class_name), DiffusionPipeline.registry
    return {task: name for task, name in named.items() if _fits(registry[name], configs, parts)}


def _fits(kind: type[DiffusionPipeline], configs: Mapping[str, Mapping[str, Any]], parts: set[str] | None) -> bool:
    needed = parts_of({name: slot for name, slot in kind.SLOTS.items() if not slot.optional})
    if parts is not None and not set(needed) <= parts:
        return False
    if not issubclass(kind, LatentDiffusion) or not {"unet", "vae"} <= set(configs):
        return True
    return configs["unet"].get("in_channels") in kind.TASK.channels(configs["vae"]["latent_channels"])


def engines_for(form: str) -> dict[str, str]:
    """Engine -> how it opens this format here, or what is missing."""
    found = installed()
    engines = {}
    for name, backend in sorted(found.backends.items()):
        exporters = [found.exporters[kind] for kind in backend.formats if kind in found.exporters]
        if backend.double:
            continue
        if (reason := missing(backend)) is not None:
            engines[name] = f"not available: {reason}"
        elif form in backend.formats:
            engines[name] = "opens it as it is"
        elif form != CHECKPOINT or not exporters:
            engines[name] = f"does not open {form}, only {', '.join(backend.formats)}"
        else:
            reasons = [missing(exporter) for exporter in exporters]
            ready = None in reasons
            engines[name] = (
                f"opens its export to {exporters[0].format}, made at first use" if ready else str(reasons[0])
            )
    return engines


def _variants(folder: Path) -> list[str]:
    found = (VARIANT.search(path.name) for path in folder.glob("*/*model*"))
    return sorted({match[1] for match in found if match})
