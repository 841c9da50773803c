"""Proof that an artifact computes what PyTorch computes: compared with references in a process of its own.

    python -m anamorph.exporters.certificate ARTIFACT CHECKPOINT REFERENCES PRECISION TRUSTED [PART ...]

opens every part through its engine, without PyTorch, and prints one JSON line per comparison; with names of parts it
compares the outputs of their blocks in float32 instead.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.artifact import DRAFT, Artifact, Difference, Part, read_artifact
from anamorph.checkpoint import ALONE, Checkpoint, Source, open_checkpoint
from anamorph.engine import Target
from anamorph.entries import nothing_kept
from anamorph.errors import BackendUnavailable
from anamorph.exporters.children import answered, run_child
from anamorph.exporters.references import Probe, read_probes
from anamorph.exporters.taps import open_taps
from anamorph.exporters.trial import pipeline, trajectory
from anamorph.exporting import PICTURE
from anamorph.guard import open_parts, places_here
from anamorph.memory import OwnSizes
from anamorph.pipelines.describing import read_component
from anamorph.plugins import choose_backend


@dataclass(frozen=True)
class Measured:
    """One comparison: a part with the sizes and its output or block, or the picture with its step."""

    part: str
    what: str
    output: str
    difference: Difference


def no_engine(form: str) -> str | None:
    """Why no engine on this machine opens that format, or None."""
    try:
        choose_backend(form)
    except BackendUnavailable as error:
        return str(error)
    return None


TRUSTED, UNTRUSTED = "trusted", "untrusted"
"""Whether machine code in an artifact may run."""


def compare(artifact: Artifact, references: Path, precision: str, trusted: bool) -> list[Measured]:
    """Run the artifact in a fresh process and compare its parts and its picture with the references.

    Machine code in it runs only where it is `trusted`, or in the cache of this user.

    Raises ArtifactError: that process failed.
    """
    return _in_a_child(artifact, references, precision, TRUSTED if trusted else UNTRUSTED)


def compare_blocks(artifact: Artifact, references: Path, parts: Sequence[str]) -> list[Measured]:
    """Open these parts in a fresh process and compare the output of each block, in the order of computation.

    Raises ArtifactError: that process failed.
    """
    return _in_a_child(artifact, references, "float32", UNTRUSTED, *parts) if parts else []


def _in_a_child(artifact: Artifact, references: Path, *options: str) -> list[Measured]:
    failure = "the exported folder could not be run in a fresh process"
    printed = run_child(failure, "certificate", artifact.folder, artifact.checkpoint, references, *options)
    rows = (json.loads(line) for line in printed.splitlines())
    return [Measured(**{**row, "difference": Difference(**row["difference"])}) for row in rows]


def worst(measured: Sequence[Measured], part: str) -> dict[str, Difference]:
    """The largest differences of each output of a part."""
    found: dict[str, Difference] = {}
    for row in measured:
        if row.part == part:
            old = found.get(row.output, Difference(0.0, 0.0))
            new = row.difference
            found[row.output] = Difference(max(old.relative_l2, new.relative_l2), max(old.max_abs, new.max_abs))
    return found


def step_differences(measured: Sequence[Measured]) -> list[Difference]:
    """Those of the picture: latents after each step, then the picture itself."""
    return [row.difference for row in measured if row.part == PICTURE]


def difference(value: NDArray[Any], reference: NDArray[Any]) -> Difference:
    """Relative L2 norm and largest value of `value - reference`; bytes may be rounded to the neighbour."""
    exact = reference.astype(np.float64)
    delta = value.astype(np.float64) - exact
    if reference.dtype == np.uint8:  # the last digit of a value halfway between two decides
        delta = np.maximum(np.abs(delta) - 1, 0)
    norm = float(np.linalg.norm(exact))
    return Difference(float(np.linalg.norm(delta)) / (norm or 1.0), float(np.abs(delta).max()))


def open_unfinished(folder: Path, checkpoint: Path) -> Checkpoint:
    """An exported folder, or the draft of one, which nothing else opens; linked weights lie in `checkpoint`."""
    opened = open_checkpoint(Source(str(folder)), checkpoint)
    return opened if opened.artifact else replace(opened, artifact=read_artifact(opened.folder, checkpoint, DRAFT))


def _compare(
    opened: Checkpoint, artifact: Artifact, references: Path, precision: str, trusted: bool
) -> Iterator[Measured]:
    engine, _ = choose_backend(artifact.format)
    # The pipeline comes first: a large model fits into memory only once.
    alone = opened.class_name in ALONE
    pipe = None if alone else pipeline(opened, precision, backend=engine.name, trust_remote_code=trusted)
    for name, part in artifact.parts.items():
        if pipe is not None and name in pipe.placement:
            program = pipe.program(name)
        else:
            slot = opened.components[part.component]
            component = read_component(opened, part.component, (slot[1],) if slot else ())
            device = next(iter(places_here(engine)))
            target = Target(device, precision, trusted=trusted)
            program = open_parts(engine, component, [name], target)[name]
        program.spare(OwnSizes(0))  # the model for all sizes is certified: those for one are made from it
        session = program.session()
        for probe in read_probes(references, name):
            where = _sizes(part, probe)
            given = {port: program.arrays.put(value) for port, value in probe.inputs.items()}
            for output, value in session(given).items():
                found = program.arrays.get(value)
                yield Measured(name, f"{output} {where}", output, difference(found, probe.outputs[output]))
    if pipe is None:
        return
    with np.load(references / "picture.npz") as stored:
        for what, value in trajectory(pipe, references):
            yield Measured(PICTURE, what, "latents", difference(value, stored[what]))


def _compare_blocks(artifact: Artifact, references: Path, parts: Sequence[str]) -> Iterator[Measured]:
    for name in parts:
        run, rows = open_taps(artifact, name), []
        for probe in read_probes(references, name):
            where, found = _sizes(artifact.parts[name], probe), run(probe.inputs)
            rows.append([
                Measured(name, f"block {block} {where}", block, difference(found[block], value))
                for block, value in probe.blocks.items()
                if block in found
            ])  # fmt: skip
        for row in zip(*rows, strict=True):  # block by block, at all sizes
            yield from row


def _sizes(part: Part, probe: Probe) -> str:
    return "at " + ", ".join(f"{axis} {size}" for axis, size in part.interface.check(probe.inputs).items())


def main(arguments: Sequence[str]) -> int:
    """Compare and print."""
    folder, checkpoint, references, precision, trust, *parts = arguments

    def work() -> None:
        opened = open_unfinished(Path(folder), Path(checkpoint))
        artifact = opened.artifact
        assert artifact is not None
        place = Path(references)
        trusted = trust == TRUSTED
        every = (
            _compare_blocks(artifact, place, parts) if parts else _compare(opened, artifact, place, precision, trusted)
        )
        with nothing_kept():
            for row in every:
                print(json.dumps(asdict(row)), flush=True)

    return answered(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
