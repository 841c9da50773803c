"""`anamorph compare`: one prompt by several samplers and numbers of steps, beside a reference of many steps."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anamorph.arrays import to_numpy
from anamorph.cli import OK
from anamorph.cli.common import load_pipeline, scale_of, scheduler_class
from anamorph.cli.generate import size
from anamorph.errors import InputError
from anamorph.files import replacing
from anamorph.pipelines import LatentDiffusion
from anamorph.plot import log_plot
from anamorph.progress import Bar
from anamorph.schedulers import Scheduler
from anamorph.schedulers.configuration import carried
from anamorph.sheet import PAPER, Row, contact_sheet

REFERENCE = "DDIMScheduler"
"""Deterministic, and on all training timesteps the same as any other sampler without noise of its own."""


@dataclass(frozen=True)
class Sample:
    """One picture of the sheet."""

    scheduler: str
    steps: int
    calls: int
    distance: float
    picture: Image.Image


def run(options: argparse.Namespace) -> int:
    """Draw everything, then write the sheet with the plot below it."""
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {options.out} does not end in .png")
    steps = _numbers(options.steps)
    pipe = load_pipeline(options.model, options)
    # Latents have no bounds: where the checkpoint says nothing of clipping, defaults made for pixels must not count.
    config = {"clip_sample": False, **carried(pipe.scheduler.config, {}, {})}
    names = [name.strip() for name in options.schedulers.split(",")]
    schedulers = {name.removesuffix("Scheduler"): scheduler_class(name, config) for name in names}
    guidance = scale_of(pipe, options)
    reference, samples = _draw(pipe, options, guidance, schedulers, steps)
    sheet = _sheet(options, guidance, list(schedulers), steps, reference, samples)
    with replacing(out) as draft:
        sheet.save(draft, "PNG")
    if options.json:
        rows = [{"scheduler": s.scheduler, "steps": s.steps, "calls": s.calls, "distance": s.distance} for s in samples]
        print(json.dumps({"file": str(out), "reference_steps": options.reference_steps, "samples": rows}, indent=2))
        return OK
    width = max(map(len, schedulers))
    print(f"{'distance to the reference':<{width}}  " + "  ".join(f"{n:>3} steps" for n in steps))
    for name in schedulers:
        found = "  ".join(f"{s.distance:>9.4f}" for s in samples if s.scheduler == name)
        print(f"{name:<{max(width, 25)}}  {found}")
    print(out)
    return OK


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--steps {text!r} is no list of whole numbers like 4,8,16,32")
    return sorted({int(part) for part in parts})


def _draw(
    pipe: LatentDiffusion,
    options: argparse.Namespace,
    guidance: float,
    schedulers: dict[str, Scheduler],
    steps: list[int],
) -> tuple[Image.Image, list[Sample]]:
    """The picture of the reference, and those of all schedulers."""
    reference = scheduler_class(REFERENCE, {**pipe.scheduler.config, "clip_sample": False, "thresholding": False})
    height, width = size(options.size)
    call: dict[str, Any] = {
        "guidance_scale": guidance,
        "height": height, "width": width, "seed": options.seed, "output_type": "latent",
    }  # fmt: skip

    def latents(scheduler: Scheduler, count: int) -> NDArray[Any]:
        pipe.scheduler = scheduler
        return to_numpy(pipe(options.prompt, num_inference_steps=count, **call).images).astype(np.float64)

    # Every combination is checked before the first is drawn.
    calls = {(name, count): len(kind.table(count)) for name, kind in schedulers.items() for count in steps}
    samples = []
    pipe.set_progress_bar_config(disable=True)
    with Bar(len(calls) + 1, f"reference, {options.reference_steps} steps") as bar:
        goal = latents(reference, options.reference_steps)
        for (name, count), number in calls.items():
            bar.advance(f"{name}, {count} steps")
            found = latents(schedulers[name], count)
            distance = float(np.linalg.norm(found - goal) / np.linalg.norm(goal))
            picture = pipe.decode(found.astype(np.float32))[0]
            samples.append(Sample(name, count, number, distance, picture))
        bar.advance()
    return pipe.decode(goal.astype(np.float32))[0], samples


def _sheet(
    options: argparse.Namespace,
    guidance: float,
    names: list[str],
    steps: list[int],
    reference: Image.Image,
    samples: list[Sample],
) -> Image.Image:
    """The pictures, each row ending with the reference to hold them against, and the plot below."""
    rows = []
    for name in names:
        own = [sample for sample in samples if sample.scheduler == name]
        twice = "two calls per step" if own[-1].calls > own[-1].steps else "one call per step"
        rows.append(Row(name, twice, [*(sample.picture for sample in own), reference]))
    pictures = contact_sheet(
        f"“{options.prompt}”",
        f"seed {options.seed}, guidance {guidance:g}; the reference is DDIM with {options.reference_steps} steps",
        [*(f"{count} steps" for count in steps), "reference"], rows,
        picture_size=128 if len(steps) > 2 else 160,
    )  # fmt: skip
    series = {name: [(s.calls, max(s.distance, 1e-6)) for s in samples if s.scheduler == name] for name in names}
    width = max(pictures.width, 900)
    plot = log_plot(
        "How close they come",
        f"relative L2 distance of the latents to {options.reference_steps} steps of DDIM; "
        "samplers that add noise of their own find other pictures",
        ("calls of the denoiser", "distance"),
        series,
        (width, 460),
    )
    whole = Image.new("RGB", (width, pictures.height + plot.height), PAPER)
    whole.paste(pictures, (0, 0))
    whole.paste(plot, (0, pictures.height))
    return whole
