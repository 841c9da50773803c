"""Whole generations compared with diffusers, step by step, in float32."""

from pathlib import Path
from typing import Any

import pytest
from parity import IMAGE_BOUND, LATENT_BOUND, Agrees, ours, reference, worst

import anamorph
from anamorph import DiffusionPipeline
from anamorph.checkpoint import BUNDLED

KIND = "StableDiffusionPipeline"
SCHEDULERS = [
    anamorph.DDIMScheduler,
    anamorph.DDPMScheduler,
    anamorph.PNDMScheduler,
    anamorph.EulerDiscreteScheduler,
    anamorph.EulerAncestralDiscreteScheduler,
    anamorph.DPMSolverMultistepScheduler,
]

CALL: dict[str, Any] = {
    "prompt": ["a red cat", "a photo of dogs"],
    "negative_prompt": ["", "blue"],
    "num_inference_steps": 20,
}


def compare(folder: Path, scheduler: type | None = None, **changes: Any) -> tuple[float, float]:
    call = {**CALL, "guidance_scale": 5.0, **changes}
    pipe = DiffusionPipeline.from_pretrained(folder, backend="eager")
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    return worst(ours(pipe, (3, 4), **call), reference(folder, scheduler, (3, 4), **call))


@pytest.mark.parametrize("name", ["sd1", "sd2", "bundled"])
def test_twenty_steps_equal_diffusers(agrees: Agrees, name: str, request: pytest.FixtureRequest) -> None:
    folder = BUNDLED if name == "bundled" else request.getfixturevalue(name)
    agrees(KIND, compare(folder))


def test_the_comparison_notices_a_slightly_different_guidance(sd1: Path) -> None:
    call = {**CALL, "guidance_scale": 5.0}
    pipe = DiffusionPipeline.from_pretrained(sd1, backend="eager")
    latents, pixels = worst(
        ours(pipe, (3, 4), **{**call, "guidance_scale": 5.01}), reference(sd1, None, (3, 4), **call)
    )
    assert latents > LATENT_BOUND
    assert pixels > IMAGE_BOUND


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: scheduler.__name__)
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_every_scheduler_equals_diffusers(
    agrees: Agrees, name: str, scheduler: type, request: pytest.FixtureRequest
) -> None:
    agrees(KIND, compare(request.getfixturevalue(name), scheduler, num_inference_steps=8))


@pytest.mark.parametrize(("height", "width"), [(40, 72), (104, 24), (8, 64)])
def test_sizes_that_the_levels_do_not_divide_equal_diffusers(
    agrees: Agrees, sd1: Path, height: int, width: int
) -> None:
    agrees(KIND, compare(sd1, num_inference_steps=4, height=height, width=width))


def test_no_guidance_runs_one_branch_and_equals_diffusers(agrees: Agrees, sd1: Path) -> None:
    agrees(KIND, compare(sd1, num_inference_steps=4, guidance_scale=1.0))


def test_ddim_with_noise_equals_diffusers(agrees: Agrees, sd1: Path) -> None:
    agrees(KIND, compare(sd1, anamorph.DDIMScheduler, num_inference_steps=6, eta=0.7))


def test_several_pictures_of_one_prompt_equal_diffusers(agrees: Agrees, sd1: Path) -> None:
    agrees(KIND, compare(sd1, prompt="a cat", negative_prompt=None, num_inference_steps=3, num_images_per_prompt=2))


def test_rescaled_guidance_equals_diffusers(agrees: Agrees, sd1: Path) -> None:
    agrees(KIND, compare(sd1, num_inference_steps=6, guidance_rescale=0.7))
