"""Pipelines: pure orchestration over engines."""

from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.latent_diffusion import LatentDiffusion
from anamorph.pipelines.latent_text import LDMTextToImagePipeline
from anamorph.pipelines.outputs import PipelineOutput
from anamorph.pipelines.stable_diffusion import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from anamorph.pipelines.stable_diffusion_xl import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from anamorph.pipelines.unconditional import DDIMPipeline, DDPMPipeline, DiTPipeline

__all__ = [
    "DDIMPipeline",
    "DDPMPipeline",
    "DiTPipeline",
    "DiffusionPipeline",
    "LDMTextToImagePipeline",
    "LatentDiffusion",
    "PipelineOutput",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPipeline",
]
