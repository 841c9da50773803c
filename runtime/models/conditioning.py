"""Conditions of a UNet besides time and text: classes, pooled texts, sizes, pictures."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from anamorph.conditions import projection
from anamorph.config import Config
from anamorph.models.attention import multi_head
from anamorph.models.embeddings import TimestepEmbedding, sinusoids
from anamorph.models.linear import Linear

Added = Mapping[str, Tensor]


CLASS_TYPES = (None, "timestep", "identity", "projection", "simple_projection")
"""What `class_embed_type` may be."""


def class_embedding(config: Config, waves: int, time_width: int, activation: str) -> nn.Module | None:
    """What makes a vector [B, time_width] of `class_labels`; None where the model knows no classes.

    Labels are numbers [B] for a table and for "timestep" (whose layer takes their `waves`), else vectors [B, D].
    """
    kind, width = config.class_embed_type, config.get("projection_class_embeddings_input_dim", 0)
    if kind is None:
        return None if config.num_class_embeds is None else nn.Embedding(config.num_class_embeds, time_width)
    if kind == "timestep":
        return TimestepEmbedding(waves, time_width, activation=activation)
    if kind == "projection":
        return TimestepEmbedding(width, time_width)
    return Linear(width, time_width) if kind == "simple_projection" else nn.Identity()


class AttentionPooling(nn.Module):
    """One token per text: the states' mean, plus a learned vector, attends to itself and the states.

    [B, S, D] -> [B, D]. Source: Radford et al. 2021 (arXiv:2103.00020), section 2.4.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.k_proj, self.q_proj, self.v_proj = (Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=1, keepdim=True) + self.positional_embedding
        tokens = torch.cat((pooled, x), dim=1)
        return multi_head(self.q_proj(pooled), self.k_proj(tokens), self.v_proj(tokens), self.heads)[:, 0]


class TextTimeEmbedding(nn.Module):
    """norm(W pool(norm(text))): [B, S, D] -> [B, time_width]."""

    def __init__(self, width: int, time_width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.pool = AttentionPooling(heads, width)
        self.proj = Linear(width, time_width)
        self.norm2 = nn.LayerNorm(time_width)

    def forward(self, text: Tensor) -> Tensor:
        embedding: Tensor = self.norm2(self.proj(self.pool(self.norm1(text))))
        return embedding


class TextImageTimeEmbedding(nn.Module):
    """norm(W text) + V image: pooled texts and pictures [B, D] -> [B, time_width]."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.text_proj = Linear(width, time_width)
        self.text_norm = nn.LayerNorm(time_width)
        self.image_proj = Linear(width, time_width)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        embedding: Tensor = self.image_proj(image) + self.text_norm(self.text_proj(text))
        return embedding


class ImageTimeEmbedding(nn.Module):
    """norm(W image): [B, D] -> [B, time_width]."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.image_proj = Linear(width, time_width)
        self.image_norm = nn.LayerNorm(time_width)

    def forward(self, image: Tensor) -> Tensor:
        embedding: Tensor = self.image_norm(self.image_proj(image))
        return embedding


def add_embedding(config: Config, time_width: int) -> nn.Module | None:
    """The layer of `addition_embed_type`, whose vector [B, time_width] is added to the time's."""
    kind, cross = config.addition_embed_type, config.cross_attention_dim
    if kind == "text":
        return TextTimeEmbedding(config.encoder_hid_dim or cross, time_width, config.addition_embed_type_num_heads)
    if kind == "text_time":
        return TimestepEmbedding(config.projection_class_embeddings_input_dim, time_width)
    if kind == "text_image":
        return TextImageTimeEmbedding(cross, time_width)
    return ImageTimeEmbedding(config.encoder_hid_dim, time_width) if kind == "image" else None


def addition(layer: nn.Module, config: Config, text: Tensor | None, added: Added) -> Tensor:
    """The added vector [B, time_width] for a call."""
    kind = config.addition_embed_type
    if kind == "text":
        return cast(Tensor, layer(text))
    if kind == "text_time":
        return cast(Tensor, layer(text_and_sizes(config, added["text_embeds"], added["time_ids"])))
    if kind == "text_image":
        return cast(Tensor, layer(added["text_embeds"], added["image_embeds"]))
    return cast(Tensor, layer(added["image_embeds"]))


def text_and_sizes(config: Config, pooled: Tensor, numbers: Tensor) -> Tensor:
    """The pooled text [B, P] and the waves of each number of [B, N], joined: [B, P + N W].

    Source: Podell et al. 2023 (arXiv:2307.01952), section 2.2.
    """
    width: int = config.addition_time_embed_dim
    waves = sinusoids(numbers.flatten(), width, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift)
    return torch.cat((pooled, waves.reshape(-1, numbers.shape[1] * width).to(pooled.dtype)), dim=-1)


class TextImageProjection(nn.Module):
    """Ten tokens of a picture [B, D] before the projected text [B, S, E]: [B, 10 + S, D]."""

    TOKENS = 10

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.image_embeds = Linear(width, self.TOKENS * width)
        self.text_proj = Linear(text_width, width)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        tokens = torch.unflatten(self.image_embeds(image), -1, (self.TOKENS, -1))
        return torch.cat((tokens, self.text_proj(text)), dim=1)


class ImageProjection(nn.Module):
    """Thirty-two normed tokens of a picture: [B, E] -> [B, 32, D]."""

    TOKENS = 32

    def __init__(self, image_width: int, width: int) -> None:
        super().__init__()
        self.image_embeds = Linear(image_width, self.TOKENS * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.norm(torch.unflatten(self.image_embeds(image), -1, (self.TOKENS, -1)))
        return tokens


PROJECTIONS: Mapping[str, Callable[[int, int], nn.Module]] = MappingProxyType(
    {"text_proj": nn.Linear, "text_image_proj": TextImageProjection, "image_proj": ImageProjection}
)
"""`encoder_hid_dim_type` -> its layer."""


def encoder_projection(config: Config) -> nn.Module | None:
    """What makes the context of the attentions of the encoder's states; None where it is they themselves."""
    kind = projection(config)
    return None if kind is None else PROJECTIONS[kind](config.encoder_hid_dim, config.cross_attention_dim)


def context(layer: nn.Module, config: Config, text: Tensor | None, added: Added) -> Tensor:
    """The context [B, S, D] for a call."""
    kind = projection(config)
    if kind == "image_proj":
        return cast(Tensor, layer(added["image_embeds"]))
    return cast(Tensor, layer(text, added["image_embeds"]) if kind == "text_image_proj" else layer(text))
