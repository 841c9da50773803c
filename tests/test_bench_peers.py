"""Arms of other tools, as far as they can be checked without those tools: that they are asked for the same work."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

from anamorph.benchmarks import peers

CONFIG = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "linspace",
}
CELL = {"task": "text-to-image", "precision": "float32"}


@pytest.fixture(name="sdcpp")
def _sdcpp(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(peers.__file__).parent))
    return importlib.import_module("sdcpp_arm")


class Library:
    """Stands for stable_diffusion_cpp: notes what it is asked for, and calls back before and after steps as it does.

    Without a function to call it calls the one before, which is gone: here that is an error, there the process dies.
    """

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.StableDiffusion = self.opened

    def opened(self, **settings: Any) -> SimpleNamespace:
        self.asked |= settings
        return SimpleNamespace(generate_image=self.drawn)

    def drawn(self, progress_callback: Any, **settings: Any) -> list[Image.Image]:
        self.asked |= settings
        for step in range(settings["sample_steps"] + 1):
            progress_callback(step, settings["sample_steps"], 0.0)
        return [Image.new("RGBA", (8, 8), (0, 51, 255, 255))] * settings["batch_count"]


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 4, 7, 20])
def test_stable_diffusion_cpp_steps_along_the_sigmas_of_diffusers(sdcpp: ModuleType, steps: int, spacing: str) -> None:
    config = {**CONFIG, "timestep_spacing": spacing}
    scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    assert float(scheduler.init_noise_sigma) == pytest.approx(float(scheduler.sigmas[0]))
    np.testing.assert_allclose(sdcpp.sigmas(config, steps), scheduler.sigmas.numpy(), rtol=3e-5)  # theirs are float32


def test_stable_diffusion_cpp_is_asked_for_the_cell_s_picture(
    sdcpp: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = Library()
    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", library)
    call = {"prompt": "red apple", "height": 8, "width": 8, "num_inference_steps": 3, "guidance_scale": 5.0,
            "num_images_per_prompt": 2}  # fmt: skip
    (tmp_path / "call.json").write_text(json.dumps(call), encoding="utf-8")
    arm = sdcpp.StableDiffusionCpp()
    arm.open({"cell": CELL, "scheduler": CONFIG, "folder": "checkpoint", "threads": 2})
    seconds = arm.run(tmp_path)
    assert len(seconds["steps"]) == 3
    assert seconds["total"] >= seconds["text"] + sum(seconds["steps"]) >= 0
    asked = {
        "model_path": "checkpoint", "wtype": "f32", "n_threads": 2, "prediction": "v", "rng_type": "cpu", "seed": 0,
        "cfg_scale": 5.0, "batch_count": 2,
    }  # fmt: skip
    assert asked == {name: library.asked[name] for name in asked}
    assert [float(value) for value in library.asked["sigmas"].split(",")] == sdcpp.sigmas(CONFIG, 3)
    arm.stages(tmp_path, tmp_path)
    picture = np.load(tmp_path / "picture.npy")
    assert picture.shape == (2, 8, 8, 3)
    np.testing.assert_allclose(picture[0, 0, 0], [0, 0.2, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("cell", "config", "reason"),
    [
        ({**CELL, "task": "denoiser"}, CONFIG, "whole pictures alone"),
        (CELL, None, "EulerDiscreteScheduler"),
        (CELL, {**CONFIG, "_class_name": "DDIMScheduler"}, "EulerDiscreteScheduler"),
        (CELL, {**CONFIG, "timestep_spacing": "leading"}, "spacing to trailing"),
        (CELL, {**CONFIG, "prediction_type": "sample"}, "sample, it knows epsilon and v_prediction"),
    ],
)
def test_stable_diffusion_cpp_refuses_other_work(
    sdcpp: ModuleType, monkeypatch: pytest.MonkeyPatch, cell: dict[str, Any], config: Any, reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", Library())
    arm = sdcpp.StableDiffusionCpp()
    with pytest.raises(ValueError, match=reason):
        arm.open({"cell": cell, "scheduler": config, "folder": "checkpoint", "threads": 2})
