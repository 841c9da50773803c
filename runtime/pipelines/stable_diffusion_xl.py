"""SDXL (Podell et al. 2023, arXiv:2307.01952): two text encoders, micro-conditioning, a base and a refiner."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from anamorph.pipelines import micro
from anamorph.pipelines.latent_diffusion import LatentDiffusion
from anamorph.pipelines.prompts import Family, guidance_embedding, texts
from anamorph.pipelines.signature import Signature
from anamorph.pipelines.slots import IMAGE_ENCODER, PROCESSOR, SCHEDULER, TOKENIZER, Slot, Slots, model
from anamorph.pipelines.stable_diffusion import RETURNED, SHOWN
from anamorph.pipelines.tasks import Task, from_noise, from_picture, inpaint, plain_or_inpainting
from anamorph.pipelines.texts import penultimate_states

FAMILY = Family(
    penultimate_states, (texts, micro.told_numbers, guidance_embedding), micro.fields, micro.check_models,
    unused_layers=1,
)  # fmt: skip


def _slots(*vae_parts: str) -> Slots:
    return {
        "vae": model("AutoencoderKL", parts=vae_parts, wide=True),
        "text_encoder": model("CLIPTextModel", optional=True),
        "text_encoder_2": model("CLIPTextModelWithProjection"),
        "tokenizer": Slot("tokenizer", optional=True),
        "tokenizer_2": TOKENIZER,
        "unet": model("UNet2DConditionModel"),
        "scheduler": SCHEDULER,
        "image_encoder": IMAGE_ENCODER,
        "feature_extractor": PROCESSOR,
    }


DRAWING = _slots("vae_decoder")
EDITING = _slots("vae_decoder", "vae_encoder")
BASE: Mapping[str, Any] = MappingProxyType({"force_zeros_for_empty_prompt": True, "add_watermarker": None})
REFINING: Mapping[str, Any] = MappingProxyType({micro.AESTHETIC: False, **BASE})

STEPS = "num_inference_steps timesteps sigmas"
GUIDED = "guidance_scale negative_prompt negative_prompt_2 num_images_per_prompt eta generator latents"
EMBEDDED = (
    "prompt_embeds negative_prompt_embeds pooled_prompt_embeds negative_pooled_prompt_embeds "
    f"{SHOWN} {RETURNED} cross_attention_kwargs"
)
TOLD = (
    "guidance_rescale original_size crops_coords_top_left target_size negative_original_size "
    "negative_crops_coords_top_left negative_target_size"
)
SCORED = "aesthetic_score negative_aesthetic_score"
WATCHED = (
    "clip_skip callback_on_step_end callback_on_step_end_tensor_inputs * guidance_interval step_caching "
    "prompt_weighting long_prompts seed"
)


class StableDiffusionXLPipeline(LatentDiffusion):
    """Text to image with two text encoders."""

    SLOTS: ClassVar[Slots] = DRAWING
    OPTIONS: ClassVar[Mapping[str, Any]] = BASE
    FAMILY: ClassVar[Family] = FAMILY
    TAKES = Signature.of(
        f"prompt prompt_2 height width {STEPS} denoising_end {GUIDED} {EMBEDDED} {TOLD} {WATCHED}", guidance_scale=5.0
    )
    TASK = Task(from_noise)


class StableDiffusionXLImg2ImgPipeline(LatentDiffusion):
    """Image to image, with a base or a refiner; or a picture drawn on from where another pipeline left it."""

    SLOTS: ClassVar[Slots] = EDITING
    OPTIONS: ClassVar[Mapping[str, Any]] = REFINING
    FAMILY: ClassVar[Family] = FAMILY
    TAKES = Signature.of(
        f"prompt prompt_2 image strength {STEPS} denoising_start denoising_end {GUIDED} {EMBEDDED} {TOLD} {SCORED} "
        f"{WATCHED}",
        strength=0.3, guidance_scale=5.0,
    )  # fmt: skip
    TASK = Task(from_picture, ("image",))


class StableDiffusionXLInpaintPipeline(LatentDiffusion):
    """Inpainting, with a model made for that, a base or a refiner."""

    SLOTS: ClassVar[Slots] = EDITING
    OPTIONS: ClassVar[Mapping[str, Any]] = REFINING
    FAMILY: ClassVar[Family] = FAMILY
    TAKES = Signature.of(
        "prompt prompt_2 image mask_image masked_image_latents height width padding_mask_crop strength "
        f"{STEPS} denoising_start denoising_end {GUIDED} {EMBEDDED} {TOLD} {SCORED} {WATCHED}",
        strength=0.9999,
    )
    TASK = Task(inpaint, ("image", "mask_image"), channels=plain_or_inpainting)
