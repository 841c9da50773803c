"""Stable Diffusion that also looks at a picture: at its depth, or at itself while it is told how to change it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from anamorph.errors import InputError
from anamorph.pipelines.latent_diffusion import LatentDiffusion
from anamorph.pipelines.prompts import Family, texts
from anamorph.pipelines.request import Request
from anamorph.pipelines.sampling import Guidance
from anamorph.pipelines.signature import Arguments, Signature
from anamorph.pipelines.slots import SCHEDULER, TOKENIZER, UNUSED, Slots, model
from anamorph.pipelines.stable_diffusion import EDITING, EMBEDDED, OPTIONS, VAES, WATCHED
from anamorph.pipelines.tasks import Task, beside_picture, with_as_many, with_depth, with_one_more
from anamorph.pipelines.texts import last_states


class StableDiffusionDepth2ImgPipeline(LatentDiffusion):
    """Image to image that keeps the depth of the picture, which `depth_map` gives: no model here estimates it."""

    SLOTS: ClassVar[Slots] = {
        "vae": model(*VAES, parts=("vae_decoder", "vae_encoder")),
        "text_encoder": model("CLIPTextModel"),
        "tokenizer": TOKENIZER,
        "unet": model("UNet2DConditionModel"),
        "scheduler": SCHEDULER,
        "depth_estimator": UNUSED,
        "feature_extractor": UNUSED,
    }
    TAKES = Signature.of(
        "prompt image depth_map strength num_inference_steps guidance_scale negative_prompt num_images_per_prompt "
        f"eta generator {EMBEDDED} {WATCHED} * timesteps sigmas guidance_rescale seed",
        strength=0.8,
    )
    TASK = Task(with_depth, ("image", "depth_map"), channels=with_one_more)


def two_scales(request: Request) -> Guidance:
    """Guided by the picture and by the text, where both scales ask for it (Brooks et al. 2023, eq. 3)."""
    image, text = request.image_guidance_scale or 0.0, request.guidance_scale
    return Guidance((image, text) if text > 1 and image >= 1 else (), request.guidance_rescale)


def image_guidance(call: Arguments, prompts: int, *, options: Mapping[str, Any], encoders: int) -> dict[str, Any]:  # noqa: ARG001
    """How strongly the picture guides."""
    scale = call["image_guidance_scale"]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < float("inf"):
        raise InputError(f"image_guidance_scale is {scale!r}, expected a finite number of 0 or more")
    return {"image_guidance_scale": float(scale)}


class StableDiffusionInstructPix2PixPipeline(LatentDiffusion):
    """Changes a picture as the prompt says (Brooks et al. 2023, arXiv:2211.09800)."""

    SLOTS: ClassVar[Slots] = EDITING
    OPTIONS: ClassVar[Mapping[str, Any]] = OPTIONS
    TAKES = Signature.of(
        "prompt image num_inference_steps guidance_scale image_guidance_scale negative_prompt num_images_per_prompt "
        f"eta generator latents {EMBEDDED} callback_on_step_end callback_on_step_end_tensor_inputs * "
        "clip_skip timesteps sigmas guidance_rescale seed",
        num_inference_steps=100, image_guidance_scale=1.5,
    )  # fmt: skip
    BRANCHES: ClassVar[int] = 3
    FAMILY = Family(last_states, (texts,), more=image_guidance)
    TASK = Task(beside_picture, ("image",), guidance=two_scales, channels=with_as_many)
