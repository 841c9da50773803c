"""Anamorph: one diffusion checkpoint, every engine, the same picture.

Importing this package imports no engine and none of its heavy parts; each public name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anamorph import errors as errors
    from anamorph.bert_tokenizer import BertTokenizer
    from anamorph.clip_image import CLIPImageProcessor
    from anamorph.models import (
        AutoencoderKL,
        AutoencoderTiny,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
        DiTTransformer2DModel,
        LDMBertModel,
        StableDiffusionSafetyChecker,
        UNet2DConditionModel,
        UNet2DModel,
        VQModel,
    )
    from anamorph.pipelines import (
        DDIMPipeline,
        DDPMPipeline,
        DiffusionPipeline,
        DiTPipeline,
        LDMTextToImagePipeline,
        StableDiffusionDepth2ImgPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionLatentUpscalePipeline,
        StableDiffusionPipeline,
        StableDiffusionUpscalePipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
        StableDiffusionXLPipeline,
    )
    from anamorph.plugins import hookimpl, list_backends
    from anamorph.schedulers import (
        CMStochasticIterativeScheduler,
        DDIMInverseScheduler,
        DDIMScheduler,
        DDPMScheduler,
        DEISMultistepScheduler,
        DPMSolverMultistepInverseScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSDEScheduler,
        DPMSolverSinglestepScheduler,
        EDMDPMSolverMultistepScheduler,
        EDMEulerScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        HeunDiscreteScheduler,
        IPNDMScheduler,
        KDPM2AncestralDiscreteScheduler,
        KDPM2DiscreteScheduler,
        LCMScheduler,
        LMSDiscreteScheduler,
        PNDMScheduler,
        RePaintScheduler,
        SASolverScheduler,
        TCDScheduler,
        UniPCMultistepScheduler,
    )
    from anamorph.tokenizer import ClipTokenizer

_HOMES = {
    "BertTokenizer": "bert_tokenizer",
    "CLIPImageProcessor": "clip_image",
    "AutoencoderKL": "models",
    "AutoencoderTiny": "models",
    "CLIPTextModel": "models",
    "CLIPTextModelWithProjection": "models",
    "CLIPVisionModel": "models",
    "CLIPVisionModelWithProjection": "models",
    "DiTTransformer2DModel": "models",
    "LDMBertModel": "models",
    "StableDiffusionSafetyChecker": "models",
    "UNet2DConditionModel": "models",
    "UNet2DModel": "models",
    "VQModel": "models",
    "DDIMPipeline": "pipelines",
    "DDPMPipeline": "pipelines",
    "DiTPipeline": "pipelines",
    "DiffusionPipeline": "pipelines",
    "LDMTextToImagePipeline": "pipelines",
    "StableDiffusionImg2ImgPipeline": "pipelines",
    "StableDiffusionDepth2ImgPipeline": "pipelines",
    "StableDiffusionInstructPix2PixPipeline": "pipelines",
    "StableDiffusionLatentUpscalePipeline": "pipelines",
    "StableDiffusionUpscalePipeline": "pipelines",
    "StableDiffusionInpaintPipeline": "pipelines",
    "StableDiffusionPipeline": "pipelines",
    "StableDiffusionXLImg2ImgPipeline": "pipelines",
    "StableDiffusionXLInpaintPipeline": "pipelines",
    "StableDiffusionXLPipeline": "pipelines",
    "list_backends": "plugins",
    "hookimpl": "plugins",
    "CMStochasticIterativeScheduler": "schedulers",
    "DDIMInverseScheduler": "schedulers",
    "DDIMScheduler": "schedulers",
    "DDPMScheduler": "schedulers",
    "DEISMultistepScheduler": "schedulers",
    "DPMSolverMultistepInverseScheduler": "schedulers",
    "DPMSolverMultistepScheduler": "schedulers",
    "DPMSolverSDEScheduler": "schedulers",
    "DPMSolverSinglestepScheduler": "schedulers",
    "EDMDPMSolverMultistepScheduler": "schedulers",
    "EDMEulerScheduler": "schedulers",
    "EulerAncestralDiscreteScheduler": "schedulers",
    "EulerDiscreteScheduler": "schedulers",
    "FlowMatchEulerDiscreteScheduler": "schedulers",
    "FlowMatchHeunDiscreteScheduler": "schedulers",
    "HeunDiscreteScheduler": "schedulers",
    "IPNDMScheduler": "schedulers",
    "KDPM2AncestralDiscreteScheduler": "schedulers",
    "KDPM2DiscreteScheduler": "schedulers",
    "LCMScheduler": "schedulers",
    "LMSDiscreteScheduler": "schedulers",
    "PNDMScheduler": "schedulers",
    "RePaintScheduler": "schedulers",
    "SASolverScheduler": "schedulers",
    "TCDScheduler": "schedulers",
    "UniPCMultistepScheduler": "schedulers",
    "ClipTokenizer": "tokenizer",
}

__all__ = [
    "AutoencoderKL",
    "AutoencoderTiny",
    "BertTokenizer",
    "CLIPImageProcessor",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "CMStochasticIterativeScheduler",
    "ClipTokenizer",
    "DDIMInverseScheduler",
    "DDIMPipeline",
    "DDIMScheduler",
    "DDPMPipeline",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "DiTPipeline",
    "DiTTransformer2DModel",
    "DiffusionPipeline",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LDMBertModel",
    "LDMTextToImagePipeline",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionLatentUpscalePipeline",
    "StableDiffusionPipeline",
    "StableDiffusionSafetyChecker",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPipeline",
    "TCDScheduler",
    "UNet2DConditionModel",
    "UNet2DModel",
    "UniPCMultistepScheduler",
    "VQModel",
    "errors",
    "hookimpl",
    "list_backends",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # a tenth of a second that most programs need not spend

        return version("anamorph")
    if name == "errors":
        return importlib.import_module("anamorph.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'anamorph' has no attribute {name!r}")
    return getattr(importlib.import_module(f"anamorph.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
