"""What a denoiser sees while it draws: the samples from which int8 takes its ranges and by which it is judged.

    python -m anamorph.exporters.calibration FOLDER CHECKPOINT PLACE

draws the prompts of the wishes in `PLACE` with the written folder, in a process of its own, and keeps calls and
pictures there; a second time, the pictures are compared with those of the first, and their PSNR is printed as JSON.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array
from anamorph.artifact import Artifact
from anamorph.backends.numpy_program import prepared
from anamorph.engine import Session
from anamorph.errors import InputError
from anamorph.exporters.certificate import open_unfinished
from anamorph.exporters.children import answered, run_child
from anamorph.exporters.trial import pipeline
from anamorph.exporting import Quantization
from anamorph.interface import Interface
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.denoiser import Opened
from anamorph.pipelines.denoising import denoise
from anamorph.plugins import choose_backend

WISHES, PICTURES = "wishes.json", "pictures.npy"
"""The wishes, and the pictures of the folder before anything was quantised, among the samples."""


@dataclass(frozen=True)
class Sample:
    """One call of the denoiser: its inputs and its output."""

    inputs: Mapping[str, NDArray[Any]]
    output: NDArray[Any]


def write_wishes(place: Path, wishes: Quantization) -> None:
    """Make the folder of a calibration."""
    place.mkdir()
    (place / WISHES).write_text(json.dumps(asdict(wishes)), encoding="utf-8")


def run(artifact: Artifact, place: Path) -> list[float]:
    """Draw the wishes in a fresh process; the first time calls are kept, later pictures are compared (PSNR, dB).

    Raises ArtifactError: that process failed.
    """
    failure = "the pictures for calibration could not be drawn in a fresh process"
    distances: list[float] = json.loads(run_child(failure, "calibration", artifact.folder, artifact.checkpoint, place))
    return distances


def read_wishes(place: Path) -> Quantization:
    """The wishes that lie among the samples."""
    values = json.loads((place / WISHES).read_text(encoding="utf-8"))
    return Quantization(**{**values, "prompts": tuple(values["prompts"])})


def read_samples(place: Path) -> list[Sample]:
    """All calls that were kept, in the order in which they were made."""
    samples = []
    for path in sorted(place.glob("call-*.npz")):
        with np.load(path) as stored:
            values = dict(stored)
        samples.append(Sample({name: values[name] for name in values if name != OUTPUT}, values[OUTPUT]))
    return samples


OUTPUT = "out_sample"


@dataclass
class Recorder:
    """A session that keeps some of its calls in files."""

    session: Session
    interface: Interface
    place: Path
    kept: frozenset[int]
    calls: int = field(default=0)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self.session(inputs)
        if self.calls in self.kept:
            values: dict[str, Any] = dict(prepared(self.interface, inputs))
            np.savez(self.place / f"call-{self.calls:06}.npz", **{**values, OUTPUT: np.asarray(outputs[OUTPUT])})
        self.calls += 1
        return outputs


def draw(pipe: DiffusionPipeline, wishes: Quantization, place: Path | None) -> NDArray[np.uint8]:
    """Pictures [N, H, W, 3] of all prompts, one after another; some calls of the denoiser are kept in `place`.

    Raises InputError: the pipeline does not draw from prompts alone.
    """
    if pipe.needs or "prompt" not in pipe.TAKES.all:
        raise InputError(f"{type(pipe).__name__} does not draw from prompts alone, as calibration does; leave int8 out")
    chosen = np.random.default_rng(0).permutation(len(wishes.prompts) * wishes.steps)[: wishes.samples]
    denoiser = pipe.denoiser()
    if place is not None:
        assert isinstance(denoiser, Opened)
        denoiser = replace(
            denoiser, step=Recorder(denoiser.step, denoiser.interface, place, frozenset(chosen.tolist()))
        )
    pictures = []
    for seed, prompt in enumerate(wishes.prompts):
        loop = denoise(pipe.plan(pipe.job(prompt, num_inference_steps=wishes.steps, seed=seed)), denoiser)
        for step in loop:
            latents = step.latents
        pictures.append(np.asarray(pipe.decode(latents, "pil")[0]))
    return np.stack(pictures)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio, 10 log10(255^2 / mean((a - b)^2)), in dB."""
    mean = float(np.mean((a.astype(np.float64) - b) ** 2))
    return float(10 * np.log10(255**2 / max(mean, 1e-10)))


def main(arguments: Sequence[str]) -> int:
    """Draw the wishes, and keep or compare the pictures."""
    folder, checkpoint, place = map(Path, arguments)

    def work() -> None:
        opened = open_unfinished(folder, checkpoint)
        assert opened.artifact is not None
        engine, _ = choose_backend(opened.artifact.format)
        pipe = pipeline(opened, "float32", backend=engine.name)
        before = place / PICTURES
        pictures = draw(pipe, read_wishes(place), None if before.exists() else place)
        if before.exists():
            print(json.dumps([psnr(*pair) for pair in zip(np.load(before), pictures, strict=True)]))
        else:
            np.save(before, pictures)
            print(json.dumps([]))

    return answered(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
