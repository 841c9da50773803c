"""Pipelines in files of others that register their modules, beside diffusers running the same file."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import noisy
from exported import exported

import anamorph
from anamorph import DiffusionPipeline
from anamorph.errors import BackendError, CheckpointError, ConfigError, InputError

TEXT = """
import torch
from {library} import DiffusionPipeline


class {name}(DiffusionPipeline):
    def __init__(self, unet, scheduler, start: float = 1.0):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.start = start

    @torch.no_grad()
    def __call__(self, batch_size=1, num_inference_steps=3, generator=None):
        side = self.unet.config.sample_size
        image = torch.randn((batch_size, self.unet.config.in_channels, side, side), generator=generator) * self.start
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self.unet(image, t).sample
            image = self.scheduler.step(output, t, image, generator=generator).prev_sample
        image = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return image, self.numpy_to_pil(image)
"""
UNET: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint without texts."""
    folder = tmp_path_factory.mktemp("ddpm")
    unet = noisy(diffusers.UNet2DModel(**UNET), 1)
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def written(folder: Path, library: str = "anamorph", name: str = "Registered", text: str = TEXT) -> Path:
    place = folder / library
    place.mkdir(exist_ok=True)
    (place / "pipeline.py").write_text(text.format(library=library, name=name))
    return place


def test_pictures_are_those_of_diffusers(ddpm: Path, tmp_path: Path) -> None:
    theirs: Any = diffusers.DiffusionPipeline.from_pretrained(
        ddpm, custom_pipeline=str(written(tmp_path, "diffusers", "Theirs")), trust_remote_code=True
    )
    theirs.set_progress_bar_config(disable=True)
    ours: Any = DiffusionPipeline.from_pretrained(ddpm, custom_pipeline=written(tmp_path), trust_remote_code=True)
    assert type(ours.unet) is anamorph.UNet2DModel
    assert set(ours.components) == {"unet", "scheduler"}
    assert repr(ours) == "Registered(\n  unet: UNet2DModel\n  scheduler: DDPMScheduler\n)"
    (values, pictures), (expected, others) = (p(2, generator=torch.Generator().manual_seed(3)) for p in (ours, theirs))
    assert np.abs(values - expected).max() <= 1e-5
    for mine, other in zip(pictures, others, strict=True):
        assert np.abs(np.asarray(mine, int) - np.asarray(other, int)).max() <= 1  # of 255: values between two
    assert np.abs(ours(2, generator=torch.Generator().manual_seed(4))[0] - expected).max() > 0.1
    by_hand = type(ours)(unet=ours.unet, scheduler=ours.scheduler)
    assert np.array_equal(by_hand(2, generator=torch.Generator().manual_seed(3))[0], values)


def test_it_loads_saves_and_moves_like_any_other(ddpm: Path, tmp_path: Path) -> None:
    kind: Any = DiffusionPipeline.from_pretrained(
        ddpm, custom_pipeline=written(tmp_path, name="Moving"), trust_remote_code=True
    )
    half = type(kind).from_pretrained(ddpm, torch_dtype=torch.bfloat16, start=2.0)
    assert half.unet.dtype == torch.bfloat16
    assert half.start == 2.0
    assert half.to(torch_dtype=torch.float32).unet.dtype == torch.float32
    kind.save_pretrained(tmp_path / "saved")
    again = type(kind).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), kind.unet.parameters(), strict=True))
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "saved", subfolder="unet")
    assert theirs.config.block_out_channels == [8, 16]


def test_what_does_not_fit_is_refused(ddpm: Path, sd1: Path, tmp_path: Path) -> None:
    place = written(tmp_path, name="Refusing")

    def opened(folder: Path = ddpm, **more: Any) -> Any:
        return DiffusionPipeline.from_pretrained(folder, custom_pipeline=place, trust_remote_code=True, **more)

    with pytest.raises(InputError, match="Refusing has no component vae; it takes unet, scheduler, start"):
        opened(vae=None)
    with pytest.raises(BackendError, match="Refusing registers PyTorch's models; name a checkpoint"):
        opened(backend="openvino")
    with pytest.raises(BackendError, match="Refusing registers PyTorch's models; name a checkpoint"):
        opened(exported(sd1, "onnxruntime"))
    with pytest.raises(InputError, match="torch_dtype names unet; expected default"):
        opened(torch_dtype={"unet": "bf16"})
    written(tmp_path, name="Lacking", text=TEXT.replace("unet, scheduler, start", "unet, movq, scheduler, start"))
    with pytest.raises(CheckpointError, match=r"model_index.json has no movq, which this pipeline needs"):
        opened()
    index = ddpm / "model_index.json"
    before = index.read_text()
    index.write_text(before.replace('"UNet2DModel"', '"UNet1DModel"'))
    written(tmp_path, name="Strange")
    with pytest.raises(ConfigError, match=r"unet of .* is a UNet1DModel, which this version does not have; pass unet="):
        opened()
    index.write_text(before)
