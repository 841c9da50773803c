"""Image to image, compared with diffusers step by step in float32, and what it refuses."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from parity import IMAGE_BOUND, LATENT_BOUND, Agrees, ours, reference, worst
from pictures import SCHEDULERS, picture

import anamorph
from anamorph import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from anamorph.checkpoint import BUNDLED
from anamorph.errors import InputError
from anamorph.pipelines.running import states

KIND = "StableDiffusionImg2ImgPipeline"


def call(**changes: Any) -> dict[str, Any]:
    """Two prompts from one picture."""
    return {"prompt": ["a red cat", "a photo of dogs"], "negative_prompt": ["", "blue"], "image": picture(),
            "num_inference_steps": 10, "strength": 0.6, "guidance_scale": 5.0, **changes}  # fmt: skip


load = functools.partial(pictures.load, StableDiffusionImg2ImgPipeline)


def compare(folder: Path, scheduler: type | None = None, seeds: Any = (3, 4), **changes: Any) -> tuple[float, float]:
    return pictures.compare(StableDiffusionImg2ImgPipeline, folder, scheduler, seeds, **call(**changes))


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: scheduler.__name__)
@pytest.mark.parametrize("name", ["sd1", "sd2", "bundled"])
def test_every_step_equals_diffusers(
    agrees: Agrees, name: str, scheduler: type, request: pytest.FixtureRequest
) -> None:
    if name == "bundled":
        agrees(KIND, compare(BUNDLED, scheduler, prompt=["red apple", "rocket"], guidance_scale=4.0))
    else:
        agrees(KIND, compare(request.getfixturevalue(name), scheduler))


def test_the_comparison_notices_a_slightly_different_strength(sd1: Path) -> None:
    # As many steps, but the first one lies elsewhere on the grid.
    expected = reference(sd1, None, (3, 4), KIND, **call(num_inference_steps=20, strength=0.3))
    latents, pixels = worst(ours(load(sd1), (3, 4), **call(num_inference_steps=21, strength=0.3)), expected)
    assert latents > LATENT_BOUND
    assert pixels > IMAGE_BOUND
    with pytest.raises(AssertionError):
        worst(ours(load(sd1), (3, 4), **call(num_inference_steps=20, strength=0.35)), expected)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"strength": 1.0}, id="all steps"),
        pytest.param({"strength": 0.1}, id="one step"),
        pytest.param({"guidance_scale": 1.0}, id="no guidance"),
        pytest.param({"seeds": 5}, id="one generator"),
        pytest.param({"image": [picture(), picture(hue=1)], "seeds": 5}, id="pictures of one generator"),
        pytest.param({"image": [picture(), picture(hue=1)]}, id="a picture each"),
        pytest.param({"image": picture(45, 78)}, id="a size that is rounded down"),
        pytest.param({"image": np.asarray(picture(45, 78), np.float32) / 255}, id="array"),
        pytest.param({"image": torch.rand(2, 3, 40, 64, generator=torch.Generator().manual_seed(0))}, id="tensors"),
        pytest.param({"image": [torch.full((3, 40, 64), 0.25)] * 2}, id="list of tensors"),
        pytest.param({"image": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}, id="latents"),
        pytest.param({"num_images_per_prompt": 2, "seeds": (1, 2, 3, 4)}, id="several of a prompt"),
        pytest.param({"eta": 0.6}, id="noise of every step"),
    ],
)
def test_other_calls_equal_diffusers(agrees: Agrees, sd1: Path, changes: dict[str, Any]) -> None:
    agrees(KIND, compare(sd1, **{"num_inference_steps": 10, **changes}))


def test_timesteps_of_the_callers_own_equal_diffusers(agrees: Agrees, sd1: Path) -> None:
    own = {"timesteps": [900, 700, 400, 200, 50], "num_inference_steps": None}
    agrees(KIND, compare(sd1, anamorph.EulerDiscreteScheduler, **own))


def test_a_picture_does_not_depend_on_its_batch_mates(sd1: Path) -> None:
    pipe = load(sd1)
    arguments = call(output_type="np", prompt="a cat", negative_prompt=None)
    together = pipe(**{**arguments, "prompt": ["a dog", "a cat"]}, seed=[7, 8]).images
    alone = pipe(**arguments, seed=8).images
    assert np.abs(together[1] - alone[0]).max() <= 1e-5
    assert np.abs(together[0] - alone[0]).max() > 0.01


def test_a_seed_draws_what_a_torch_generator_draws(sd1: Path) -> None:
    pipe = load(sd1)
    arguments = call(output_type="np", prompt="a cat", negative_prompt=None)
    drawn = pipe(**arguments, generator=torch.Generator().manual_seed(11)).images
    assert np.abs(pipe(**arguments, seed=11).images - drawn).max() <= 1e-5


def test_components_of_text_to_image_serve_it_without_another_copy_of_them(sd1: Path) -> None:
    text = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    assert "vae_encoder" not in text.placement
    pipe = StableDiffusionImg2ImgPipeline(**text.components)
    assert pipe.components["unet"] is text.components["unet"]
    assert pipe.placement["vae_encoder"].engine == "eager"
    arguments = call(output_type="np", prompt="a cat", negative_prompt=None)
    assert np.array_equal(pipe(**arguments, seed=1).images, load(sd1)(**arguments, seed=1).images)


def test_guidance_is_rescaled_as_by_hand(sd1: Path) -> None:
    pipe = load(sd1)
    job = pipe.job("a cat", image=picture(), strength=0.1, num_inference_steps=10, seed=3, guidance_rescale=0.7)
    plan = pipe.plan(job)
    (final,) = [state.latents.numpy() for state in states(pipe, plan)]
    unet = anamorph.UNet2DConditionModel.from_pretrained(sd1, subfolder="unet")
    with torch.no_grad():
        pair = torch.cat([plan.latents] * 2)
        row = plan.table.rows[0]
        without, with_text = unet(
            pair, row.timestep, encoder_hidden_states=plan.conditions["encoder_hidden_states"]
        ).sample
        guided = without + 7.5 * (with_text - without)
        guided = 0.7 * guided * (with_text.std() / guided.std()) + 0.3 * guided
    scheduler = pipe.scheduler
    scheduler.set_timesteps(10)
    expected = scheduler.step(guided[None], row.timestep, plan.latents).prev_sample.numpy()
    assert np.abs(final - expected).max() <= 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": None}, "image is missing"),
        ({"image": "cat.png"}, "image is str, expected Pillow images"),
        ({"image": []}, "image is an empty list"),
        ({"image": picture().convert("L")}, "image has mode L, expected RGB"),
        ({"image": picture().convert("RGBA")}, "image has mode RGBA, expected RGB"),
        ({"image": picture(4, 4)}, "height is 0"),
        ({"image": [picture(), picture(32, 32)]}, "differ in mode or size"),
        ({"image": [picture()] * 3}, "3 of image for 2 pictures"),
        ({"image": np.asarray(picture())}, "array of uint8"),
        ({"image": np.asarray(picture(), np.float32)}, "values from .* expected 0 to 1"),
        ({"image": np.full((64, 64, 3), np.nan)}, "NaN or infinity"),
        ({"image": np.zeros((64, 64))}, r"shape \[64, 64\]"),
        ({"image": np.zeros((64, 64, 2))}, "2 channels, expected 3"),
        ({"image": torch.zeros(5, 64, 64)}, "5 channels, expected 3"),
        ({"strength": 1.1}, "strength is 1.1, expected 0 to 1"),
        ({"strength": -0.1}, "strength is -0.1"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"strength": "much"}, "strength is 'much'"),
        ({"strength": 0.05}, "strength 0.05 leaves none of 10 steps; expected at least 1/10"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5"),
        ({"clip_skip": 3}, "clip_skip is 3, expected None or 0 to 2"),
    ],
)
def test_wrong_arguments_are_named(sd1: Path, changes: dict[str, Any], words: str) -> None:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(sd1, backend="null")
    with pytest.raises(InputError, match=words):
        pipe(**call(**changes))


def test_arguments_of_other_tasks_are_unknown(sd1: Path) -> None:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(sd1, backend="null")
    with pytest.raises(TypeError, match="mask_image"):
        pipe.job("x", image=picture(), mask_image=picture())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="strength"):
        StableDiffusionPipeline.from_pretrained(sd1, backend="null").job("x", strength=0.5)  # type: ignore[attr-defined]
