"""CLIP's picture encoder."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from anamorph.config import Config
from anamorph.encoder_interfaces import VISION
from anamorph.errors import ConfigError, InputError
from anamorph.models.base import Model
from anamorph.models.clip import ACTIVATIONS, FOREIGN, Encoder, check_heads
from anamorph.models.linear import Linear
from anamorph.models.outputs import ImageProjectionOutput, PooledOutput

ONLY: Mapping[str, tuple[Any, ...]] = {"hidden_act": tuple(ACTIVATIONS), "attention_dropout": (0.0,)}


class PatchEmbeddings(nn.Module):
    """Pictures [B, C, s, s] -> one token for the whole and one per patch, with positions: [B, 1 + s^2/p^2, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, side = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, side, stride=side, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // side) ** 2 + 1, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat((whole, patches), dim=1) + self.position_embedding.weight


class CLIPVisionModel(Model):
    """Pictures [B, C, s, s] -> states [B, 1 + s^2/p^2, D], and the normed one of the whole picture [B, D].

    Source: Radford et al. 2021 (arXiv:2103.00020), section 2.4; Dosovitskiy et al. 2020 (arXiv:2010.11929).
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = VISION
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = ONLY
    FOREIGN: ClassVar[tuple[str, ...]] = FOREIGN
    STEM: ClassVar[str] = "model"
    HARMLESS: ClassVar[tuple[str, ...]] = ("*.position_ids",)
    PARTS: ClassVar[Mapping[str, str]] = {"image_encoder": "states"}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        full = self.config
        self.embeddings = PatchEmbeddings(full)
        # CLIP's own misspelling, which every checkpoint carries.
        self.pre_layrnorm = nn.LayerNorm(full.hidden_size, eps=full.layer_norm_eps)
        self.encoder = Encoder(full, causal=False)
        self.post_layernorm = nn.LayerNorm(full.hidden_size, eps=full.layer_norm_eps)

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete({"architectures": [cls.__name__], "model_type": "clip_vision_model", **config})
        check_heads(cls.__name__, full)
        for key in ("image_size", "patch_size"):
            if not isinstance(full[key], int):
                raise ConfigError(f"{cls.__name__} does not serve {key}={full[key]!r}; it serves squares, one number")
        return full

    @classmethod
    def rename(cls, name: str) -> str:
        return name.removeprefix("vision_model.")

    @classmethod
    def stored_name(cls, name: str) -> str:
        return f"vision_model.{name}"

    def states(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Pictures -> (last_hidden_state [B, S, D], pooler_output [B, D], every layer's states [B, S, D] ...)."""
        side = self.config.image_size
        if any(size != side for size in pixel_values.shape[2:]):
            raise InputError(f"pixel_values are {list(pixel_values.shape[2:])}, expected {side} x {side}; resize them")
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))
        return hidden[-1], self.post_layernorm(hidden[-1][:, 0]), *hidden

    @overload
    def forward(
        self, pixel_values: Tensor, *, output_hidden_states: bool = False, return_dict: Literal[True] = True
    ) -> PooledOutput: ...
    @overload
    def forward(
        self, pixel_values: Tensor, *, output_hidden_states: bool = False, return_dict: bool
    ) -> PooledOutput | tuple[Any, ...]: ...
    def forward(
        self, pixel_values: Tensor, *, output_hidden_states: bool = False, return_dict: bool = True
    ) -> PooledOutput | tuple[Any, ...]:
        """Encode pictures, normalised as CLIP's processor does, [B, C, s, s].

        Raises InputError: another size than the configuration's `image_size`.
        """
        last, pooled, *hidden = self.states(pixel_values)
        output = PooledOutput(last, pooled, tuple(hidden) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()


class CLIPVisionModelWithProjection(Model):
    """`CLIPVisionModel` and a linear map of its pooled state into the space shared with texts, [B, P]."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = VISION
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = ONLY
    FOREIGN: ClassVar[tuple[str, ...]] = FOREIGN
    STEM: ClassVar[str] = "model"
    HARMLESS: ClassVar[tuple[str, ...]] = CLIPVisionModel.HARMLESS
    PARTS: ClassVar[Mapping[str, str]] = CLIPVisionModel.PARTS

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.vision_model = CLIPVisionModel(**self.config)
        self.visual_projection = Linear(self.config.hidden_size, self.config.projection_dim, bias=False)

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        return super().complete({"architectures": [cls.__name__], "model_type": "clip_vision_model", **config})

    def states(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Pictures -> (image_embeds [B, P], last_hidden_state [B, S, D], every layer's states [B, S, D] ...)."""
        last, pooled, *hidden = self.vision_model.states(pixel_values)
        return self.visual_projection(pooled), last, *hidden

    @overload
    def forward(
        self, pixel_values: Tensor, *, output_hidden_states: bool = False, return_dict: Literal[True] = True
    ) -> ImageProjectionOutput: ...
    @overload
    def forward(
        self, pixel_values: Tensor, *, output_hidden_states: bool = False, return_dict: bool
    ) -> ImageProjectionOutput | tuple[Any, ...]: ...
    def forward(
        self, pixel_values: Tensor, *, output_hidden_states: bool = False, return_dict: bool = True
    ) -> ImageProjectionOutput | tuple[Any, ...]:
        """Encode pictures, normalised as CLIP's processor does, [B, C, s, s].

        Raises InputError: another size than the configuration's `image_size`.
        """
        embeds, last, *hidden = self.states(pixel_values)
        output = ImageProjectionOutput(embeds, last, tuple(hidden) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()
