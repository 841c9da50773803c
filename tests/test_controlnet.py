"""ControlNets: every task with diffusers' pictures, and nets that are called no oftener than they must be."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import tiny_controlnet
from exported import once, shared_place
from parity import Agrees, ours, reference, worst
from PIL import Image

import anamorph


def picture(seed: int, height: int, width: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def mask(height: int, width: int) -> Image.Image:
    values = np.zeros((height, width), np.uint8)
    values[height // 4 :, width // 2 :] = 255
    return Image.fromarray(values)


CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 5}
TURNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weak": {"controlnet_conditioning_scale": 0.3},
    "guessing": {"guess_mode": True, "guidance_scale": 4.0},
    "interval": {"control_guidance_start": 0.3, "control_guidance_end": 0.8},
    "unguided": {"guidance_scale": 1.0, "guess_mode": True},
    "resized": {"height": 24, "width": 16},
    "prompts": {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2},
}


def compared(folder: Path, kind: str, agrees: Agrees, seeds: Any = 0, **call: Any) -> None:
    pipe = getattr(anamorph, kind).from_pretrained(folder, backend="eager")
    agrees(kind, worst(ours(pipe, seeds, **call), reference(folder, None, seeds, kind, **call)))


@pytest.mark.parametrize("turn", TURNS)
def test_a_picture_is_followed_as_in_diffusers(turn: str, controlled_sd2: Path, agrees: Agrees) -> None:
    call = {**CALL, "image": picture(0, 16, 24), **TURNS[turn]}
    compared(controlled_sd2, "StableDiffusionControlNetPipeline", agrees, **call)


@pytest.mark.parametrize("turn", [
    {}, {"controlnet_conditioning_scale": [0.4, 1.2], "control_guidance_end": [0.5, 1.0]}, {"guess_mode": True},
    {"prompt": ["a cat", "a dog"], "image": [[picture(1, 64, 48), picture(2, 64, 48)],
                                             [picture(3, 64, 48), picture(4, 64, 48)]]},
])  # fmt: skip
def test_several_pictures_are_followed(turn: dict[str, Any], controlled_sd1: Path, agrees: Agrees) -> None:
    call = {**CALL, "num_inference_steps": 3, "image": [picture(1, 64, 48), picture(2, 64, 48)], **turn}
    compared(controlled_sd1, "StableDiffusionControlNetPipeline", agrees, **call)


IMG2IMG: dict[str, Any] = {"image": picture(5, 16, 24), "control_image": picture(6, 16, 24), "strength": 0.7}
MASKED: dict[str, Any] = {**IMG2IMG, "mask_image": mask(16, 24), "strength": 1.0}


@pytest.mark.parametrize(("kind", "call"), [
    ("StableDiffusionControlNetImg2ImgPipeline", IMG2IMG),
    ("StableDiffusionControlNetImg2ImgPipeline", {**IMG2IMG, "height": 24, "width": 16, "guess_mode": True}),
    ("StableDiffusionControlNetInpaintPipeline", MASKED),
    ("StableDiffusionControlNetInpaintPipeline", {**MASKED, "strength": 0.6, "control_guidance_end": 0.7}),
])  # fmt: skip
def test_pictures_are_changed_along_others(
    kind: str, call: dict[str, Any], controlled_sd2: Path, agrees: Agrees
) -> None:
    compared(controlled_sd2, kind, agrees, **CALL, **call)


@pytest.mark.parametrize(("kind", "call"), [
    ("StableDiffusionXLControlNetPipeline", {"image": picture(0, 16, 24)}),
    ("StableDiffusionXLControlNetPipeline", {"image": picture(0, 16, 24), "guess_mode": True, "denoising_end": 0.7,
                                             "control_guidance_end": 0.5}),
    ("StableDiffusionXLControlNetImg2ImgPipeline", IMG2IMG),
    ("StableDiffusionXLControlNetInpaintPipeline", {**MASKED, "strength": 0.9}),
])  # fmt: skip
def test_so_does_sdxl(kind: str, call: dict[str, Any], controlled_xl: Path, agrees: Agrees) -> None:
    compared(controlled_xl, kind, agrees, **CALL, **call)


def test_a_model_for_inpainting_follows_a_picture(inpaint: Path, agrees: Agrees) -> None:
    def make(place: Path) -> None:
        net = tiny_controlnet(inpaint / "unet", 3, 20)  # nets see the latents alone
        diffusers.StableDiffusionControlNetInpaintPipeline.from_pretrained(
            inpaint, controlnet=net, safety_checker=None
        ).save_pretrained(place)

    folder = once(shared_place() / "controlled-inpaint", make)
    call = {"image": picture(5, 64, 64), "mask_image": mask(64, 64), "control_image": picture(6, 64, 64)}
    call |= {"padding_mask_crop": 4, "height": 64, "width": 64}
    pipe: Any = anamorph.StableDiffusionControlNetInpaintPipeline.from_pretrained(folder, backend="eager")
    theirs: Any = diffusers.StableDiffusionControlNetInpaintPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    pictures = [
        np.asarray(one(**CALL, **call, generator=torch.Generator().manual_seed(0)).images[0], np.float32)
        for one in (pipe, theirs)
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1.0  # of 255, rounded
    del call["padding_mask_crop"]
    compared(folder, "StableDiffusionControlNetInpaintPipeline", agrees, **CALL, **call)
