"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022): each class declares its components, arguments and task."""

from collections.abc import Mapping
from typing import Any, ClassVar

from anamorph.pipelines.latent_diffusion import LatentDiffusion
from anamorph.pipelines.signature import Signature
from anamorph.pipelines.slots import IMAGE_ENCODER, PROCESSOR, SCHEDULER, TOKENIZER, Slot, Slots, model
from anamorph.pipelines.tasks import Task, from_noise, from_picture, inpaint, plain_or_inpainting

VAES = ("AutoencoderKL", "AutoencoderTiny")
DRAWING: Slots = {
    "vae": model(*VAES, parts=("vae_decoder",)),
    "text_encoder": model("CLIPTextModel"),
    "tokenizer": TOKENIZER,
    "unet": model("UNet2DConditionModel"),
    "scheduler": SCHEDULER,
    "safety_checker": model("StableDiffusionSafetyChecker", optional=True),
    "feature_extractor": PROCESSOR,
    "image_encoder": IMAGE_ENCODER,
}
EDITING: Mapping[str, Slot] = {**DRAWING, "vae": model(*VAES, parts=("vae_decoder", "vae_encoder"))}
OPTIONS: Mapping[str, Any] = {"requires_safety_checker": False}

GUIDED = "num_inference_steps timesteps sigmas guidance_scale negative_prompt num_images_per_prompt eta generator"
SHOWN = "ip_adapter_image ip_adapter_image_embeds"
RETURNED = "output_type return_dict"
EMBEDDED = f"prompt_embeds negative_prompt_embeds {RETURNED} cross_attention_kwargs"
LOOKING = f"prompt_embeds negative_prompt_embeds {SHOWN} {RETURNED} cross_attention_kwargs"
"""Of pipelines that take pictures as prompts."""
WATCHED = "clip_skip callback_on_step_end callback_on_step_end_tensor_inputs"
WHEN = "guidance_interval"
OURS = "step_caching prompt_weighting long_prompts seed"
"""What diffusers' calls do not take, beside `WHEN`, which only guided ones take."""


class StableDiffusionPipeline(LatentDiffusion):
    """Text to image with a CLIP text encoder, a conditional UNet and an autoencoder."""

    SLOTS: ClassVar[Slots] = DRAWING
    OPTIONS: ClassVar[Mapping[str, Any]] = OPTIONS
    TAKES = Signature.of(f"prompt height width {GUIDED} latents {LOOKING} guidance_rescale {WATCHED} * {WHEN} {OURS}")
    TASK = Task(from_noise)


class StableDiffusionImg2ImgPipeline(LatentDiffusion):
    """Image to image: a picture is noised by `strength` and drawn anew (SDEdit, Meng et al. 2022)."""

    SLOTS: ClassVar[Slots] = EDITING
    OPTIONS: ClassVar[Mapping[str, Any]] = OPTIONS
    TAKES = Signature.of(
        f"prompt image strength {GUIDED} {LOOKING} {WATCHED} * guidance_rescale {WHEN} {OURS}", strength=0.8
    )
    TASK = Task(from_picture, ("image",))


class StableDiffusionInpaintPipeline(LatentDiffusion):
    """Inpainting: draws where a mask is white, with a model made for that or with any other."""

    SLOTS: ClassVar[Slots] = EDITING
    OPTIONS: ClassVar[Mapping[str, Any]] = OPTIONS
    TAKES = Signature.of(
        "prompt image mask_image masked_image_latents height width padding_mask_crop strength "
        f"{GUIDED} latents {LOOKING} {WATCHED} * guidance_rescale {WHEN} {OURS}",
        strength=1.0,
    )
    TASK = Task(inpaint, ("image", "mask_image"), channels=plain_or_inpainting)
