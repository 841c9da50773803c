"""Pictures and masks to start from, and tasks that start from them beside diffusers."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from exported import exported
from parity import ours, reference, relative, worst
from PIL import Image, ImageDraw

import anamorph
from anamorph import DiffusionPipeline

OPTIONS = {"skip_prk_steps": True}
"""What checkpoints whose scheduler is PNDM say; the others carry it along."""
SCHEDULERS = [
    anamorph.DDIMScheduler,
    anamorph.PNDMScheduler,
    anamorph.EulerDiscreteScheduler,
    anamorph.DPMSolverMultistepScheduler,
]


def picture(height: int = 64, width: int = 64, hue: int = 0) -> Image.Image:
    """A coloured disc with a shade on white."""
    y, x = np.indices((height, width))
    inside = (2 * y / height - 1) ** 2 + (2 * x / width - 1) ** 2 < 0.7
    colour = np.roll([220, 60, 30], hue) + np.stack([x, y, x - y], -1) / 3
    return Image.fromarray(np.where(inside[..., None], colour, 255).clip(0, 255).astype(np.uint8))


def mask(height: int = 64, width: int = 64, shift: int = 0) -> Image.Image:
    """White in a part of the middle."""
    result = Image.new("L", (width, height))
    ImageDraw.Draw(result).ellipse((width // 4 + shift, height // 4, width * 3 // 5 + shift, height * 2 // 3), fill=255)
    return result


@functools.cache
def opened(kind: type[DiffusionPipeline], folder: Path) -> DiffusionPipeline:
    """A pipeline on eager; loading takes longer than a picture."""
    return kind.from_pretrained(folder, backend="eager")


def load(kind: type[DiffusionPipeline], folder: Path, scheduler: type | None = None) -> Any:
    """A pipeline of its own over shared weights."""
    pipe = kind(**opened(kind, folder).components)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **OPTIONS)  # type: ignore[attr-defined]
    return pipe


def compare(
    kind: type[DiffusionPipeline], folder: Path, scheduler: type | None, seeds: Any, **call: Any
) -> tuple[float, float]:
    """Largest difference of the latents after any step and of any pixel from diffusers'; see `parity.worst`."""
    expected = reference(folder, scheduler, seeds, kind.__name__, OPTIONS, **call)
    return worst(ours(load(kind, folder, scheduler), seeds, **call), expected)


def beside_eager(
    folder: Path, engine: str, kind: Any, scheduler: type | None = None, **call: Any
) -> tuple[float, float]:
    """Difference of the last latents, and the largest of any pixel, of an exported folder from eager."""
    pipes = (
        kind.from_pretrained(exported(folder, engine), backend=engine),
        kind.from_pretrained(folder, backend="eager"),
    )
    assert {placed.engine for placed in pipes[0].placement.values()} == {engine}
    for pipe in pipes if scheduler else ():
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)  # type: ignore[union-attr]
    latents = [np.asarray(pipe(**call, output_type="latent").images) for pipe in pipes]
    images = [pipe.decode(value, "np") for pipe, value in zip(pipes, latents, strict=True)]
    return relative(*latents), float(np.abs(images[0] - images[1]).max())
