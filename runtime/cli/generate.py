"""`anamorph generate`: prompts to PNG files."""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from anamorph.cli import OK
from anamorph.cli.common import numbered, open_pipeline, record, scale_of, scheduler_class, single
from anamorph.cli.sources import drawing, read_sources, task_of
from anamorph.errors import InputError
from anamorph.image import write_png


def size(text: str | None) -> tuple[int | None, int | None]:
    """`512x768` -> (512, 768), height first.

    Raises InputError: the text is of another form.
    """
    if text is None:
        return None, None
    if not (match := re.fullmatch(r"(\d+)x(\d+)", text)):
        raise InputError(f"--size {text!r} is not of the form HxW, such as 512x768")
    return int(match[1]), int(match[2])


def run(options: argparse.Namespace) -> int:
    """Make the pictures and write each with its own request."""
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {options.out} does not end in .png; the request is recorded in PNG files only")
    height, width = size(options.size)
    kind = task_of(options)
    pictures, inputs = read_sources(options)
    started = time.perf_counter()
    pipe = drawing(open_pipeline(kind, options.model, options, options.variant))
    loaded = time.perf_counter()
    if options.scheduler:
        pipe.scheduler = scheduler_class(options.scheduler, pipe.scheduler.config)
    given: dict[str, Any] = {"height": height, "width": width, "strength": options.strength, **pictures}
    job = pipe.job(
        options.prompt,
        **{name: value for name, value in given.items() if value is not None},
        negative_prompt=options.negative,
        num_inference_steps=options.steps,
        guidance_scale=scale_of(pipe, options),
        num_images_per_prompt=options.count,
        seed=options.seed,
    )
    images = pipe.generate(job)
    finished = time.perf_counter()
    digest = pipe.origin.digest() if pipe.origin else ""
    made = []
    for index, image in enumerate(images):
        request = single(job.request, index)
        path = numbered(out, index, len(images))
        write_png(image, path, record(pipe, request, digest, inputs))
        made.append({"file": str(path), "prompt": request.prompt[0], "seed": (request.seeds or (None,))[0]})
    placement = [str(placed) for placed in pipe.placement.values()]
    if options.json:
        seconds = {"load": round(loaded - started, 3), "generate": round(finished - loaded, 3)}
        print(json.dumps({"images": made, "placement": placement, "seconds": seconds}, indent=2))
        return OK
    for row in made:
        print(f"{row['file']}  {row['prompt']!r}  seed {row['seed']}")
    print(f"loaded in {loaded - started:.1f} s, generated in {finished - loaded:.1f} s; " + "; ".join(placement))
    return OK
