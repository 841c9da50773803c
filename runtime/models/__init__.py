"""PyTorch models in diffusers' and transformers' layout, by the class names that checkpoints use."""

from collections.abc import Mapping
from types import MappingProxyType

from anamorph.models.adapter import T2IAdapter
from anamorph.models.base import Model
from anamorph.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from anamorph.models.clip_vision import CLIPVisionModel, CLIPVisionModelWithProjection
from anamorph.models.controlnet import ControlNetModel
from anamorph.models.controlnet_union import ControlNetUnionModel
from anamorph.models.dit import DiTTransformer2DModel
from anamorph.models.dpt import DPTForDepthEstimation
from anamorph.models.ldm_bert import LDMBertModel
from anamorph.models.safety import StableDiffusionSafetyChecker
from anamorph.models.tiny import AutoencoderTiny
from anamorph.models.unet import UNet2DConditionModel
from anamorph.models.unet2d import UNet2DModel
from anamorph.models.vae import AutoencoderKL
from anamorph.models.vq import VQModel

MODELS: Mapping[str, type[Model]] = MappingProxyType(
    {
        **{
            model.__name__: model
            for model in (
                UNet2DConditionModel,
                ControlNetModel,
                ControlNetUnionModel,
                T2IAdapter,
                UNet2DModel,
                DiTTransformer2DModel,
                AutoencoderKL,
                AutoencoderTiny,
                VQModel,
                CLIPTextModel,
                CLIPTextModelWithProjection,
                CLIPVisionModel,
                CLIPVisionModelWithProjection,
                LDMBertModel,
                StableDiffusionSafetyChecker,
                DPTForDepthEstimation,
            )
        },
        # What diffusers called the class-conditional transformer before it had a class of its own.
        "Transformer2DModel": DiTTransformer2DModel,
    }
)
"""Class name in `model_index.json` -> model."""

__all__ = [
    "MODELS",
    "AutoencoderKL",
    "AutoencoderTiny",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "ControlNetModel",
    "ControlNetUnionModel",
    "DPTForDepthEstimation",
    "DiTTransformer2DModel",
    "LDMBertModel",
    "Model",
    "StableDiffusionSafetyChecker",
    "T2IAdapter",
    "UNet2DConditionModel",
    "UNet2DModel",
    "VQModel",
]
