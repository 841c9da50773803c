"""Image to image and inpainting from exported folders, compared with eager."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import tiny_inpaint
from exported import FORMATS, exported
from parity import relative
from pictures import mask, picture

from anamorph import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

BOUND = 1e-4
"""Largest relative L2 difference of the last latents, and of any pixel."""
CALL: dict[str, Any] = {"prompt": ["a red cat", "a dog"], "image": picture(), "num_inference_steps": 5,
                        "strength": 0.7, "guidance_scale": 5.0, "seed": 3, "guidance_rescale": 0.3,
                        "clip_skip": 1}  # fmt: skip


def difference(folder: Path, engine: str, kind: type[DiffusionPipeline], **changes: Any) -> float:
    call = {**CALL, **changes}
    theirs, ours = (kind.from_pretrained(place, backend=name)
                    for place, name in ((folder, "eager"), (exported(folder, engine), engine)))  # fmt: skip
    assert ours.placement["vae_encoder"].engine == engine
    latents = [np.asarray(pipe(**call, output_type="latent").images) for pipe in (ours, theirs)]  # type: ignore[operator]
    images = [pipe(**call, output_type="np").images for pipe in (ours, theirs)]  # type: ignore[operator]
    return max(relative(*latents), float(np.abs(images[0] - images[1]).max()))


@pytest.mark.parametrize("engine", FORMATS)
def test_image_to_image_equals_eager(sd1: Path, engine: str) -> None:
    assert difference(sd1, engine, StableDiffusionImg2ImgPipeline) <= BOUND


@pytest.mark.parametrize("engine", FORMATS)
def test_inpainting_equals_eager(sd1: Path, engine: str) -> None:
    assert difference(sd1, engine, StableDiffusionInpaintPipeline, mask_image=mask()) <= BOUND


@pytest.mark.parametrize("engine", FORMATS)
def test_a_model_for_inpainting_is_exported_and_equals_eager(
    tmp_path_factory: pytest.TempPathFactory, engine: str
) -> None:
    folder = tiny_inpaint(tmp_path_factory.mktemp("inpaint"))
    assert difference(folder, engine, StableDiffusionInpaintPipeline, mask_image=mask()) <= BOUND
