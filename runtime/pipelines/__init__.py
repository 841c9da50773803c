"""Pipelines: pure orchestration over engines."""

from anamorph.pipelines.adapter import StableDiffusionAdapterPipeline, StableDiffusionXLAdapterPipeline
from anamorph.pipelines.auto import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.conditioned import StableDiffusionDepth2ImgPipeline, StableDiffusionInstructPix2PixPipeline
from anamorph.pipelines.controlnet import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)
from anamorph.pipelines.controlnet_union import (
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionInpaintPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from anamorph.pipelines.latent_consistency import (
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
)
from anamorph.pipelines.latent_diffusion import LatentDiffusion
from anamorph.pipelines.latent_text import LDMTextToImagePipeline
from anamorph.pipelines.nets import MultiAdapter, MultiControlNetModel, MultiControlNetUnionModel
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
from anamorph.pipelines.upscaling import StableDiffusionLatentUpscalePipeline, StableDiffusionUpscalePipeline

__all__ = [
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "DDIMPipeline",
    "DDPMPipeline",
    "DiTPipeline",
    "DiffusionPipeline",
    "LDMTextToImagePipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "LatentDiffusion",
    "MultiAdapter",
    "MultiControlNetModel",
    "MultiControlNetUnionModel",
    "PipelineOutput",
    "StableDiffusionAdapterPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionLatentUpscalePipeline",
    "StableDiffusionPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionXLAdapterPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
    "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPipeline",
]
