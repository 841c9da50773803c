"""Running diffusers and Anamorph side by side, step by step."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from anamorph.arrays import to_numpy

LATENT_BOUND = 1e-5
"""Largest relative L2 difference of the latents after any step (float32)."""
IMAGE_BOUND = 1e-4
"""Largest difference of any pixel, in 0..1 (float32)."""
ENGINE_BOUND = 1e-4
"""The same for both, between another engine and eager."""


class Agrees(Protocol):
    """Asserts that what `worst` found for a pipeline is within the bounds, and enters it into the table of the run.

    eager stands beside diffusers, every other engine beside eager.
    """

    def __call__(self, pipeline: str, found: tuple[float, float], engine: str = "eager") -> None: ...


@dataclass(frozen=True)
class Trace:
    """Latents after every step, and the picture [N, H, W, C] in 0..1."""

    latents: list[NDArray[Any]]
    images: NDArray[Any]


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@functools.cache
def _opened(kind: str, folder: Path) -> tuple[Any, Any]:
    """diffusers' pipeline and its own scheduler; loading takes longer than a picture."""
    silent = {} if "XL" in kind else {"safety_checker": None}
    pipe = getattr(diffusers, kind).from_pretrained(folder, **silent)
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe.scheduler


def original(kind: str, folder: Path) -> Any:
    """diffusers' pipeline with its own scheduler, whatever an earlier comparison put in its place."""
    pipe, pipe.scheduler = _opened(kind, folder)
    return pipe


def generator(seeds: Sequence[int] | int) -> Any:
    """One generator for all pictures, or one for each."""
    return generators([seeds])[0] if isinstance(seeds, int) else generators(seeds)


def reference(
    folder: Path,
    scheduler: type | None,
    seeds: Sequence[int] | int,
    kind: str = "StableDiffusionPipeline",
    options: dict[str, Any] | None = None,
    **call: Any,
) -> Trace:
    """diffusers' pictures; `options` replace entries of the scheduler's configuration."""
    pipe = original(kind, folder)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler.__name__).from_config(pipe.scheduler.config, **(options or {}))
    latents: list[NDArray[Any]] = []

    def keep(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"].numpy().copy())
        return {}

    images = pipe(generator=generator(seeds), output_type="np", callback_on_step_end=keep, **call).images
    return Trace(latents, images)


def listened(kind: str, folder: Path, seeds: Sequence[int], given: dict[str, Any] | None = None, **call: Any) -> Trace:
    """Pictures of a diffusers pipeline that hands out no steps: its scheduler is listened to.

    `given` are components that the folder lacks.
    """
    pipe = getattr(diffusers, kind).from_pretrained(folder, **(given or {}))
    pipe.set_progress_bar_config(disable=True)
    latents, step = [], pipe.scheduler.step

    @functools.wraps(step)
    def listening(*arguments: Any, **named: Any) -> Any:
        output = step(*arguments, **named)
        latents.append(output[0][: len(seeds)].numpy().copy())
        return output

    pipe.scheduler.step = listening
    return Trace(latents, pipe(generator=generator(seeds), output_type="np", **call).images)


def ours(pipe: Any, seeds: Sequence[int] | int, **call: Any) -> Trace:
    """Our pictures from the same generators."""
    latents = []
    for state in pipe.steps(generator=generator(seeds), **call):
        latents.append(to_numpy(state.latents).copy())
        last = state
    return Trace(latents, last.preview("np"))


def relative(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Relative L2 difference."""
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


def worst(a: Trace, b: Trace) -> tuple[float, float]:
    """Largest relative L2 difference of the latents after any step, and of any pixel."""
    assert len(a.latents) == len(b.latents)
    steps = [relative(x, y) for x, y in zip(a.latents, b.latents, strict=True)]
    return max(steps), float(np.abs(a.images - b.images).max())
