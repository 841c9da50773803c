"""Sliced and tiled autoencoders on every engine, beside diffusers; other switches say that they do not apply."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from exported import FORMATS, exported
from parity import IMAGE_BOUND
from PIL import Image

from anamorph import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from anamorph.errors import BackendError, InputError
from anamorph.pipelines.saving_memory import refuse_offload

CALL: dict[str, Any] = {"num_inference_steps": 2, "height": 96, "width": 96, "output_type": "np"}
PICTURE = Image.fromarray((np.indices((96, 96)).sum(0)[..., None] * np.array([1, 0.5, 0.2])).astype(np.uint8))


def drawn(pipe: Any, **changes: Any) -> Any:
    call = {**CALL, **changes}
    return pipe(["a cat", "a dog"], generator=torch.Generator().manual_seed(0), **call).images


def test_tiles_are_those_of_diffusers_and_slices_change_nothing(sd1: Path) -> None:
    theirs: Any = diffusers.StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    whole = drawn(pipe)
    pipe.enable_vae_slicing()
    assert np.abs(drawn(pipe) - whole).max() <= 1e-5
    pipe.enable_vae_tiling()
    theirs.vae.enable_tiling()
    expected = drawn(theirs)
    assert np.abs(drawn(pipe) - expected).max() <= IMAGE_BOUND
    assert np.abs(whole - expected).max() > 10 * IMAGE_BOUND
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    assert np.array_equal(drawn(pipe), whole)


def test_pictures_are_encoded_in_tiles_too(sd1: Path) -> None:
    theirs: Any = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(sd1, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    pipe: Any = StableDiffusionImg2ImgPipeline.from_pretrained(sd1, backend="eager")
    pipe.enable_vae_tiling()
    theirs.vae.enable_tiling()
    call: dict[str, Any] = {"image": PICTURE, "num_inference_steps": 4, "strength": 0.5, "output_type": "np"}
    images = [p("a cat", generator=torch.Generator().manual_seed(0), **call).images for p in (pipe, theirs)]
    assert np.abs(images[0] - images[1]).max() <= IMAGE_BOUND


@pytest.mark.parametrize("engine", FORMATS)
def test_every_engine_draws_the_same_tiles(sd1: Path, engine: str) -> None:
    eager: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    pipe: Any = StableDiffusionPipeline.from_pretrained(exported(sd1, engine), backend=engine)
    for one in (eager, pipe):
        one.enable_vae_tiling()
        one.enable_vae_slicing()
    assert np.abs(drawn(pipe) - drawn(eager)).max() <= 10 * IMAGE_BOUND


def test_what_does_not_apply_says_so(sd1: Path) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="null")
    for switch in (pipe.enable_attention_slicing, pipe.enable_xformers_memory_efficient_attention):
        with pytest.warns(UserWarning, match="attention slicing does not apply: attention is fused on every engine"):
            switch()
    for switch in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.warns(UserWarning, match="does not apply: everything runs on the processor already"):
            switch()
    unet = replace(pipe.placement["unet"], device="cuda:0")
    with pytest.raises(BackendError, match="is not served by this version, and unet run on an accelerator"):
        refuse_offload("enable_model_cpu_offload", {**pipe.placement, "unet": unet})


def test_models_are_attributes_that_can_be_shared_and_replaced(sd1: Path) -> None:
    first: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    second: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager", vae=first.vae, unet=first.unet)
    assert second.unet is first.components["unet"]
    with pytest.raises(InputError, match="unet is a type, expected a model of anamorph"):
        second.unet = StableDiffusionPipeline
    second.unet = UNet2DConditionModel.from_pretrained(sd1, subfolder="unet")
    assert second.unet is not first.unet
    assert np.array_equal(drawn(second), drawn(first))
    with pytest.raises(AttributeError, match="has no attribute 'unet_2'"):
        first.unet_2  # noqa: B018
