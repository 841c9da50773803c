"""SDXL, base and refiner, compared with diffusers step by step in float32, and what is refused."""

import importlib.machinery
import json
import shutil
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import tiny_sdxl
from diffusers.pipelines.stable_diffusion_xl import watermark as diffusers_watermark
from parity import IMAGE_BOUND, LATENT_BOUND, Agrees, generator, ours, reference, worst
from sdxl_calls import IMAGE, INPAINT, OPTIONS, TEXT, call, compare, load, mask, opened, picture

import anamorph
from anamorph import DiffusionPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from anamorph.errors import ConfigError, InputError
from anamorph.pipelines import watermark


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose denoiser sees the mask and what stays."""
    folder = tmp_path_factory.mktemp("nine")
    return tiny_sdxl(folder, kind=diffusers.StableDiffusionXLInpaintPipeline, in_channels=9)


@pytest.mark.parametrize("kind", [TEXT, IMAGE, INPAINT])
@pytest.mark.parametrize(
    "scheduler", [None, anamorph.DDIMScheduler, anamorph.PNDMScheduler, anamorph.HeunDiscreteScheduler,
                  anamorph.DPMSolverMultistepScheduler], ids=lambda scheduler: getattr(scheduler, "__name__", "Euler")
)  # fmt: skip
def test_every_step_equals_diffusers(agrees: Agrees, sdxl: Path, kind: str, scheduler: type | None) -> None:
    agrees(kind, compare(sdxl, kind, scheduler))


@pytest.fixture(scope="module")
def normalised(sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose autoencoder tells the mean and the deviation of its latents."""
    folder = tmp_path_factory.mktemp("normalised") / "sdxl"
    shutil.copytree(sdxl, folder)
    file = folder / "vae" / "config.json"
    told = {"latents_mean": [-1.6, 1.1, 0.4, -2.0], "latents_std": [0.5, 2.4, 1.3, 0.8]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **told}))
    return folder


@pytest.mark.parametrize("kind", [TEXT, IMAGE])
def test_latents_have_the_mean_and_deviation_that_their_autoencoder_tells(
    sdxl: Path, normalised: Path, kind: str, agrees: Agrees
) -> None:
    agrees(kind, compare(normalised, kind))
    arguments = call(kind)
    plain, told = (ours(load(folder, kind), (3, 4), **arguments) for folder in (sdxl, normalised))
    assert worst(plain, told)[1] > 100 * IMAGE_BOUND
    file = normalised / "vae" / "config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "latents_std": [1.0]}))
    pipe: Any = getattr(anamorph, kind).from_pretrained(normalised, backend="eager")
    with pytest.raises(ConfigError, match="the vae's latents_std has 1 values, expected 4"):
        pipe(**call(kind, num_inference_steps=2))
    file.write_text(before)


SIZES: Mapping[str, Any] = {"original_size": (30, 20), "target_size": (24, 18), "crops_coords_top_left": (3, 4)}
NEGATIVE_SIZES: Mapping[str, Any] = {"negative_original_size": (9, 8), "negative_target_size": (7, 6)}
ONE: Mapping[str, Any] = {"prompt": "a cat", "negative_prompt": "red", "seeds": (3,)}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"prompt_2": ["of", "a dog"], "negative_prompt_2": ["red", "of"]}, id="second texts"),
        pytest.param({"negative_prompt": None}, id="zeros for no negative prompt"),
        pytest.param({"guidance_scale": 0.0}, id="guidance 0"),
        pytest.param({"guidance_scale": 1.0, "negative_prompt": None}, id="guidance 1"),
        pytest.param({"guidance_rescale": 0.6}, id="rescaled"),
        pytest.param({"clip_skip": 1}, id="skipped layers"),
        pytest.param({"denoising_end": 0.6}, id="an early end"),
        pytest.param(SIZES, id="sizes"),
        pytest.param({**ONE, **SIZES, **NEGATIVE_SIZES, "negative_crops_coords_top_left": (1, 2)}, id="negative sizes"),
        pytest.param({"height": 24, "width": 16, "num_images_per_prompt": 2, "seeds": (1, 2, 3, 4)}, id="a size"),
        pytest.param({"eta": 0.5, "scheduler": anamorph.DDIMScheduler}, id="noise of every step"),
        pytest.param({"latents": torch.ones(2, 4, 8, 8)}, id="latents"),
    ],
)
def test_text_to_image_equals_diffusers(agrees: Agrees, sdxl: Path, changes: dict[str, Any]) -> None:
    agrees(TEXT, compare(sdxl, TEXT, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"denoising_start": 0.5}, id="from the middle"),
        pytest.param({"denoising_start": 0.5, "scheduler": anamorph.HeunDiscreteScheduler}, id="two calls a step"),
        pytest.param({"denoising_start": 0.4, "denoising_end": 0.8}, id="a span"),
        pytest.param({"latents": torch.ones(2, 4, 8, 8)}, id="latents"),
        pytest.param({"image": torch.ones(1, 4, 8, 8) / 2}, id="a picture's latents"),
        pytest.param({**ONE, **SIZES, **NEGATIVE_SIZES}, id="sizes"),
        pytest.param({"image": picture(hue=1), "num_images_per_prompt": 2, "seeds": 5}, id="one generator"),
    ],
)
def test_image_to_image_equals_diffusers(agrees: Agrees, sdxl: Path, changes: dict[str, Any]) -> None:
    agrees(IMAGE, compare(sdxl, IMAGE, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"denoising_start": 0.5, "aesthetic_score": 7.0, "negative_aesthetic_score": 1.0},
        {**ONE, "original_size": (30, 20), "crops_coords_top_left": (3, 4), "negative_crops_coords_top_left": (1, 2)},
    ],
    ids=["plain", "scores", "sizes"],
)
def test_a_refiner_equals_diffusers(agrees: Agrees, refiner: Path, changes: dict[str, Any]) -> None:
    agrees(IMAGE, compare(refiner, IMAGE, **changes))


@pytest.mark.parametrize("name", ["sdxl", "nine"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"strength": 1.0}, id="noise alone"),
        pytest.param({"strength": 0.6, "seeds": 5}, id="a part, one generator"),
        pytest.param({"denoising_start": 0.5}, id="from the middle"),
        pytest.param({"masked_image_latents": torch.ones(1, 4, 8, 8)}, id="masked latents"),
    ],
)
def test_inpainting_equals_diffusers(
    agrees: Agrees, name: str, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    agrees(INPAINT, compare(request.getfixturevalue(name), INPAINT, **changes))


def test_a_refiner_paints_on_from_latents_as_in_diffusers(agrees: Agrees, sdxl: Path, nine: Path) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    agrees(INPAINT, compare(sdxl, INPAINT, image=latents, denoising_start=0.5))
    with pytest.raises(InputError, match="image holds latents; give masked_image_latents, too"):
        getattr(anamorph, INPAINT).from_pretrained(nine, backend="null")(**call(INPAINT, image=latents))


def test_base_and_refiner_draw_one_picture_as_in_diffusers(sdxl: Path, refiner: Path) -> None:
    text = {"prompt": "a red cat", "num_inference_steps": 8}
    theirs = []
    for folder, kind in ((sdxl, TEXT), (refiner, IMAGE)):
        pipe = getattr(diffusers, kind).from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        theirs.append(pipe)
    half = theirs[0](**text, denoising_end=0.6, output_type="latent", generator=generator(1)).images
    expected = theirs[1](**text, denoising_start=0.6, image=half, output_type="np", generator=generator(2)).images
    half = load(sdxl, TEXT)(**text, denoising_end=0.6, output_type="latent", seed=1).images
    result = load(refiner, IMAGE)(**text, denoising_start=0.6, image=half, output_type="np", seed=2).images
    assert np.abs(result - expected).max() <= IMAGE_BOUND


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (TEXT, {"guidance_scale": 5.01}),
        (TEXT, {"original_size": (17, 16)}),
        (TEXT, {"crops_coords_top_left": (0, 1)}),
        (TEXT, {"negative_prompt_2": ["", "a"]}),
        (IMAGE, {"num_inference_steps": 10, "strength": 0.3}),
        (IMAGE, {"target_size": (16, 17)}),
        (INPAINT, {"mask_image": mask(shift=2)}),
        (INPAINT, {"guidance_scale": 5.01}),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else str(value),
)
def test_the_comparison_notices_a_slightly_different_condition(sdxl: Path, kind: str, change: dict[str, Any]) -> None:
    expected = reference(sdxl, None, (3, 4), kind, **call(kind))
    latents, _ = worst(ours(load(sdxl, kind), (3, 4), **call(kind, **change)), expected)
    assert latents > LATENT_BOUND


def test_the_comparison_notices_a_slightly_different_score(refiner: Path) -> None:
    expected = reference(refiner, None, (3, 4), IMAGE, **call(IMAGE))
    latents, _ = worst(ours(load(refiner, IMAGE), (3, 4), **call(IMAGE, aesthetic_score=6.1)), expected)
    assert latents > LATENT_BOUND


@pytest.mark.parametrize("scale", [1.0, 8.5])
def test_a_distilled_model_takes_the_guidance_as_an_input(agrees: Agrees, distilled: Path, scale: float) -> None:
    agrees(TEXT, compare(distilled, TEXT, anamorph.LCMScheduler, guidance_scale=scale))
    expected = reference(distilled, anamorph.LCMScheduler, (3, 4), TEXT, OPTIONS, **call(TEXT, guidance_scale=scale))
    other = ours(load(distilled, TEXT, anamorph.LCMScheduler), (3, 4), **call(TEXT, guidance_scale=scale + 0.1))
    assert worst(other, expected)[0] > LATENT_BOUND


def test_embeds_go_out_and_in(sdxl: Path) -> None:
    pipe = load(sdxl, TEXT)
    words = pipe("a cat", negative_prompt="red", num_inference_steps=2, seed=1, output_type="np").images
    positive, negative = pipe.embeds("a cat"), pipe.embeds("red")
    assert set(positive) == {"prompt_embeds", "pooled_prompt_embeds"}
    given = {**positive, **{f"negative_{name}": value for name, value in negative.items()}}
    assert np.array_equal(pipe(**given, num_inference_steps=2, seed=1, output_type="np").images, words)


def test_callbacks_see_and_replace_what_the_denoiser_is_told(sdxl: Path) -> None:
    pipe, seen = load(sdxl, TEXT), []

    def look(_pipe: Any, step: int, _time: float, values: dict[str, Any]) -> dict[str, Any]:
        seen.append({name: tuple(value.shape) for name, value in values.items()})
        return {"add_time_ids": values["add_time_ids"] * 0} if step == 0 else {}

    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    arguments: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    changed = pipe(**arguments, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names).images
    assert seen[0] == {"latents": (1, 4, 8, 8), "prompt_embeds": (2, 77, 72), "add_text_embeds": (2, 24),
                       "add_time_ids": (2, 6)}  # fmt: skip
    assert not torch.equal(changed, pipe(**arguments).images)


def test_numbers_of_pixels_are_not_rounded_in_bfloat16(sdxl: Path) -> None:
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(sdxl, backend="eager", torch_dtype="bfloat16")
    arguments = {"prompt": "a cat", "num_inference_steps": 1, "seed": 1, "output_type": "latent", "guidance_scale": 1}
    odd, even = (pipe(**arguments, original_size=(side, 64)).images for side in (1021, 1020))
    assert torch.tensor(1021.0, dtype=torch.bfloat16) == 1020
    assert not torch.equal(odd, even)


def test_negative_sizes_belong_to_the_negative_branch_of_every_picture(sdxl: Path) -> None:
    # diffusers deals the two rows out in turn to a batch of both branches, which mixes them from two pictures on.
    pipe = load(sdxl, TEXT)
    arguments: dict[str, Any] = {**SIZES, **NEGATIVE_SIZES, "num_inference_steps": 2, "output_type": "np"}
    together = pipe(["a cat", "a dog"], seed=[1, 2], **arguments).images
    assert np.abs(together[1] - pipe("a dog", seed=2, **arguments).images[0]).max() <= 1e-5


def test_saving_keeps_the_picture_and_diffusers_reads_it(refiner: Path, tmp_path: Path) -> None:
    load(refiner, IMAGE).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, backend="eager")
    assert isinstance(pipe, StableDiffusionXLImg2ImgPipeline)
    assert pipe.options["requires_aesthetics_score"]
    assert worst(ours(pipe, (3, 4), **call(IMAGE)), reference(tmp_path, None, (3, 4), IMAGE, **call(IMAGE)))[1] == (
        pytest.approx(0, abs=IMAGE_BOUND)
    )


def test_a_watermark_is_asked_of_its_package_as_diffusers_asks(sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="pip install invisible-watermark"):
        StableDiffusionXLPipeline.from_pretrained(sdxl, backend="null", add_watermarker=True)

    class Encoder:
        """Stands in for the package's: adds the message's length to blue, which comes first."""

        def set_watermark(self, kind: str, bits: list[int]) -> None:
            self.kind, self.bits = kind, bits

        def encode(self, image: Any, method: str) -> Any:
            assert (self.kind, method, image.shape[-1]) == ("bits", "dwtDct", 3)
            return image + np.array([len(self.bits), 0, 0], np.float32)

    module = types.ModuleType("imwatermark")
    module.__spec__ = importlib.machinery.ModuleSpec("imwatermark", None)
    module.WatermarkEncoder = Encoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "imwatermark", module)
    pipe: Any = StableDiffusionXLPipeline(**opened(sdxl, TEXT).components, add_watermarker=True)
    with pytest.raises(InputError, match="at least 256 pixels wide, got 16"):
        pipe("x")
    pixels = torch.rand(1, 3, 8, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(diffusers_watermark, "WatermarkEncoder", Encoder, raising=False)
    expected = diffusers_watermark.StableDiffusionXLWatermarker().apply_watermark(pixels)
    assert np.abs(watermark.marked(pixels.numpy()) - expected.numpy()).max() <= 1e-6
