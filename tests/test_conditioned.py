"""Pipelines whose denoiser also sees a picture, compared with diffusers step by step and on every engine."""

import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import CLIP, UNET, VAE, noisy, tiny_clip, tiny_tokenizer, write_vocabulary
from exported import ENGINES, exported, once, shared_place
from parity import IMAGE_BOUND, LATENT_BOUND, Agrees, listened, ours, worst
from pictures import picture
from test_models_unet import UPSCALER

import anamorph
from anamorph.errors import ConfigError, InputError
from anamorph.pipelines.pictures import bicubic

EXTRAS: dict[str, dict[str, Any]] = {
    "StableDiffusionDepth2ImgPipeline": {"depth_estimator": None, "feature_extractor": None},
    "StableDiffusionInstructPix2PixPipeline": {
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    },
    "StableDiffusionUpscalePipeline": {},
    "StableDiffusionLatentUpscalePipeline": {},
}  # fmt: skip
FOUR: dict[str, Any] = {
    "block_out_channels": (16, 16, 32), "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3, "scaling_factor": 0.08333,
}  # fmt: skip
TWO: dict[str, Any] = {
    **UPSCALER, "sample_size": 8, "cross_attention_dim": 32, "time_cond_proj_dim": 2 * 64 + 32,
    "block_out_channels": (32, 64, 64), "down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("KCrossAttnUpBlock2D",) * 2, "KUpBlock2D"),
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "StableDiffusionDepth2ImgPipeline": ({"in_channels": 5}, {}),
    "StableDiffusionInstructPix2PixPipeline": ({"in_channels": 8}, {}),
    "StableDiffusionUpscalePipeline": ({"in_channels": 7, "num_class_embeds": 1000}, FOUR),
    "StableDiffusionLatentUpscalePipeline": (TWO, {}),
}
KINDS = list(MODELS)


def save(kind: str, folder: Path) -> None:
    unet, vae = MODELS[kind]
    with TemporaryDirectory() as draft:
        tokenizer = tiny_tokenizer(Path(draft))
    curve = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler: Any = diffusers.DDIMScheduler(**curve, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    extras = {name: value for name, value in EXTRAS[kind].items() if value is None}
    if kind == "StableDiffusionLatentUpscalePipeline":
        scheduler = diffusers.EulerDiscreteScheduler(**curve, prediction_type="sample", steps_offset=1)
    if kind == "StableDiffusionUpscalePipeline":
        extras["low_res_scheduler"] = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    pipe = getattr(diffusers, kind)(
        vae=noisy(diffusers.AutoencoderKL(**{**VAE, **vae}), 1),
        text_encoder=noisy(tiny_clip(len(tokenizer), **CLIP), 2), tokenizer=tokenizer,
        unet=noisy(diffusers.UNet2DConditionModel(**{**UNET, **unet}), 3),
        scheduler=scheduler, **extras,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    write_vocabulary(folder / "tokenizer")


@functools.cache
def checkpoint(kind: str) -> Path:
    return once(shared_place() / kind, functools.partial(save, kind))


@functools.cache
def opened(kind: str, engine: str = "eager") -> Any:
    return getattr(anamorph, kind).from_pretrained(checkpoint(kind), backend=engine)


def depths(height: int = 16, width: int = 20, count: int = 1) -> torch.Tensor:
    y, x = np.indices((height, width), np.float32)
    return torch.from_numpy(np.stack([3 + np.sin(x / (3 + n)) * y for n in range(count)]))


SMALL = picture(16, 20)
CALLS: dict[str, dict[str, Any]] = {
    "StableDiffusionDepth2ImgPipeline": {"image": SMALL, "depth_map": depths(), "strength": 0.6},
    "StableDiffusionInstructPix2PixPipeline": {"image": SMALL, "image_guidance_scale": 1.4},
    "StableDiffusionUpscalePipeline": {"image": [picture(8, 12), picture(8, 12, hue=1)]},
    "StableDiffusionLatentUpscalePipeline": {"image": [SMALL, picture(16, 20, hue=1)]},
}


def call(kind: str, **changes: Any) -> dict[str, Any]:
    """Two prompts."""
    return {"prompt": ["a red cat", "a photo of dogs"], "negative_prompt": ["", "blue"], "num_inference_steps": 5,
            "guidance_scale": 5.0, **CALLS[kind], **changes}  # fmt: skip


def difference(kind: str, changes: dict[str, Any], here: dict[str, Any] | None = None) -> tuple[float, float]:
    arguments = call(kind, **changes)
    seeds = arguments.pop("seeds", (3, 4))
    expected = listened(kind, checkpoint(kind), seeds, EXTRAS[kind], **arguments)
    return worst(ours(opened(kind), seeds, **{**arguments, **(here or {})}), expected)


DEPTH, PIX, FOURFOLD, TWOFOLD = KINDS
CHANGES: list[tuple[str, dict[str, Any]]] = [
    (DEPTH, {}),
    (DEPTH, {"guidance_scale": 1.0, "strength": 1.0}),
    (DEPTH, {"depth_map": depths(33, 7, 2), "image": [SMALL, picture(16, 20, hue=1)]}),
    (PIX, {}),
    (PIX, {"image_guidance_scale": 0.9}),
    (PIX, {"guidance_scale": 1.0}),
    (PIX, {"num_images_per_prompt": 2, "seeds": (1, 2, 3, 4)}),
    (FOURFOLD, {}),
    (FOURFOLD, {"noise_level": 0, "guidance_scale": 1.0}),
    (FOURFOLD, {"image": picture(10, 13), "prompt": "a cat", "negative_prompt": None, "seeds": (1,), "eta": 0.5}),
    (TWOFOLD, {}),
    (TWOFOLD, {"guidance_scale": 0}),
    (TWOFOLD, {"image": torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))}),
]


@pytest.mark.parametrize(
    ("kind", "changes"), CHANGES, ids=[f"{kind[15:25]}-{n}" for n, (kind, _) in enumerate(CHANGES)]
)
def test_every_step_equals_diffusers(agrees: Agrees, kind: str, changes: dict[str, Any]) -> None:
    agrees(kind, difference(kind, changes))


WRONG: list[tuple[str, dict[str, Any]]] = [
    (DEPTH, {"depth_map": (depths() / 10).exp()}),
    (PIX, {"image_guidance_scale": 1.41}),
    (FOURFOLD, {"noise_level": 21}),
    (TWOFOLD, {"guidance_scale": 5.01}),
    (TWOFOLD, {"image": [SMALL, picture(16, 20, hue=2)]}),
]


@pytest.mark.parametrize(("kind", "here"), WRONG, ids=[f"{case[0][15:25]}-{n}" for n, case in enumerate(WRONG)])
def test_the_comparison_notices_a_slightly_different_call(kind: str, here: dict[str, Any]) -> None:
    latents, pixels = difference(kind, {}, here)
    assert latents > LATENT_BOUND
    assert pixels > IMAGE_BOUND


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_draws_the_same(agrees: Agrees, kind: str, engine: str) -> None:
    pipe = anamorph.DiffusionPipeline.from_pretrained(exported(checkpoint(kind), engine), backend=engine)
    assert {placed.engine for placed in pipe.placement.values()} == {engine}
    agrees(kind, worst(ours(pipe, (3, 4), **call(kind)), ours(opened(kind), (3, 4), **call(kind))), engine)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_does_not_depend_on_its_batch_mates(kind: str) -> None:
    arguments = call(kind, image=SMALL, output_type="np")
    together = opened(kind)(**arguments, seed=[7, 8]).images
    alone = opened(kind)(**{**arguments, "prompt": "a photo of dogs", "negative_prompt": "blue"}, seed=8).images
    assert np.abs(together[1] - alone[0]).max() <= 1e-5
    assert np.abs(together[0] - alone[0]).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_in_diffusers(kind: str, tmp_path: Path) -> None:
    opened(kind).save_pretrained(tmp_path)
    expected = ours(opened(kind), (3, 4), **call(kind)).images
    images = listened(kind, tmp_path, (3, 4), EXTRAS[kind], **call(kind)).images
    assert np.abs(images - expected).max() <= IMAGE_BOUND


@pytest.mark.parametrize("size", [(5, 7), (12, 3), (33, 40)])
def test_depths_are_resized_as_pytorch_does(size: tuple[int, int]) -> None:
    values = depths(12, 17, 2)
    expected = torch.nn.functional.interpolate(values[:, None], size=size, mode="bicubic", align_corners=False)
    assert np.abs(bicubic(values.numpy(), size) - expected[:, 0].numpy()).max() <= 1e-5 * values.abs().max()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (DEPTH, {"depth_map": None}, "image without depth_map; this task starts from image and depth_map"),
    (DEPTH, {"depth_map": torch.ones(1, 8, 8)}, "depth_map is the same everywhere"),
    (DEPTH, {"depth_map": torch.full((1, 8, 8), torch.nan)}, "expected finite numbers"),
    (DEPTH, {"depth_map": depths(8, 8, 3)}, "3 of depth_map for 2 pictures"),
    (DEPTH, {"depth_map": SMALL}, "depth_map is Image, expected a torch tensor"),
    (DEPTH, {"strength": 1.2}, "strength is 1.2"),
    (PIX, {"image_guidance_scale": -1}, "image_guidance_scale is -1"),
    (PIX, {"image": None}, "image is missing"),
    (PIX, {"image": SMALL.convert("L")}, "image has mode L, expected RGB"),
    (FOURFOLD, {"noise_level": 351}, "noise_level is 351, expected 0 to 350"),
    (FOURFOLD, {"noise_level": 2.5}, "noise_level is 2.5"),
    (FOURFOLD, {"image": torch.zeros(2, 4, 8, 8)}, "image holds latents; this task starts from pictures"),
    (TWOFOLD, {"image": [SMALL] * 3}, "3 of image for 2 pictures"),
    (TWOFOLD, {"prompt": None, "prompt_embeds": np.zeros((2, 77, 32))}, "without pooled_prompt_embeds"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), REFUSED, ids=[case[2] for case in REFUSED])
def test_wrong_arguments_are_named(kind: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        opened(kind, "null")(**{**call(kind), "seed": 1, **changes})


def test_a_checkpoint_of_another_task_is_refused(sd1: Path) -> None:
    with pytest.raises(ConfigError, match=r"the unet takes 4 channels, .* feeds it 8"):
        anamorph.StableDiffusionInstructPix2PixPipeline.from_pretrained(sd1, backend="null")
