"""`anamorph replay`: make a picture again from what its PNG recorded."""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anamorph.cli import DIFFERENT, OK, ip_adapters, loras
from anamorph.cli.common import SCHEMA, open_pipeline, record
from anamorph.cli.controls import check_same, controls_of, nets_of
from anamorph.cli.sources import same_sources
from anamorph.errors import InputError
from anamorph.image import psnr, read_request, write_png
from anamorph.pipelines import DiffusionPipeline
from anamorph.pipelines.arguments import Job
from anamorph.pipelines.request import Request
from anamorph.schedulers import load_scheduler


def recorded(path: Path) -> dict[str, Any]:
    """What the PNG carries, checked for what a replay needs.

    Raises InputError: it was made by a newer version, is incomplete, or cannot be repeated.
    """
    values = read_request(path)
    if not isinstance(schema := values.get("schema"), int) or schema > SCHEMA:
        raise InputError(f"{path} has request schema {schema!r}, this version reads up to {SCHEMA}; update anamorph")
    for key in ("request", "model", "scheduler", "backends", "engines", "inputs"):
        if not isinstance(values.get(key), dict):
            raise InputError(f"{path} has an incomplete request: no {key}")
    if not isinstance(values.get("rewrites", ""), str):
        raise InputError(f"{path} has a damaged request: rewrites are {values['rewrites']!r}, expected names")
    if values.get("pipeline") not in list(DiffusionPipeline.registry):
        known = ", ".join(DiffusionPipeline.registry)
        raise InputError(f"{path} was made by {values.get('pipeline')!r}, which is none of {known}")
    if values["request"].get("seeds") is None:
        raise InputError(f"{path} was made from noise that the caller brought; only seeded pictures can be replayed")
    return values


def job_of(pipe: DiffusionPipeline, values: dict[str, Any], pictures: dict[str, Any]) -> Job:
    """The recorded request as a job, checked like any call: a PNG may come from a stranger.

    Raises InputError: an entry is unknown, missing, or of a wrong type or range.
    """
    known = {field.name for field in fields(Request)}
    # What the pipeline does not take follows from the rest, such as the size from a picture.
    implied = {key for key in values if key in known - {"seeds"} and key not in pipe.TAKES.all}
    named = {"seed" if key == "seeds" else key: value for key, value in values.items() if key not in implied}
    try:
        job = pipe.job(**(named | pictures))
    except TypeError as error:
        raise InputError(f"the recorded request is damaged: {error}") from None
    found = job.request.to_dict()
    if other := [key for key in sorted(implied) if found.get(key) != values[key]]:
        raise InputError(
            f"the recorded request is damaged: {other[0]} is {values[other[0]]!r}, but {type(pipe).__name__} makes "
            f"{found.get(other[0])!r} of the rest"
        )
    return job


def run(options: argparse.Namespace) -> int:
    """Generate again and compare with the picture."""
    path = Path(options.picture)
    values = recorded(path)
    if options.backend is None:
        options.backend = ",".join(f"{part}={engine}" for part, engine in values["backends"].items())
        if options.model is None:
            options.rewrites = options.rewrites or values.get("rewrites")
    recorded_inputs = dict(values["inputs"])
    controls = recorded_inputs.pop("controls", [])
    nets = nets_of(options, recorded_inputs.pop("nets", None))
    pictures = same_sources(recorded_inputs, options, path)
    looks, looked = ip_adapters.read(options)
    ip_adapters.check_same(recorded_inputs, looked, path)
    chosen, mode = loras.recorded(values, options, path)
    kind = DiffusionPipeline.registry[values["pipeline"]]
    pipe = open_pipeline(kind, options.model or values["model"].get("name"), options, **nets.components)
    followed, found = controls_of(pipe, nets, options)
    check_same(controls, found, path)
    digest = pipe.origin.digest() if pipe.origin else ""
    if digest != values["model"].get("sha256"):
        raise InputError(
            f"{path} was made with another model (SHA-256 {str(values['model'].get('sha256'))[:12]}..., "
            f"{pipe.origin.folder if pipe.origin else 'this one'} has {digest[:12]}...); name it with --model"
        )
    pipe.scheduler = load_scheduler(values["scheduler"])
    changed = loras.load(pipe, chosen, mode)
    ip_adapters.load(pipe, options)
    job = job_of(pipe, {**values["request"]}, {**pictures, **followed, **looks})
    image = pipe.generate(job)[0]
    out = Path(options.out) if options.out else path.with_name(f"{path.stem}-replay.png")
    write_png(image, out, record(pipe, job.request, digest, values["inputs"], changed))
    closeness, largest = _compared(path, image)
    _say(out, closeness, largest, pipe, values, as_json=options.json)
    return DIFFERENT if options.min_psnr is not None and closeness < options.min_psnr else OK


def _compared(path: Path, image: Image.Image) -> tuple[float, int]:
    """PSNR in dB, and the largest difference of a value of 8 bits."""
    with Image.open(path) as original:
        before = np.asarray(original.convert("RGB"), np.float32) / 255
    after = np.asarray(image.convert("RGB"), np.float32) / 255
    return psnr(before, after), round(float(np.abs(before - after).max()) * 255)


def _say(
    out: Path, closeness: float, largest: int, pipe: DiffusionPipeline, values: dict[str, Any], *, as_json: bool
) -> None:
    engines = [str(placed) for placed in pipe.placement.values()]
    if as_json:
        # JSON has no infinity: an exact repetition has no PSNR.
        exact = not np.isfinite(closeness)
        result = {"file": str(out), "identical": exact, "psnr_db": None if exact else closeness, "engines": engines}
        print(json.dumps({**result, "largest_difference": largest}, indent=2))
        return
    same = "identical to the picture" if largest == 0 else f"PSNR {closeness:.1f} dB, largest difference {largest}/255"
    before_it, now = values["engines"].get(pipe.DENOISER), pipe.placement[pipe.DENOISER]
    print(f"{out}  {same}\nmade by {before_it}; replayed by {now}")
