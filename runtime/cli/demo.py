"""`anamorph demo`: the bundled model on every engine that is available here, side by side."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anamorph.cli import OK
from anamorph.components import CHECKPOINT
from anamorph.engine import Backend
from anamorph.errors import BackendError
from anamorph.files import replacing
from anamorph.guard import missing, places_here
from anamorph.image import psnr
from anamorph.pipelines import StableDiffusionPipeline
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.plugins import get_exporter, list_backends
from anamorph.progress import Bar
from anamorph.sheet import Row, contact_sheet

PROMPTS = ("red apple", "yellow heart", "soccer ball", "grinning face", "sunflower", "rocket", "crescent moon",
           "cat face", "birthday cake", "umbrella", "evergreen tree", "cooking")  # fmt: skip
GUIDANCE, SEED = 4.0, 0
REFERENCE = ("eager", "float32")


@dataclass(frozen=True)
class Arm:
    """One engine in one precision: seconds to load, for the first and the next batch of pictures, and the result."""

    engine: str
    precision: str
    load: float
    first: float
    following: float
    pictures: NDArray[np.float32]
    psnr: float


LEFT_OUT = {
    "aotinductor": "a C++ compiler takes minutes for its export; `anamorph export bundled OUT --to aotinductor`"
}
"""Engine -> why it is not shown, though it could be."""


def arms() -> list[tuple[Backend, str]]:
    """Every available engine in each precision that it serves on its first device, the reference first."""
    real = [b for b in list_backends().values() if not b.double and unable(b) is None]
    pairs = [(b, precision) for b in real for precision in next(iter(places_here(b).values()))]
    return sorted(pairs, key=lambda pair: (pair[0].name, pair[1]) != REFERENCE)


def unable(backend: Backend) -> str | None:
    """None, or why this engine is not shown here: itself or its exporter is not there, or it takes too long."""
    if (reason := missing(backend)) is not None or CHECKPOINT in backend.formats:
        return reason
    if backend.name in LEFT_OUT:
        return LEFT_OUT[backend.name]
    try:
        get_exporter(backend.formats)
    except BackendError as error:
        return str(error)
    return None


def measure(backend: Backend, precision: str, steps: int, reference: NDArray[np.float32] | None) -> Arm:
    """Load, generate twice, compare with the reference."""
    clock = [time.perf_counter()]
    pipe = DiffusionPipeline.from_pretrained(backend=backend.name, torch_dtype=precision)
    assert isinstance(pipe, StableDiffusionPipeline)
    pipe.set_progress_bar_config(disable=True)
    clock.append(time.perf_counter())
    for _ in range(2):
        result = pipe(
            list(PROMPTS),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            seed=[SEED] * len(PROMPTS),
            output_type="np",
        )
        clock.append(time.perf_counter())
    pictures: NDArray[np.float32] = result.images
    close = float("inf") if reference is None else psnr(reference, pictures)
    load, first, following = np.diff(clock)
    return Arm(backend.name, precision, load, first, following, pictures, close)


def run(options: argparse.Namespace) -> int:
    """Measure every arm, print the table, write the contact sheet."""
    todo = arms()
    if not todo:
        raise BackendError("no engine is available; run: pip install 'anamorph[torch]'")
    width = max(len(backend.name) for backend, _ in todo)
    if not options.json:
        print(f"{len(PROMPTS)} prompts, {options.steps} steps, guidance {GUIDANCE:g}, seed {SEED}, one batch\n")
        print(f"{'engine':<{width}}  precision  load s  first batch s  next batch s  s/image  PSNR vs eager")
    done: list[Arm] = []
    for arm in _measured(todo, options.steps):
        done.append(arm)
        if not options.json:
            print(line(arm, width), flush=True)
    if not options.json:
        for backend in list_backends().values():
            if not backend.double and (reason := unable(backend)) is not None:
                print(f"{backend.name:<{width}}  not run: {reason}")
    sheet = draw(done, options.steps)
    with replacing(Path(options.out)) as draft:
        sheet.save(draft, format="PNG")
    if options.json:
        print(json.dumps([as_row(arm) for arm in done], indent=2))
    else:
        print(f"\n{options.out}")
    return OK


def _measured(todo: list[tuple[Backend, str]], steps: int) -> Iterator[Arm]:
    reference: NDArray[np.float32] | None = None
    titles = [f"{backend.name} in {precision}" for backend, precision in todo]
    with Bar(len(todo), titles[0]) as bar:
        for index, (backend, precision) in enumerate(todo, 1):
            arm = measure(backend, precision, steps, reference)
            reference = arm.pictures if reference is None else reference
            bar.advance(titles[index] if index < len(todo) else None)
            yield arm


def line(arm: Arm, width: int) -> str:
    """One row of the table; it begins with the engine's name."""
    close = "reference" if (arm.engine, arm.precision) == REFERENCE else closeness(arm.psnr)
    return (
        f"{arm.engine:<{width}}  {arm.precision:<9}  {arm.load:6.2f}  {arm.first:13.2f}  {arm.following:12.2f}"
        f"  {arm.following / len(PROMPTS):7.3f}  {close}"
    )


def closeness(decibel: float) -> str:
    """A PSNR for people."""
    return f"{decibel:.1f} dB" if np.isfinite(decibel) else "identical"


def as_row(arm: Arm) -> dict[str, str | float | None]:
    """One row of the table as plain JSON types; no PSNR where the pictures are identical."""
    return {
        "engine": arm.engine,
        "precision": arm.precision,
        "load_s": round(arm.load, 3),
        "first_batch_s": round(arm.first, 3),
        "next_batch_s": round(arm.following, 3),
        "images": len(PROMPTS),
        "psnr_db": round(arm.psnr, 2) if np.isfinite(arm.psnr) else None,
    }


def draw(done: list[Arm], steps: int) -> Image.Image:
    """The contact sheet: a row per arm, a column per prompt."""
    rows = []
    for arm in done:
        note = f"{arm.precision}\n{arm.following / len(PROMPTS):.2f} s an image"
        if (arm.engine, arm.precision) != REFERENCE:
            note += f"\n{closeness(arm.psnr)}"
        pictures = [Image.fromarray((picture * 255).round().astype(np.uint8)) for picture in arm.pictures]
        rows.append(Row(arm.engine, note, pictures))
    subtitle = f"one checkpoint, the same seed on every engine ({steps} steps)"
    return contact_sheet("Anamorph", subtitle, PROMPTS, rows)
