"""The upscaler from the bundled model and the UNet that `train.py` has made."""

import math
from pathlib import Path

import torch

from anamorph import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from anamorph.checkpoint import BUNDLED

SCALE = 0.08333  # what this class multiplies latents with, whatever its autoencoder says
LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAMPLING = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}


def autoencoder() -> AutoencoderKL:
    """The bundled autoencoder with latents of another unit: the same pictures, and 0.08333 as scaling factor."""
    vae = AutoencoderKL.from_pretrained(BUNDLED / "vae").eval()
    factor, kept = vae.config.scaling_factor / SCALE, vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[:kept] *= factor
        vae.quant_conv.bias[:kept] *= factor
        vae.quant_conv.bias[kept:] += 2 * math.log(factor)
        vae.post_quant_conv.weight /= factor
    vae.config = vae.config.replace(scaling_factor=SCALE)
    return vae


def upscaler(unet: Path) -> StableDiffusionUpscalePipeline:
    """A pipeline that draws pictures four times as large."""
    text = DiffusionPipeline.from_pretrained(backend="eager")
    return StableDiffusionUpscalePipeline(
        vae=autoencoder(),
        text_encoder=text.text_encoder,
        tokenizer=text.tokenizer,
        unet=UNet2DConditionModel.from_pretrained(unet, torch_dtype=torch.float32),
        low_res_scheduler=DDPMScheduler(**LEVELS),
        scheduler=DDIMScheduler(**LEVELS, **SAMPLING),
    )
