"""From a checkpoint to a certified folder: part by part, then compared, then moved into place."""

import importlib.metadata
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from anamorph.artifact import DRAFT, MANIFEST, NATIVE, Artifact, Part
from anamorph.backends.memory import release_memory
from anamorph.checkpoint import ALONE, Checkpoint
from anamorph.components import Component
from anamorph.drafts import drafted
from anamorph.errors import ArtifactError, BackendUnavailable, InputError
from anamorph.exporters import calibration, certificate, quantization
from anamorph.exporters.certifying import block_checks, certify, checks_of, write_draft
from anamorph.exporters.fitting import fitting_precision
from anamorph.exporters.formats import Format, Writing
from anamorph.exporters.parts import record_of, storing_of
from anamorph.exporters.plain_files import copy_rest, tokenizers_of
from anamorph.exporters.references import check_rewritten, load, write_picture, write_probes
from anamorph.exporters.settling import check_rewrites, interfaces_of, read_components, reference, sized, slots_of
from anamorph.exporters.trace import trace
from anamorph.exporting import INT8, Check, ExportOptions, Quantization, Report
from anamorph.interface import Interface
from anamorph.machine import processor
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.rewrites import fitting

if TYPE_CHECKING:
    from anamorph.models.base import Model

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
        options = sized(checkpoint, options, self.kind)
        interfaces = interfaces_of(checkpoint, options, self.kind)
        check_rewrites(interfaces, options, self.format)
        if options.quantize is not None and (missing := quantization.unavailable(self.format)) is not None:
            raise BackendUnavailable(missing)
        with drafted(target) as draft, tempfile.TemporaryDirectory(prefix="anamorph-") as references:
            if draft is None:
                report(f"another process has just written {target}")
                return []
            (draft / DRAFT).touch()  # from its first file on: without a manifest it could be another tool's folder
            probes = Path(references)
            artifact = self._write(checkpoint, interfaces, draft, probes, options, report)
            write_draft(artifact)
            if options.quantize is not None:
                artifact = _quantize(artifact, checkpoint, options.quantize, probes, report)
            checks = certify(artifact, checkpoint, [component for component, _ in interfaces], probes, report)
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
        slots = slots_of(checkpoint)
        for component, functions in interfaces:
            module = load(component)
            storing = storing_of(checkpoint, component, module, options, report)
            module.even_sizes = options.signature == NATIVE
            wide = slots[component.name].wide and bool(component.config.get("force_upcast"))
            for name, interface in functions.items():
                report(f"exporting {name}")
                place = draft / (name if len(functions) > 1 else component.name)
                rewrites = fitting(wanted, name, component.class_name, component.config)
                if not certified:
                    _check_exact(component, name, module, rewrites, report)
                module.rewrite(rewrites)
                place.mkdir(parents=True, exist_ok=True)
                tracing = partial(trace, module, module.method(name))
                written = self.kind.write(Writing(interface, tracing, place, storing, options, wide))
                module.rewrite(reference(rewrites))
                parts[name] = record_of(component, written, place, draft, interface, rewrites, storing)
                (place / "config.json").write_text(module.config.to_json(), encoding="utf-8")
                if certified:
                    write_probes(probes, name, interface, module, written.taps)
            del module
            release_memory()  # traced graphs refer to themselves, and to the weights
        copy_rest(checkpoint, [component for component, _ in interfaces], draft)
        for name, tokenizer in tokenizers_of(checkpoint).items():
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
                    module.rewrite(reference(part.rewrites))
                    write_probes(place, name, part.interface, module, part.taps)
                del module
            if source.class_name not in ALONE:
                report("drawing a picture with PyTorch")
                write_picture(place, source, exported)
            report("comparing")
            precision, _ = fitting_precision(read_components(source), exported.format)
            checks = list(checks_of(exported, certificate.compare(exported, place, precision, trusted), precision))
            differing = {check.part for check in checks if not check.passed}
            chosen = [name for name in exported.parts if blocks or name in differing]
            return [*checks, *block_checks(exported, certificate.compare_blocks(exported, place, chosen))]


def _check_exact(component: Component, part: str, module: "Model", rewrites: Sequence[str], report: Report) -> None:
    """Compare exact rewrites with the model itself, where no engine here can show what they compute."""
    if names := [each for each in rewrites if each not in reference(rewrites)]:
        error = check_rewritten(component, part, module, names)
        report(f"{part}: {' '.join(names)} computes what the model does, to {error:.0e} (relative L2)")


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
    write_draft(changed)
    psnr_db = calibration.run(changed, place)
    report(
        f"{part} in {INT8}: a call differs by {found.error:.1e} (relative L2), pictures by {min(psnr_db):.1f} dB "
        f"(PSNR) or more; in float32 stay {', '.join(found.kept) or 'no layers'}"
    )
    record = {"part": part, **asdict(found), "psnr_db": psnr_db, "prompts": list(wishes.prompts)}
    return replace(changed, image={**changed.image, INT8: record})
