"""PyTorch models in diffusers' and transformers' layout, by the class names that checkpoints use."""

from collections.abc import Mapping
from types import MappingProxyType

from anamorph.models.base import Model
from anamorph.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from anamorph.models.unet import UNet2DConditionModel
from anamorph.models.vae import AutoencoderKL

MODELS: Mapping[str, type[Model]] = MappingProxyType(
    {
        model.__name__: model
        for model in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection)
    }
)
"""Class name in `model_index.json` -> model."""

__all__ = ["MODELS", "AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection", "Model", "UNet2DConditionModel"]
