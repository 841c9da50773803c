"""Inpainting, compared with diffusers step by step in float32, and what it refuses."""

import functools
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pictures
import pytest
import torch
from parity import IMAGE_BOUND, LATENT_BOUND, Agrees, generator, ours, reference, relative, worst
from pictures import SCHEDULERS, mask, picture
from PIL import Image

import anamorph
from anamorph import DiffusionPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from anamorph.arrays import to_numpy
from anamorph.checkpoint import BUNDLED
from anamorph.errors import ConfigError, InputError

KIND = "StableDiffusionInpaintPipeline"


def tensor(image: Image.Image) -> torch.Tensor:
    """[C, H, W] in 0..1."""
    values = torch.from_numpy(np.asarray(image, np.float32) / 255)
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def call(**changes: Any) -> dict[str, Any]:
    return {"prompt": ["a red cat", "a photo of dogs"], "negative_prompt": ["", "blue"], "image": picture(),
            "mask_image": mask(), "num_inference_steps": 8, "guidance_scale": 5.0, **changes}  # fmt: skip


load = functools.partial(pictures.load, StableDiffusionInpaintPipeline)


def compare(folder: Path, scheduler: type | None = None, seeds: Any = (3, 4), **changes: Any) -> tuple[float, float]:
    return pictures.compare(StableDiffusionInpaintPipeline, folder, scheduler, seeds, **call(**changes))


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: scheduler.__name__)
@pytest.mark.parametrize("name", ["sd1", "sd2", "inpaint", "bundled"])
def test_every_step_equals_diffusers(
    agrees: Agrees, name: str, scheduler: type, strength: float, request: pytest.FixtureRequest
) -> None:
    if name == "bundled":
        changes: dict[str, Any] = {"prompt": ["red apple", "rocket"], "guidance_scale": 4.0}
        agrees(KIND, compare(BUNDLED, scheduler, strength=strength, **changes))
    else:
        size = {"height": 16, "width": 16} if name == "sd2" else {}
        agrees(KIND, compare(request.getfixturevalue(name), scheduler, strength=strength, **size))


@pytest.mark.parametrize("name", ["sd1", "inpaint"])
def test_the_comparison_notices_a_slightly_different_mask(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    expected = reference(folder, None, (3, 4), KIND, **call())
    latents, pixels = worst(ours(load(folder), (3, 4), **call(mask_image=mask(shift=8))), expected)
    assert latents > LATENT_BOUND
    assert pixels > IMAGE_BOUND


NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", ["sd1", "inpaint"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"guidance_scale": 1.0}, id="no guidance"),
        pytest.param({"seeds": 5, "strength": 0.6}, id="one generator"),
        pytest.param({"image": [picture(), picture(hue=1)], "mask_image": [mask(), mask(shift=9)]}, id="a mask each"),
        pytest.param({"mask_image": [mask(), mask(shift=9)], "strength": 0.5, "seeds": 6}, id="two masks"),
        pytest.param({"image": picture(90, 110), "mask_image": mask(90, 110), "height": 40, "width": 72}, id="resized"),
        pytest.param({"image": np.asarray(picture(90, 110), np.float32) / 255,
                      "mask_image": np.asarray(mask(90, 110), np.float32) / 255, "height": 40, "width": 72},
                     id="arrays"),
        pytest.param({"image": tensor(picture())[None], "mask_image": tensor(mask())}, id="tensors"),
        pytest.param({"image": [tensor(picture())], "mask_image": [tensor(mask())[0]]}, id="lists of tensors"),
        pytest.param({"latents": NOISE}, id="latents"),
        pytest.param({"latents": NOISE, "strength": 0.5}, id="latents of a part"),
        pytest.param({"masked_image_latents": NOISE[:1]}, id="masked latents"),
        pytest.param({"image": NOISE[:1], "masked_image_latents": NOISE[1:], "strength": 0.5}, id="picture latents"),
        pytest.param({"mask_image": mask().convert("RGB")}, id="coloured mask"),
    ],
)  # fmt: skip
def test_other_calls_equal_diffusers(
    agrees: Agrees, name: str, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    agrees(KIND, compare(request.getfixturevalue(name), **{"num_inference_steps": 4, **changes}))


@pytest.mark.parametrize(
    ("height", "width", "pad"), [(150, 120, 8), (90, 200, 0), (70, 70, 90), (64, 160, 20)], ids=str
)
def test_a_region_around_the_mask_is_drawn_and_put_back_as_diffusers_does(
    sd1: Path, height: int, width: int, pad: int
) -> None:
    import diffusers

    arguments = call(image=picture(height, width), mask_image=mask(height, width), padding_mask_crop=pad,
                     prompt="a cat", negative_prompt=None, num_inference_steps=3, strength=0.7)  # fmt: skip
    theirs = diffusers.StableDiffusionInpaintPipeline.from_pretrained(sd1, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(generator=torch.Generator().manual_seed(2), **arguments).images[0]
    result = load(sd1)(seed=2, **arguments).images[0]
    assert result.size == (width, height)
    # Both are 8-bit pictures, in which the last bits of a value may fall to either side.
    assert np.abs(np.asarray(result, np.int16) - np.asarray(expected, np.int16)).max() <= 1
    black = np.asarray(mask(height, width)) == 0
    assert np.array_equal(np.asarray(result)[black], np.asarray(arguments["image"])[black])


def test_a_picture_does_not_depend_on_its_batch_mates(sd1: Path) -> None:
    pipe = load(sd1)
    arguments = call(output_type="np", prompt="a cat", negative_prompt=None, strength=0.6)
    together = pipe(**{**arguments, "prompt": ["a dog", "a cat"]}, seed=[7, 8]).images
    alone = pipe(**arguments, seed=8).images
    assert np.abs(together[1] - alone[0]).max() <= 1e-5
    assert np.abs(together[0] - alone[0]).max() > 0.01
    drawn = pipe(**arguments, generator=torch.Generator().manual_seed(8)).images
    assert np.abs(alone - drawn).max() <= 1e-5


def test_a_model_for_inpainting_opens_as_what_it_is_and_as_nothing_else(inpaint: Path) -> None:
    assert type(DiffusionPipeline.from_pretrained(inpaint, backend="null")) is StableDiffusionInpaintPipeline
    with pytest.raises(ConfigError, match="9 channels, which is a model for inpainting"):
        StableDiffusionPipeline.from_pretrained(inpaint, backend="null")
    with pytest.raises(ConfigError, match="9 channels, which is a model for inpainting"):
        anamorph.StableDiffusionImg2ImgPipeline.from_pretrained(inpaint, backend="null")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": None}, "mask_image without image"),
        ({"mask_image": None}, "image without mask_image"),
        ({"image": None, "mask_image": None}, "image is missing; this task starts from image and mask_image"),
        ({"mask_image": mask(32, 64)}, "mask_image is 32x64 and image 64x64 pixels"),
        ({"mask_image": mask().convert("RGBA")}, "mask_image has mode RGBA"),
        ({"mask_image": [mask()] * 3}, "3 of mask_image for 2 pictures"),
        ({"mask_image": np.full((64, 64), 255.0)}, "values from 255 to 255"),
        ({"mask_image": np.zeros((1, 64, 64, 3))}, "expected one channel"),
        ({"masked_image_latents": NOISE[:, :2]}, "masked_image_latents have shape"),
        ({"latents": NOISE[:1]}, "latents have shape"),
        ({"height": 65}, "height is 65"),
        ({"strength": 2}, "strength is 2, expected 0 to 1"),
        ({"padding_mask_crop": -1}, "padding_mask_crop is -1"),
        ({"padding_mask_crop": 4, "mask_image": np.zeros((64, 64))}, "needs one Pillow image"),
        ({"padding_mask_crop": 4, "mask_image": Image.new("L", (64, 64))}, "black everywhere"),
        ({"padding_mask_crop": 4, "output_type": "np"}, "output_type 'np'"),
    ],
)
def test_wrong_arguments_are_named(sd1: Path, changes: dict[str, Any], words: str) -> None:
    pipe = StableDiffusionInpaintPipeline.from_pretrained(sd1, backend="null")
    with pytest.raises(InputError, match=words):
        pipe(**call(**changes))


@pytest.mark.parametrize("name", ["sd1", "inpaint"])
def test_callbacks_see_and_replace_the_mask_as_with_diffusers(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    names = ["latents", "mask", *(["masked_image_latents"] if name == "inpaint" else [])]
    seen: list[list[dict[str, Any]]] = []

    def look(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen[-1].append({key: to_numpy(value).copy() for key, value in values.items()})
        return {"mask": values["mask"] * 0} if step == 1 else {}

    theirs: Any = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    results = []
    for pipe in (load(folder), theirs):
        seen.append([])
        results.append(pipe(
            **call(num_inference_steps=4), generator=generator((3, 4)), callback_on_step_end=look,
            callback_on_step_end_tensor_inputs=names, output_type="np",
        ).images)  # fmt: skip
    for mine, other in zip(*seen, strict=True):
        assert all(relative(mine[key], other[key]) <= LATENT_BOUND for key in names if other[key].any())
        assert all(mine[key].shape == other[key].shape for key in names)
    assert np.abs(results[0] - results[1]).max() <= IMAGE_BOUND
    plain = load(folder)(**call(num_inference_steps=4), generator=generator((3, 4)), output_type="np").images
    assert np.abs(results[0] - plain).max() > 100 * IMAGE_BOUND
    with pytest.raises(
        InputError, match="callbacks cannot have image_latents; they can have latents, prompt_embeds, mask"
    ):
        load(folder)(**call(num_inference_steps=1), seed=0, callback_on_step_end=look,
                     callback_on_step_end_tensor_inputs=["image_latents"])  # fmt: skip
