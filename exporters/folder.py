"""From a checkpoint to a certified folder: part by part, then compared, then moved into place."""

import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anamorph.artifact import DRAFT, MANIFEST, NATIVE, UNVERIFIED, VERIFIED, Artifact, FileRecord, Part
from anamorph.autoencoder_interfaces import vae_scale_factor
from anamorph.backends.memory import release_memory
from anamorph.checkpoint import ALONE, Checkpoint
from anamorph.components import UNEXPORTED, Component
from anamorph.denoiser_interfaces import hint_factor
from anamorph.drafts import drafted
from anamorph.errors import ArtifactError, BackendUnavailable, ConfigError, InputError
from anamorph.exporters import calibration, certificate, quantization
from anamorph.exporters.fitting import fitting_precision
from anamorph.exporters.formats import Format, Writing
from anamorph.exporters.references import check_rewritten, load, write_picture, write_probes
from anamorph.exporters.static import fixed, joined
from anamorph.exporters.trace import part_interface, trace, without_images
from anamorph.exporting import (
    INT8,
    LINKED,
    PALETTES,
    PICTURE,
    Check,
    ExportOptions,
    Quantization,
    Report,
    palette,
)
from anamorph.interface import Interface
from anamorph.machine import processor
from anamorph.native import is_preparing, native_of
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.describing import settle_variant
from anamorph.pipelines.followed import Followed
from anamorph.pipelines.nets import spread
from anamorph.pipelines.slots import KINDS, Slots, Tokenizer, model, models, read_slot
from anamorph.rewrites import check_met, fitting, inexact
from anamorph.schedulers.registry import FILE
from anamorph.weights import find_weights

if TYPE_CHECKING:
    from anamorph.exporters.storing import Storing, Written
    from anamorph.models.base import Model

TOLERANCE = {
    "float32": (1e-4, 1e-4), LINKED: (1e-4, 1e-4), "float16": (1e-2, 1e-1), "bfloat16": (5e-2, 3e-1),
    INT8: (1.0, 1.0), **{palette(bits): (1.0, 1.0) for bits in PALETTES},
}  # fmt: skip
"""Storage -> largest relative L2 difference of a part's output, and of the latents after any step of a picture.

Those of int8 and of palettes only exclude what is unlike: these inputs are noise, which int8's ranges are not for; what
counts there is the difference that was allowed on calls of real pictures.
"""
LAYOUT = 9
"""Raised whenever the same checkpoint gives other files, so that older exports in a cache are not taken."""


@dataclass(frozen=True)
class FolderExporter:
    """Exports pipelines in one format."""

    kind: Format

    @property
    def format(self) -> str:
        """The format's name."""
        return self.kind.name

    @property
    def storages(self) -> tuple[str, ...]:
        """Types in which it stores weights."""
        return self.kind.storages

    def unavailable(self) -> str | None:
        """None, or what is missing."""
        return self.kind.unavailable()

    def fingerprint(self) -> Mapping[str, str]:
        """Versions of all packages that take part, and of the layout."""
        versions = {name: importlib.metadata.version(name) for name in ("anamorph", *self.kind.packages)}
        return {**versions, "layout": str(LAYOUT), **({"processor": processor()} if self.kind.native else {})}

    def export(self, checkpoint: Checkpoint, folder: Path, options: ExportOptions, report: Report) -> Sequence[Check]:
        """Write and certify an artifact; see `anamorph.exporting.Exporter`."""
        options = self.kind.settle(options)
        if options.storage not in self.storages:
            raise InputError(
                f"weights of {self.format} are not stored as {options.storage}; expected {', '.join(self.storages)}"
            )
        if checkpoint.artifact is not None:
            raise InputError(f"{checkpoint.folder} is an exported folder already; name the checkpoint it was made from")
        target = folder.expanduser().absolute()
        if target.exists():
            raise InputError(f"{target} exists already; remove it or name another folder")
        options = _sized(checkpoint, options, self.kind)
        interfaces = _interfaces(checkpoint, options, self.kind)
        _check_rewrites(interfaces, options, self.format)
        if options.quantize is not None and (missing := quantization.unavailable(self.format)) is not None:
            raise BackendUnavailable(missing)
        with drafted(target) as draft, tempfile.TemporaryDirectory(prefix="anamorph-") as references:
            if draft is None:
                report(f"another process has just written {target}")
                return []
            (draft / DRAFT).touch()  # from its first file on: without a manifest it could be another tool's folder
            probes = Path(references)
            artifact = self._write(checkpoint, interfaces, draft, probes, options, report)
            _write_draft(artifact)
            if options.quantize is not None:
                artifact = _quantize(artifact, checkpoint, options.quantize, probes, report)
            checks = _certify(artifact, checkpoint, [component for component, _ in interfaces], probes, report)
            (draft / DRAFT).rename(draft / MANIFEST)
            return checks

    def _write(
        self,
        checkpoint: Checkpoint,
        interfaces: Sequence[tuple[Component, Mapping[str, Interface]]],
        draft: Path,
        probes: Path,
        options: ExportOptions,
        report: Report,
    ) -> Artifact:
        parts: dict[str, Part] = {}
        wanted = options.wanted(self.format)
        certified = certificate.no_engine(self.format) is None
        slots = _slots(checkpoint)
        for component, functions in interfaces:
            module = load(component)
            storing = _storing(checkpoint, component, module, options, report)
            wide = slots[component.name].wide and bool(component.config.get("force_upcast"))
            for name, interface in functions.items():
                report(f"exporting {name}")
                place = draft / (name if len(functions) > 1 else component.name)
                rewrites = fitting(wanted, name, component.class_name, component.config)
                module.even_sizes = options.signature == NATIVE
                if not certified and (names := [each for each in rewrites if each not in _reference(rewrites)]):
                    error = check_rewritten(component, name, module, names)
                    report(f"{name}: {' '.join(names)} computes what the model does, to {error:.0e} (relative L2)")
                module.rewrite(rewrites)
                place.mkdir(parents=True, exist_ok=True)
                tracing = partial(trace, module, module.method(name))
                written = self.kind.write(Writing(interface, tracing, place, storing, options, wide))
                module.rewrite(_reference(rewrites))
                parts[name] = replace(_part(component, written, place, draft, interface, storing), rewrites=rewrites)
                (place / "config.json").write_text(module.config.to_json(), encoding="utf-8")
                if certified:
                    write_probes(probes, name, interface, module, written.taps)
            del module
            release_memory()  # traced graphs refer to themselves, and to the weights
        _copy_rest(checkpoint, [component for component, _ in interfaces], draft)
        for name, tokenizer in _tokenizers(checkpoint).items():
            if (missing := self.kind.write_tokenizer(tokenizer, draft / name)) is not None:
                report(missing)
        for name, text in self.kind.root_files(str(options.storage)).items():
            (draft / name).write_text(text, encoding="utf-8")
        source = {"name": str(checkpoint.folder), "sha256": checkpoint.digest()}
        return Artifact(draft, self.format, options.signature, parts, source, {}, self.fingerprint())

    def verify(
        self, artifact: Checkpoint, source: Checkpoint, report: Report, blocks: bool = False, trusted: bool = False
    ) -> Sequence[Check]:
        """Repeat the certificate; see `anamorph.exporting.Exporter`."""
        exported = artifact.artifact
        if exported is None:
            raise InputError(f"{artifact.folder} is no exported folder; name one that `anamorph export` wrote")
        if source.digest() != exported.source["sha256"]:
            raise ArtifactError(f"{artifact.folder} was made from another checkpoint than {source.folder} (SHA-256)")
        with tempfile.TemporaryDirectory(prefix="anamorph-") as references:
            place = Path(references)
            for component in read_components(source):
                module = load(component)
                for name, part in exported.parts.items():
                    if part.component != component.name:
                        continue
                    report(f"computing {name} with PyTorch")
                    module.rewrite(_reference(part.rewrites))
                    write_probes(place, name, part.interface, module, part.taps)
                del module
            if source.class_name not in ALONE:
                report("drawing a picture with PyTorch")
                write_picture(place, source, exported)
            report("comparing")
            precision, _ = fitting_precision(read_components(source), exported.format)
            checks = list(_checks(exported, certificate.compare(exported, place, precision, trusted), precision))
            differing = {check.part for check in checks if not check.passed}
            chosen = [name for name in exported.parts if blocks or name in differing]
            return [*checks, *_block_checks(exported, certificate.compare_blocks(exported, place, chosen))]


def _quantize(
    artifact: Artifact, checkpoint: Checkpoint, wishes: Quantization, references: Path, report: Report
) -> Artifact:
    """Bring the denoiser of a draft to int8; its record says how far pictures are from those before."""
    part, place = DiffusionPipeline.registry[checkpoint.class_name].DENOISER, references / "calibration"
    calibration.write_wishes(place, wishes)
    report(f"drawing {len(wishes.prompts)} pictures for calibration")
    calibration.run(artifact, place)
    report(f"bringing {part} to {INT8}, layers by groups")
    changed, found = quantization.quantized(artifact, part, place)
    _write_draft(changed)
    psnr_db = calibration.run(changed, place)
    report(
        f"{part} in {INT8}: a call differs by {found.error:.1e} (relative L2), pictures by {min(psnr_db):.1f} dB "
        f"(PSNR) or more; in float32 stay {', '.join(found.kept) or 'no layers'}"
    )
    record = {"part": part, **asdict(found), "psnr_db": psnr_db, "prompts": list(wishes.prompts)}
    return replace(changed, image={**changed.image, INT8: record})


def _storing(
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


def _part(
    component: Component, written: "Written", place: Path, draft: Path, interface: Interface, storing: "Storing"
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
        taps=written.taps,
        constants=written.constants,
        linked={name: FileRecord.of(path) for name, path in links.items()},
    )


_PENDING = f"{UNVERIFIED}: the export has not finished"


def read_components(checkpoint: Checkpoint) -> list[Component]:
    """The models of a checkpoint that are exported; raises ConfigError where its pipeline is not one of ours."""
    found = (read_slot(checkpoint, name, slot) for name, slot in models(_slots(checkpoint)).items())
    return settle_variant([one for one in found if one is not None and one.class_name not in UNEXPORTED])


def _slots(checkpoint: Checkpoint) -> Slots:
    """The components of a checkpoint's pipeline, or the only one of a model in a folder of its own."""
    if checkpoint.class_name in ALONE:
        return {ALONE[checkpoint.class_name]: model(checkpoint.class_name)}
    kind = DiffusionPipeline.registry.get(checkpoint.class_name)
    if kind is None:
        known = ", ".join((*DiffusionPipeline.registry, *ALONE))
        raise ConfigError(f"{checkpoint.folder} is a {checkpoint.class_name}; {known} can be exported")
    return spread(kind.SLOTS, checkpoint.components)


def _interfaces(
    checkpoint: Checkpoint, options: ExportOptions, form: Format
) -> list[tuple[Component, Mapping[str, Interface]]]:
    """What each part shall take, settled before anything is written."""
    wanted = options.wanted(form.name)
    components = [
        replace(c, rewrites=native_of(fitting(wanted, c.name, c.class_name, c.config)))
        for c in read_components(checkpoint)
    ]
    kind = DiffusionPipeline.registry.get(checkpoint.class_name, DiffusionPipeline)
    if issubclass(kind, Followed) and options.signature != NATIVE:
        raise InputError(
            f"{checkpoint.folder} has {kind.CALLED}s, which add to the denoiser's states; that takes the native "
            "signature (--signature native)"
        )
    factor = _factor(components)
    further = () if options.coreml is None else options.coreml.sizes

    def interface(component: Component, part: str) -> Interface:
        denoises = component.interface(part).inputs[0].name == "sample" and not part.startswith("vae")
        branches = kind.most_branches(component.config) if denoises or is_preparing(part) else 1

        def at(size: tuple[int, int] | None) -> Interface:
            taken = part_interface(component, part, replace(options, size=size), factor, branches, kind.ALIKE)
            return taken if form.images else without_images(taken)

        return joined([fixed(at(size)) for size in (options.size, *further)]) if form.static else at(options.size)

    return [(c, {part: interface(c, part) for part in c.parts}) for c in components]


def _sized(checkpoint: Checkpoint, options: ExportOptions, form: Format) -> ExportOptions:
    """Options with a size for formats that need one: what is asked for, or what the model was trained for."""
    if not form.static or options.size is not None:
        return options
    components = read_components(checkpoint)
    sides = (c.config.get("sample_size") for c in components if "vae_decoder" not in c.parts)
    side = next((side for side in sides if isinstance(side, int)), None)
    if side is None:
        raise InputError(f"no config.json of {checkpoint.folder} has a sample_size; name a size (--static)")
    return replace(options, size=(side * _factor(components),) * 2)


def _factor(components: Iterable[Component]) -> int:
    """Pixels per latent along one side, as the first component has it that says so."""
    for component in components:
        if "vae_decoder" in component.parts:
            return vae_scale_factor(component.config)
        if component.class_name == "ControlNetModel":
            return hint_factor(component.config)
    return 1


def _reference(rewrites: Sequence[str]) -> tuple[str, ...]:
    """The rewrites of the model that a part is compared with, which else computes as it is written."""
    return (*native_of(rewrites), *inexact(rewrites))


def _check_rewrites(
    interfaces: Sequence[tuple[Component, Mapping[str, Interface]]], options: ExportOptions, form: str
) -> None:
    """Raise InputError where a rewrite that is wished for by its name applies to nothing."""
    parts = [(part, c.class_name, c.config) for c, functions in interfaces for part in functions]
    wanted = options.wanted(form)
    check_met(options.rewrites, [name for part in parts for name in fitting(wanted, *part)], parts)


def _certify(
    artifact: Artifact, checkpoint: Checkpoint, components: Sequence[Component], probes: Path, report: Report
) -> Sequence[Check]:
    """Compare in a fresh process; write the result into the manifest, or raise ArtifactError."""
    if (reason := certificate.no_engine(artifact.format)) is not None:
        status = f"{UNVERIFIED}: {reason}"
        report(status)
        parts = {name: replace(part, status=status) for name, part in artifact.parts.items()}
        _write_draft(replace(artifact, parts=parts, image={"status": status}))
        return []
    if checkpoint.class_name not in ALONE:
        report("drawing a picture with PyTorch")
        write_picture(probes, checkpoint, artifact)
    precision, limits = fitting_precision(components, artifact.format)
    report(f"comparing in a fresh process{limits}")
    measured = certificate.compare(artifact, probes, precision, trusted=True)
    checks = list(_checks(artifact, measured, precision))
    if lost := [check for check in checks if not check.passed]:
        first, distance = lost[0], lost[0].difference.relative_l2
        raise ArtifactError(
            f"{first.part} ({first.what}) differs from PyTorch by {distance:.1e} (relative L2), "
            f"allowed are {first.tolerance:.0e}{_first_block(artifact, probes, first.part)}; nothing was written"
        )
    parts = {
        name: replace(part, status=VERIFIED + limits, errors=certificate.worst(measured, name))
        for name, part in artifact.parts.items()
    }
    image = {
        **artifact.image,
        "status": VERIFIED + limits,
        "steps": [vars(d) for d in certificate.step_differences(measured)],
    }
    _write_draft(replace(artifact, parts=parts, image=image))
    return checks


def _checks(artifact: Artifact, measured: Sequence[certificate.Measured], precision: str) -> Iterator[Check]:
    """Rows of parts, then those of the picture, each with what its weights' storage and the execution explain."""
    allowed = {name: max(_tolerance(part), TOLERANCE[precision]) for name, part in artifact.parts.items()}
    for name, (tolerance, _) in allowed.items():
        yield from (Check(name, row.what, row.difference, tolerance) for row in measured if row.part == name)
    tolerance = max(picture for _, picture in allowed.values())
    yield from (Check(PICTURE, row.what, row.difference, tolerance) for row in measured if row.part == PICTURE)


def _tolerance(part: Part) -> tuple[float, float]:
    """What the weights' storage explains; where tokens are chosen, engines round near ties to different sides."""
    return max(TOLERANCE[part.storage], TOLERANCE["float16"]) if inexact(part.rewrites) else TOLERANCE[part.storage]


def _block_checks(artifact: Artifact, measured: Sequence[certificate.Measured]) -> Iterator[Check]:
    for row in measured:
        tolerance = _tolerance(artifact.parts[row.part])[0]
        yield Check(row.part, row.what, row.difference, tolerance, row.output)


def _first_block(artifact: Artifact, probes: Path, part: str) -> str:
    parts = [part] if part in artifact.parts and artifact.parts[part].taps else []
    checks = _block_checks(artifact, certificate.compare_blocks(artifact, probes, parts))
    return next((f", and first in its {check.what}" for check in checks if not check.passed), "")


def _write_draft(artifact: Artifact) -> None:
    """The manifest under a name by which nothing loads it."""
    (artifact.folder / DRAFT).write_text(artifact.to_json(), encoding="utf-8")


def _copy_rest(checkpoint: Checkpoint, components: Sequence[Component], draft: Path) -> None:
    """Index, schedulers and tokenizers; slots that were not exported become empty, so that no loader looks for them."""
    if checkpoint.class_name in ALONE:
        shutil.copy(checkpoint.folder / "config.json", draft)
        return
    index: dict[str, Any] = json.loads((checkpoint.folder / "model_index.json").read_text(encoding="utf-8"))
    copied = _plain_files(checkpoint)
    kept = {*(component.name for component in components), *copied}
    for name in checkpoint.components:
        if name not in kept:
            index[name] = [None, None]
    (draft / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name in copied:
        if checkpoint.flat:  # nothing but a scheduler lies beside a model
            (draft / name).mkdir()
            shutil.copy(checkpoint.folder / FILE, draft / name)
        else:
            shutil.copytree(checkpoint.place(name), draft / name)
    for name, tokenizer in _tokenizers(checkpoint).items():
        vocabulary = draft / name / "tokenizer.json"
        if not vocabulary.exists():
            vocabulary.write_text(tokenizer.to_json(), encoding="utf-8")


def _plain_files(checkpoint: Checkpoint) -> list[str]:
    """The components that are no models: they are the same for every engine."""
    plain = (name for name, slot in _slots(checkpoint).items() if slot.kind in KINDS)
    return [name for name in plain if checkpoint.components.get(name) is not None]


def _tokenizers(checkpoint: Checkpoint) -> dict[str, Tokenizer]:
    slots = _slots(checkpoint)
    read = {name: read_slot(checkpoint, name, slots[name]) for name in _plain_files(checkpoint)}
    return {name: value for name, value in read.items() if isinstance(value, Tokenizer)}
