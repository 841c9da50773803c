"""The transformer that estimates how near each pixel is (DPT)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.config import Config
from anamorph.errors import ConfigError
from anamorph.models.attention import multi_head
from anamorph.models.base import Model
from anamorph.models.bit import STAGES, Backbone, backbone_config
from anamorph.models.clip import FOREIGN
from anamorph.models.dpt_fusion import Head, Neck, ready_stages
from anamorph.models.linear import Linear
from anamorph.models.outputs import DepthEstimatorOutput


class PatchEmbeddings(nn.Module):
    """Pictures [B, C, H, W] -> a vector for each patch, as a picture [B, D, H / p, W / p]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        side = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, side, stride=side)

    def forward(self, pixels: Tensor) -> Tensor:
        patches: Tensor = self.projection(pixels)
        return patches


class Embeddings(nn.Module):
    """Pictures -> tokens with their places [B, 1 + h w, D], the whole first, and the features of a hybrid's stages."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.patch_embeddings = self.backbone = None
        if config.is_hybrid:
            backbone = backbone_config(config.backbone_config)
            self.backbone = Backbone(backbone)
            self.projection = nn.Conv2d(backbone.hidden_sizes[STAGES - 1], width, 1)
        else:
            self.patch_embeddings = PatchEmbeddings(config)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        features: list[Tensor] = []
        if self.backbone is not None:
            features = self.backbone(pixels)
            patches = self.projection(features[-1])
        else:
            assert self.patch_embeddings is not None
            patches = self.patch_embeddings(pixels)
        whole = self.cls_token.expand(pixels.shape[0], -1, -1)
        return torch.cat((whole, patches.flatten(2).transpose(1, 2)), 1) + self.position_embeddings, features


def dense(width: int, out: int) -> nn.ModuleDict:
    """A linear layer under the name that checkpoints have."""
    return nn.ModuleDict({"dense": Linear(width, out)})


class Layer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)) (Dosovitskiy et al. 2020, arXiv:2010.11929, eq. 2 and 3)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        maps = {name: Linear(width, width, bias=config.qkv_bias) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict({"attention": nn.ModuleDict(maps), "output": dense(width, width)})
        self.intermediate = dense(width, config.intermediate_size)
        self.output = dense(config.intermediate_size, width)
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        normed, maps, out = self.layernorm_before(x), self.attention["attention"], self.attention["output"]
        q, k, v = (maps[name](normed) for name in ("query", "key", "value"))  # type: ignore[index]
        x = x + out["dense"](multi_head(q, k, v, self.heads))  # type: ignore[index]
        total: Tensor = x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))
        return total


class Vision(nn.Module):
    """The tokens after each layer, and the features of a hybrid's stages."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # stored, and of no use here

    def forward(self, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        x, features = self.embeddings(pixels)
        states = []
        layers: Any = self.encoder["layer"]
        for layer in layers:
            x = layer(x)
            states.append(x)
        return states, features


class DPTForDepthEstimation(Model):
    """Pictures [B, C, s, s] -> inverse depth of each pixel in a unit of its own, [B, h, w].

    Source: Ranftl et al. 2021 (arXiv:2103.13413), section 3; the hybrid's first two stages are those of `Backbone`.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "image_size": 384,
        "patch_size": 16,
        "num_channels": 3,
        "is_hybrid": False,
        "qkv_bias": True,
        "backbone_out_indices": (2, 5, 8, 11),
        "readout_type": "project",
        "reassemble_factors": (4, 2, 1, 0.5),
        "neck_hidden_sizes": (96, 192, 384, 768),
        "fusion_hidden_size": 256,
        "head_in_index": -1,
        "use_batch_norm_in_fusion_residual": False,
        "use_bias_in_fusion_residual": None,
        "add_projection": False,
        "backbone_featmap_shape": None,
        "neck_ignore_stages": None,
        "backbone_config": None,
    }
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("gelu",),
        "readout_type": ("project", "add", "ignore"),
        "head_in_index": (-1,),
        "use_batch_norm_in_fusion_residual": (False,),
        "use_bias_in_fusion_residual": (None, True),
        "neck_ignore_stages": (None, (), (0, 1)),
    }
    FOREIGN: ClassVar[tuple[str, ...]] = (
        *FOREIGN, "auxiliary_loss_weight", "use_auxiliary_head", "semantic_classifier_dropout", "pooler_act",
        "semantic_loss_ignore_index", "pooler_output_size", "backbone", "backbone_kwargs", "use_pretrained_backbone",
        "use_timm_backbone",
    )  # fmt: skip
    STEM: ClassVar[str] = "model"
    PARTS: ClassVar[Mapping[str, str]] = {"depth_estimator": "nearness"}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.dpt = Vision(self.config)
        self.neck = Neck(self.config)
        self.head = Head(self.config)

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete({"architectures": [cls.__name__], "model_type": "dpt", **config})
        if not full.is_hybrid and full.backbone_config is not None:
            raise ConfigError(f"{cls.__name__} serves no backbone_config without is_hybrid; leave it out")
        for key in ("image_size", "patch_size"):
            if not isinstance(full[key], int):
                raise ConfigError(f"{cls.__name__} does not serve {key}={full[key]!r}; it serves squares, one number")
        return full

    def nearness(self, pixel_values: Tensor) -> tuple[Tensor]:
        """Pictures, normalised as DPT's processor does -> ([B, h, w],)."""
        states, features = self.dpt(pixel_values)
        ready = ready_stages(self.config)
        wanted = self.config.backbone_out_indices[len(ready) :]
        stages = [*features[: len(ready)], *(state for n, state in enumerate(states) if n in wanted)]
        return (self.head(self.neck(stages)),)

    @overload
    def forward(self, pixel_values: Tensor, *, return_dict: Literal[True] = True) -> DepthEstimatorOutput: ...
    @overload
    def forward(self, pixel_values: Tensor, *, return_dict: bool) -> DepthEstimatorOutput | tuple[Tensor]: ...
    def forward(self, pixel_values: Tensor, *, return_dict: bool = True) -> DepthEstimatorOutput | tuple[Tensor]:
        """Estimate the depth of pictures, normalised as DPT's processor does, [B, C, s, s]."""
        (near,) = self.nearness(pixel_values)
        return DepthEstimatorOutput(near) if return_dict else (near,)
