"""The first published checkpoints: all files side by side, and a scheduler that steps through training unprepared."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import noisy
from exported import exported, once, shared_place
from parity import IMAGE_BOUND, listened, ours
from test_models_unconditional import UNET

from anamorph import DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DModel
from anamorph.cli.inspection import inspect
from anamorph.errors import CheckpointError, InputError

CALL: dict[str, Any] = {"num_inference_steps": 3}


def flat(folder: Path) -> None:
    unet = noisy(diffusers.UNet2DModel(**{**UNET, "sample_size": 16}), 1)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(beta_end=0.03)).save_pretrained(folder)
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()


@pytest.fixture(scope="module")
def first() -> Path:
    return once(shared_place() / "first", flat)


def eager_weights(folder: Path) -> list[torch.Tensor]:
    return list(UNet2DModel.from_pretrained(folder).parameters())


def test_files_side_by_side_draw_what_diffusers_draws(first: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(first, backend="eager")
    expected = listened("DDPMPipeline", first, (1, 2), batch_size=2, **CALL).images
    assert np.abs(ours(pipe, (1, 2), batch_size=2, **CALL).images - expected).max() <= IMAGE_BOUND
    other = ours(pipe, (1, 3), batch_size=2, **CALL).images
    assert np.abs(other - expected).max() > 10 * IMAGE_BOUND
    assert UNet2DModel.from_pretrained(first).config == pipe.unet.config


def test_they_are_exported_and_described(first: Path) -> None:
    folder = exported(first, "onnxruntime")
    assert sorted(path.name for path in (folder / "scheduler").iterdir()) == ["scheduler_config.json"]
    pipe, eager = (DiffusionPipeline.from_pretrained(place, backend="auto") for place in (folder, first))
    images = [ours(one, (1, 2), batch_size=2, **CALL).images for one in (pipe, eager)]
    assert np.abs(images[0] - images[1]).max() <= IMAGE_BOUND
    plain, model = inspect(str(first)).components
    assert (model.name, model.parameters) == ("unet", sum(one.numel() for one in eager_weights(first)))
    assert (plain.name, plain.parameters) == ("scheduler", None)


def test_what_is_missing_is_named(first: Path, tmp_path: Path) -> None:
    shutil.copy(first / "model_index.json", tmp_path)
    with pytest.raises(CheckpointError, match="has no folder 'unet'"):
        DiffusionPipeline.from_pretrained(tmp_path, backend="null")


def test_ddpm_steps_through_training_before_it_is_told_how_many(first: Path) -> None:
    ours, theirs = DDPMScheduler.from_config(first), diffusers.DDPMScheduler.from_pretrained(first)
    assert ours.config["beta_end"] == 0.03
    with pytest.raises(CheckpointError, match="no hub id"):
        DDPMScheduler.from_config("nowhere")
    sample, output = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for timestep in (999, 998, 500, 0):  # diffusers loses digits at the first few, where 1 - alpha is small
        draws = [torch.Generator().manual_seed(timestep) for _ in range(2)]
        mine: Any = ours.step(output, timestep, sample, generator=draws[0])
        expected = theirs.step(output, timestep, sample, generator=draws[1]).prev_sample
        assert float((mine.prev_sample - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert ours.num_inference_steps is None
    with pytest.raises(InputError, match="DDIMScheduler has no steps yet; call set_timesteps first"):
        DDIMScheduler().step(output, 999, sample)
