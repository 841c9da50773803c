"""Calls of SDXL's pipelines that tests compare."""

import functools
from pathlib import Path
from typing import Any

from parity import ours, reference, worst
from pictures import mask as any_mask
from pictures import picture as any_picture

import anamorph

TEXT, IMAGE, INPAINT = (f"StableDiffusionXL{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))
OPTIONS = {"skip_prk_steps": True, "clip_sample": False}
picture = functools.partial(any_picture, 16, 16)
mask = functools.partial(any_mask, 16, 16)


@functools.cache
def opened(folder: Path, kind: str) -> Any:
    return getattr(anamorph, kind).from_pretrained(folder, backend="eager")


def load(folder: Path, kind: str, scheduler: type | None = None) -> Any:
    pipe = opened(folder, kind)
    pipe = type(pipe)(**pipe.components, **pipe.options)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **OPTIONS)  # type: ignore[attr-defined]
    return pipe


def call(kind: str, **changes: Any) -> dict[str, Any]:
    """Two prompts."""
    sources = {TEXT: {}, IMAGE: {"image": picture(), "strength": 0.6},
               INPAINT: {"image": picture(), "mask_image": mask(), "height": 16, "width": 16}}[kind]  # fmt: skip
    return {"prompt": ["a red cat", "a photo of dogs"], "negative_prompt": ["", "blue"], "num_inference_steps": 5,
            "guidance_scale": 5.0, **sources, **changes}  # fmt: skip


def compare(
    folder: Path, kind: str, scheduler: type | None = None, seeds: Any = (3, 4), **changes: Any
) -> tuple[float, float]:
    arguments = call(kind, **changes)
    return worst(
        ours(load(folder, kind, scheduler), seeds, **arguments),
        reference(folder, scheduler, seeds, kind, OPTIONS, **arguments),
    )
