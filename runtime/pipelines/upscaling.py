"""Stable Diffusion's upscalers: by four with a noised picture, by two on latents."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from anamorph.errors import InputError
from anamorph.pipelines.latent_diffusion import LatentDiffusion
from anamorph.pipelines.pictures import repeated
from anamorph.pipelines.prompts import Asking, Family, texts
from anamorph.pipelines.signature import Arguments, Signature
from anamorph.pipelines.slots import SCHEDULER, TOKENIZER, UNUSED, Slots, model
from anamorph.pipelines.stable_diffusion import EMBEDDED
from anamorph.pipelines.tasks import Scene, Start, Task, clean_latents, from_noise, with_as_many, with_colours
from anamorph.pipelines.texts import last_states, raw_states
from anamorph.scaling import Scaling
from anamorph.schedulers import Row, Table

SCALING = 0.08333
"""What latents of the upscaler by four are multiplied with, whatever older files of its autoencoder say."""


def beside_noised(scene: Scene) -> Start:
    """Text to image with the small picture, noised up to a level, as further channels, and that level as a class.

    Source: Ho et al. 2021 (arXiv:2106.15282), section 4.
    """
    request, small = scene.request, scene.sources.pictures
    if small is None or request.noise_level is None:
        raise InputError("image holds latents; this task starts from pictures")
    count = request.images if request.seeds is not None else len(small)
    small = repeated(small, count)
    noise = scene.noise.normal(tuple(small.shape[1:]), count)
    noised = scene.schedulers["low_res_scheduler"].add_noise(small, noise, np.array([request.noise_level]))
    dealt = [repeated(noised, request.images)] * scene.guidance.branches
    levels = np.full(scene.guidance.branches * request.images, request.noise_level, np.int64)
    start = from_noise(scene)
    beside = {"image": scene.arrays.put(np.concatenate(dealt))}
    return replace(start, beside=beside, joined=("image",), conditions={"class_labels": levels})


def noise_level(call: Arguments, prompts: int, *, options: Mapping[str, Any], encoders: int) -> dict[str, Any]:  # noqa: ARG001
    """Up to which training timestep the small picture is noised."""
    level, most = call["noise_level"], options["max_noise_level"]
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= most:
        raise InputError(f"noise_level is {level!r}, expected 0 to {most}")
    return {"noise_level": level}


class StableDiffusionUpscalePipeline(LatentDiffusion):
    """Pictures four times as large (the autoencoder's pixels per latent), with a text (Rombach et al. 2022)."""

    SLOTS: ClassVar[Slots] = {
        "vae": model("AutoencoderKL", parts=("vae_decoder",)),
        "text_encoder": model("CLIPTextModel"),
        "tokenizer": TOKENIZER,
        "unet": model("UNet2DConditionModel"),
        "low_res_scheduler": SCHEDULER,
        "scheduler": SCHEDULER,
        "safety_checker": UNUSED,
        "feature_extractor": UNUSED,
        "watermarker": UNUSED,
    }
    OPTIONS: ClassVar[Mapping[str, Any]] = {"max_noise_level": 350}
    TAKES = Signature.of(
        "prompt image num_inference_steps guidance_scale noise_level negative_prompt num_images_per_prompt eta "
        f"generator latents {EMBEDDED} clip_skip * callback_on_step_end callback_on_step_end_tensor_inputs timesteps "
        "sigmas guidance_rescale guidance_interval step_caching seed",
        num_inference_steps=75, guidance_scale=9.0, noise_level=20,
    )  # fmt: skip
    FAMILY = Family(last_states, (texts,), more=noise_level)
    TASK = Task(beside_noised, ("image",), channels=with_colours, scale=lambda factor: factor)

    @property
    def scaling(self) -> Scaling:
        return Scaling(SCALING)

    scaling.__doc__ = LatentDiffusion.scaling.__doc__


def preconditioned(table: Table) -> Table:
    """The table of a network F with D = x / (sigma^2 + 1) + sigma / sqrt(sigma^2 + 1) F and the time log(sigma) / 4.

    The scheduler's own estimate is made of D; F may have further channels, which are dropped.
    Source: Karras et al. 2022 (arXiv:2206.00364), table 1, with sigma_data = 1.
    """
    return replace(table, rows=tuple(_preconditioned(row) for row in table.rows), variance="unused")


def _preconditioned(row: Row) -> Row:
    sigma = row.sigma / row.alpha
    skip, out = 1 / (sigma**2 + 1), sigma / math.sqrt(sigma**2 + 1)
    clean = None if row.clean is None else (row.clean[0] + row.clean[1] * skip, row.clean[1] * out)
    return row._replace(
        timestep=math.log(sigma) / 4, p=row.p + row.q * skip, q=row.q * out, a=row.a + row.e * skip, e=row.e * out,
        clean=clean,
    )  # fmt: skip


def beside_latents(scene: Scene) -> Start:
    """Text to image with the small picture's latents, each twice in both directions, as further channels."""
    small = clean_latents(scene)
    grown = np.ascontiguousarray(small.repeat(2, axis=2).repeat(2, axis=3))
    start = from_noise(scene)
    beside = {"image": scene.arrays.put(np.concatenate([grown] * scene.guidance.branches))}
    return replace(start, beside=beside, joined=("image",))


LEVEL_WAVES = 64
"""How many cosines, and how many sines, tell the noise of the small picture, which is none."""


def upscaled_texts(asking: Asking) -> dict[str, NDArray[Any]]:
    """The texts' states, and beside the time the level of no noise and the pooled texts; no text at scale 0."""
    if asking.job.request.guidance_scale == 0:
        request = asking.job.request
        asking = replace(asking, job=replace(asking.job, request=replace(request, prompt=("",) * len(request.prompt))))
    told = texts(asking)
    pooled = told.pop("text_embeds")
    level = np.repeat(np.array([[1, 0]], np.float32), LEVEL_WAVES, axis=1).repeat(len(pooled), axis=0)
    return {**told, "timestep_cond": np.concatenate([level, pooled], axis=1)}


class StableDiffusionLatentUpscalePipeline(LatentDiffusion):
    """Pictures or latents twice as large, with a text (github.com/stabilityai/sd-x2-latent-upscaler)."""

    SLOTS: ClassVar[Slots] = {
        "vae": model("AutoencoderKL", parts=("vae_decoder", "vae_encoder")),
        "text_encoder": model("CLIPTextModel"),
        "tokenizer": TOKENIZER,
        "unet": model("UNet2DConditionModel"),
        "scheduler": SCHEDULER,
    }
    TAKES = Signature.of(
        "prompt image num_inference_steps guidance_scale negative_prompt generator latents prompt_embeds "
        "negative_prompt_embeds pooled_prompt_embeds negative_pooled_prompt_embeds output_type return_dict * "
        "callback_on_step_end callback_on_step_end_tensor_inputs guidance_interval step_caching seed",
        num_inference_steps=75, guidance_scale=9.0,
    )  # fmt: skip
    FAMILY = Family(raw_states, (upscaled_texts,))
    TASK = Task(beside_latents, ("image",), channels=with_as_many, scale=lambda _: 2, table=preconditioned)

    def _text_sizes(self) -> tuple[int, int, int | None]:
        width, layers, _ = super()._text_sizes()
        return width, layers, width
