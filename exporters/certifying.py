"""The certificate of an export: comparisons with their bounds, written into its manifest."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from anamorph.artifact import DRAFT, UNVERIFIED, VERIFIED, Artifact, Part
from anamorph.checkpoint import ALONE, Checkpoint
from anamorph.components import Component
from anamorph.errors import ArtifactError
from anamorph.exporters import certificate
from anamorph.exporters.fitting import fitting_precision
from anamorph.exporters.references import write_picture
from anamorph.exporting import INT8, LINKED, PALETTES, PICTURE, Check, Report, palette
from anamorph.rewrites import inexact

TOLERANCE = {
    "float32": (1e-4, 1e-4), LINKED: (1e-4, 1e-4), "float16": (1e-2, 1e-1), "bfloat16": (5e-2, 3e-1),
    INT8: (1.0, 1.0), **{palette(bits): (1.0, 1.0) for bits in PALETTES},
}  # fmt: skip
"""Storage -> largest relative L2 difference of a part's output, and of the latents after any step of a picture.

Those of int8 and of palettes only exclude what is unlike: these inputs are noise, which int8's ranges are not for; what
counts there is the difference that was allowed on calls of real pictures.
"""


def certify(
    artifact: Artifact, checkpoint: Checkpoint, components: Sequence[Component], probes: Path, report: Report
) -> Sequence[Check]:
    """Compare in a fresh process; write the result into the manifest, or raise ArtifactError."""
    if (reason := certificate.no_engine(artifact.format)) is not None:
        status = f"{UNVERIFIED}: {reason}"
        report(status)
        parts = {name: replace(part, status=status) for name, part in artifact.parts.items()}
        write_draft(replace(artifact, parts=parts, image={"status": status}))
        return []
    if checkpoint.class_name not in ALONE:
        report("drawing a picture with PyTorch")
        write_picture(probes, checkpoint, artifact)
    precision, limits = fitting_precision(components, artifact.format)
    report(f"comparing in a fresh process{limits}")
    measured = certificate.compare(artifact, probes, precision, trusted=True)
    checks = list(checks_of(artifact, measured, precision))
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
    write_draft(replace(artifact, parts=parts, image=image))
    return checks


def checks_of(artifact: Artifact, measured: Sequence[certificate.Measured], precision: str) -> Iterator[Check]:
    """Rows of parts, then those of the picture, each with what its weights' storage and the execution explain."""
    allowed = {name: max(_tolerance(part), TOLERANCE[precision]) for name, part in artifact.parts.items()}
    for name, (tolerance, _) in allowed.items():
        yield from (Check(name, row.what, row.difference, tolerance) for row in measured if row.part == name)
    tolerance = max(picture for _, picture in allowed.values())
    yield from (Check(PICTURE, row.what, row.difference, tolerance) for row in measured if row.part == PICTURE)


def _tolerance(part: Part) -> tuple[float, float]:
    """What the weights' storage explains; where tokens are chosen, engines round near ties to different sides."""
    return max(TOLERANCE[part.storage], TOLERANCE["float16"]) if inexact(part.rewrites) else TOLERANCE[part.storage]


def block_checks(artifact: Artifact, measured: Sequence[certificate.Measured]) -> Iterator[Check]:
    for row in measured:
        tolerance = _tolerance(artifact.parts[row.part])[0]
        yield Check(row.part, row.what, row.difference, tolerance, row.output)


def _first_block(artifact: Artifact, probes: Path, part: str) -> str:
    parts = [part] if part in artifact.parts and artifact.parts[part].taps else []
    checks = block_checks(artifact, certificate.compare_blocks(artifact, probes, parts))
    return next((f", and first in its {check.what}" for check in checks if not check.passed), "")


def write_draft(artifact: Artifact) -> None:
    """The manifest under a name by which nothing loads it."""
    (artifact.folder / DRAFT).write_text(artifact.to_json(), encoding="utf-8")
