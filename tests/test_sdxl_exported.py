"""SDXL, its refiner and its distilled kind from exported folders, compared with eager."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import tiny_sdxl
from exported import FORMATS, exported
from parity import relative
from pictures import mask, picture

import anamorph
from anamorph import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from anamorph.interface import Interface

BOUND = 1e-4
"""Largest relative L2 difference of the last latents, and of any pixel."""
CALL: dict[str, Any] = {"prompt": ["a red cat", "a dog"], "negative_prompt": "blue", "num_inference_steps": 4,
                        "seed": 3, "guidance_rescale": 0.3, "clip_skip": 1}  # fmt: skip
SOURCE: dict[str, Any] = {"image": picture(16, 16), "strength": 0.7}


def difference(folder: Path, engine: str, kind: Any, scheduler: type | None = None, **changes: Any) -> float:
    pipes = [kind.from_pretrained(place, backend=name)
             for place, name in ((folder, "eager"), (exported(folder, engine), engine))]  # fmt: skip
    assert {placed.engine for placed in pipes[1].placement.values()} == {engine}
    for pipe in pipes if scheduler else ():
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)  # type: ignore[union-attr]
    latents = [np.asarray(pipe(**{**CALL, **changes}, output_type="latent").images) for pipe in pipes]
    images = [pipe.decode(value, "np") for pipe, value in zip(pipes, latents, strict=True)]
    return max(relative(*latents[::-1]), float(np.abs(images[0] - images[1]).max()))


@pytest.mark.parametrize("engine", FORMATS)
def test_every_task_equals_eager(sdxl: Path, engine: str) -> None:
    sizes = {"original_size": (30, 20), "crops_coords_top_left": (3, 4), "prompt_2": "of a cat"}
    assert difference(sdxl, engine, StableDiffusionXLPipeline, **sizes, height=24, width=16) <= BOUND
    assert difference(sdxl, engine, StableDiffusionXLImg2ImgPipeline, **SOURCE) <= BOUND
    inpainting = {**SOURCE, "mask_image": mask(16, 16), "height": 16, "width": 16}
    assert difference(sdxl, engine, StableDiffusionXLInpaintPipeline, **inpainting) <= BOUND


@pytest.mark.parametrize("engine", FORMATS)
def test_a_refiner_equals_eager(refiner: Path, engine: str) -> None:
    assert difference(refiner, engine, StableDiffusionXLImg2ImgPipeline, **SOURCE, aesthetic_score=7.0) <= BOUND


@pytest.mark.parametrize("engine", FORMATS)
def test_a_distilled_model_equals_eager(tmp_path_factory: pytest.TempPathFactory, engine: str) -> None:
    folder = tiny_sdxl(tmp_path_factory.mktemp("distilled"), time_cond_proj_dim=16)
    assert difference(folder, engine, StableDiffusionXLPipeline, anamorph.LCMScheduler, guidance_scale=8.5) <= BOUND


@pytest.mark.parametrize("engine", ["eager", *FORMATS])
def test_without_guidance_no_other_branch_is_computed(sdxl: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(
        sdxl if engine == "eager" else exported(sdxl, engine), backend=engine
    )
    check, seen = Interface.check, []

    def recording(interface: Interface, inputs: Any) -> dict[str, int]:
        if interface.component == "unet":
            seen.append(len(inputs["sample"]))
        return check(interface, inputs)

    monkeypatch.setattr(Interface, "check", recording)
    branches: Sequence[tuple[float, int]] = ((0.0, 1), (1.0, 1), (1.5, 2))
    for scale, count in branches:
        seen.clear()
        pipe(["a", "b"], num_inference_steps=2, guidance_scale=scale, output_type="latent")
        assert seen == [2 * count] * 2
