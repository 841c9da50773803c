"""Pictures as prompts (IP-Adapter): every kind of adapter and call, beside diffusers."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from exported import once, shared_place
from ip_adapters import VISION, adapters, random, state, write
from parity import Agrees, Trace, generator, ours, worst
from pictures import load, mask, opened, picture
from PIL import Image

import anamorph
from anamorph import DiffusionPipeline
from anamorph.errors import AnamorphError, CheckpointError, InputError
from anamorph.image_processor import IPAdapterMaskProcessor
from anamorph.pipelines.image_prompts import small_mask

CALL: dict[str, Any] = {
    "prompt": "a red cat", "negative_prompt": "blue", "num_inference_steps": 3, "guidance_scale": 5.0,
}  # fmt: skip
SIZE = {"height": 64, "width": 32}
LOOK = picture(20, 24)
NAMES = {"base": "base.safetensors", "plus": "plus.safetensors", "full": "full.bin"}
Setup = Callable[[Any], None]


def folder(checkpoint: Path) -> Path:
    """The adapters for a checkpoint."""
    return once(shared_place() / f"{checkpoint.name}-ip", functools.partial(adapters, checkpoint=checkpoint))


def nothing(pipe: Any) -> None:
    """Leave an adapter as it was loaded."""


def theirs(kind: str, checkpoint: Path, names: Any, setup: Setup, **call: Any) -> Trace:
    """diffusers' pictures with these adapters."""
    silent = {} if "XL" in kind or "XL" in checkpoint.name else {"safety_checker": None}
    pipe = getattr(diffusers, kind).from_pretrained(checkpoint, **silent)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(folder(checkpoint), subfolder="models", weight_name=names)
    setup(pipe)
    latents: list[Any] = []

    def keep(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"].numpy().copy())
        return {}

    images = pipe(generator=generator(3), output_type="np", callback_on_step_end=keep, **call).images
    return Trace(latents, images)


def mine(kind: str, checkpoint: Path, names: Any, setup: Setup, **call: Any) -> Trace:
    """Ours."""
    pipe = load(getattr(anamorph, kind), checkpoint)
    pipe.load_ip_adapter(folder(checkpoint), subfolder="models", weight_name=names)
    setup(pipe)
    found = ours(pipe, 3, **call)
    pipe.unload_ip_adapter()
    return found


def compare(checkpoint: Path, names: Any, setup: Setup = nothing, kind: str = "", **call: Any) -> tuple[float, float]:
    kind = kind or "StableDiffusionPipeline"
    both = (one(kind, checkpoint, names, setup, **{**CALL, **call}) for one in (mine, theirs))
    return worst(*both)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("images", [1, 2])
def test_every_kind_of_adapter_draws_as_diffusers_does(sd1: Path, name: str, images: int, agrees: Agrees) -> None:
    found = compare(sd1, NAMES[name], ip_adapter_image=LOOK, num_images_per_prompt=images, **SIZE)
    agrees(f"Stable Diffusion + IP-Adapter {name}", found)
