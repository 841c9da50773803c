"""`anamorph generate`: prompts to PNG files."""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from anamorph.checkpoint import Source, open_checkpoint
from anamorph.cli import OK, ip_adapters, loras
from anamorph.cli.common import folder_of, numbered, open_pipeline, record, scale_of, scheduler_class, single
from anamorph.cli.controls import controls_of, nets_of
from anamorph.cli.sources import FILES, check_sources, class_for, read_sources, spelled
from anamorph.errors import InputError
from anamorph.image import write_png
from anamorph.pipelines import DiffusionPipeline, DiTPipeline
from anamorph.pipelines.request import Request

STEPS, USUAL_STEPS = 20, 50
"""Steps where a pipeline's own default is the usual one, which is meant for older schedulers."""
PLAIN = {
    "negative_prompt": "negative", "prompt_2": "prompt_2", "negative_prompt_2": "negative_2",
    "guidance_scale": "guidance", "image_guidance_scale": "image_guidance", "noise_level": "noise_level",
    "strength": "strength", "class_labels": "class_label", "guidance_interval": "guidance_interval",
    "step_caching": "step_caching",
}  # fmt: skip
"""Argument of a pipeline -> option of the command line."""


def size(text: str | None) -> tuple[int | None, int | None]:
    """`512x768` -> (512, 768), height first.

    Raises InputError: the text is of another form.
    """
    if text is None:
        return None, None
    if not (match := re.fullmatch(r"(\d+)x(\d+)", text)):
        raise InputError(f"--size {text!r} is not of the form HxW, such as 512x768")
    return int(match[1]), int(match[2])


def arguments_of(pipe: DiffusionPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """The options as arguments of a call.

    Raises InputError: the pipeline does not take one, or needs one that is missing.
    """
    taken = pipe.TAKES.all
    height, width = size(options.size)
    given = {argument: getattr(options, option) for argument, option in PLAIN.items()}
    given |= {"height": height, "width": width, "prompt": options.prompt or None}
    for argument, option in {**PLAIN, **FILES, "height": "size", "prompt": "prompt"}.items():
        if argument not in taken and (given.get(argument) or getattr(options, option) or None) is not None:
            known = sorted(f"--{spelled(one)}" for name, one in {**PLAIN, **FILES}.items() if name in taken)
            what = "a prompt" if option == "prompt" else f"--{spelled(option)}"
            raise InputError(f"{what} does not go with {type(pipe).__name__}, which takes {', '.join(known)}")
    if "prompt" in taken and not options.prompt:
        raise InputError(f"the prompt is missing; {type(pipe).__name__} draws what a text says")
    given["num_inference_steps"] = steps_of(pipe, options)
    if "guidance_scale" in taken:
        given["guidance_scale"] = scale_of(pipe, options)
    given |= {"seed": options.seed, **_counted(pipe, options)}
    return {name: value for name, value in given.items() if value is not None}


def steps_of(pipe: DiffusionPipeline, options: argparse.Namespace) -> int:
    """The steps that were asked for, or 20, or what the pipeline says where that is not the usual 50."""
    own: int = pipe.TAKES.default("num_inference_steps")
    if options.steps is not None:
        return int(options.steps)
    return STEPS if own == USUAL_STEPS else own


def _counted(pipe: DiffusionPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """How many pictures, in the words of the pipeline; raises InputError where it makes one at a time."""
    if "class_labels" in pipe.TAKES.all:
        labels = [_label(pipe, label) for label in options.class_label or ()]
        return {"class_labels": [label for label in labels for _ in range(options.count)] or None}
    for name in ("num_images_per_prompt", "batch_size"):
        if name in pipe.TAKES.all:
            return {name: options.count}
    if options.count != 1:
        raise InputError(f"--count does not go with {type(pipe).__name__}, which makes one picture of each prompt")
    return {}


def _label(pipe: DiffusionPipeline, label: str) -> int:
    if label.isdecimal():
        return int(label)
    if not isinstance(pipe, DiTPipeline):
        raise InputError(f"--class-label {label!r} is no whole number")
    return pipe.get_label_ids(label)[0]


def subject(pipe: DiffusionPipeline, request: Request) -> str:
    """What one picture shows, in few words."""
    if request.class_labels is not None:
        return f"class {request.class_labels[0]}"
    return request.prompt[0] if "prompt" in pipe.TAKES.all else ""


def run(options: argparse.Namespace) -> int:
    """Make the pictures and write each with its own request."""
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {options.out} does not end in .png; the request is recorded in PNG files only")
    size(options.size)
    check_sources(options)
    pictures, inputs = read_sources(options)
    looks, looked = ip_adapters.read(options)
    chosen = loras.named(options.lora)
    started = time.perf_counter()
    folder = folder_of(options.model)
    checkpoint = open_checkpoint(Source(folder, variant=options.variant))
    nets = nets_of(options)
    kind = nets.pipeline(class_for(checkpoint.class_name, options), checkpoint.class_name)
    pipe = open_pipeline(kind, folder, options, options.variant, **nets.components)
    followed, controls = controls_of(pipe, nets, options)
    changed = loras.load(pipe, chosen, options.lora_mode)
    ip_adapters.load(pipe, options)
    loaded = time.perf_counter()
    if options.scheduler:
        pipe.scheduler = scheduler_class(options.scheduler, pipe.scheduler.config)
    job = pipe.job(**arguments_of(pipe, options), **pictures, **followed, **looks)
    images = pipe.generate(job)
    finished = time.perf_counter()
    digest = pipe.origin.digest() if pipe.origin else ""
    made = []
    recorded = {**inputs, **looked, **({"controls": controls, "nets": nets.record()} if controls else {})}
    for index, image in enumerate(images):
        request = single(job.request, index)
        path = numbered(out, index, len(images))
        write_png(image, path, record(pipe, request, digest, recorded, changed))
        made.append({"file": str(path), "prompt": subject(pipe, request), "seed": (request.seeds or (None,))[0]})
    placement = [str(placed) for placed in pipe.placement.values()]
    history = {part: list(placed.history) for part, placed in pipe.placement.items()} if options.explain else None
    if options.json:
        seconds = {"load": round(loaded - started, 3), "generate": round(finished - loaded, 3)}
        told = {} if history is None else {"history": history}
        print(json.dumps({"images": made, "placement": placement, "seconds": seconds, **told}, indent=2))
        return OK
    for row in made:
        print(f"{row['file']}  {row['prompt']!r}  seed {row['seed']}")
    for part, lines in (history or {}).items():
        print("".join(f"{part}: {line}\n" for line in lines or ["nothing is compiled for sizes"]), end="")
    print(f"loaded in {loaded - started:.1f} s, generated in {finished - loaded:.1f} s; " + "; ".join(placement))
    return OK
