"""The class-conditional transformer over patches of latents."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal, SupportsFloat, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.config import Config
from anamorph.errors import ConfigError, InputError
from anamorph.models.attention import Attention
from anamorph.models.base import Model
from anamorph.models.embeddings import TimestepEmbedding, sinusoids
from anamorph.models.linear import Linear
from anamorph.models.outputs import Transformer2DModelOutput
from anamorph.models.transformer import INNER, FeedForward
from anamorph.models.unet_blocks import timesteps

WAVES = 256
"""Width of the timestep's sinusoids."""
EPS = 1e-6
"""Of the norms whose scale and shift come from the condition."""
OTHER_FORMS: Mapping[str, Any] = {
    "cross_attention_dim": None, "num_vector_embeds": None, "use_linear_projection": False,
    "only_cross_attention": False, "double_self_attention": False, "attention_type": "default",
    "caption_channels": None, "interpolation_scale": None, "use_additional_conditions": None,
}  # fmt: skip
"""Keys of `Transformer2DModel`, which once held this model too, with their values in that case."""


@lru_cache(maxsize=4)
def positions(width: int, rows: int, columns: int, base: int) -> NDArray[np.float32]:
    """Sines and cosines of each patch's column, then of its row: [1, rows columns, width].

    omega_k = 10000^(-4 k / width), k < width / 4; grids of other sizes are stretched to `base` patches a side.
    Source: Peebles and Xie 2022 (arXiv:2212.09748), section 3.2; He et al. 2021 (arXiv:2111.06377), appendix A.1.
    """
    omega = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    places = np.meshgrid(np.arange(columns) * base / columns, np.arange(rows) * base / rows)
    angles = [np.outer(place.ravel(), omega) for place in places]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1, dtype=np.float32, casting="same_kind")[None]


class PatchEmbedding(nn.Module):
    """Latents [B, C, h, w] as one token per patch, with its position: [B, h w / p^2, width]."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.base = config.sample_size // config.patch_size
        self.proj = nn.Conv2d(config.in_channels, width, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x)
        rows, columns = (int(size) for size in patches.shape[2:])
        places = torch.from_numpy(positions(patches.shape[1], rows, columns, self.base))
        tokens = patches.flatten(2).transpose(1, 2)
        return (tokens + places.to(tokens.device)).to(tokens.dtype)


class Labels(nn.Module):
    """One vector per class and one for none: ids [B] -> [B, width]."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        vectors: Tensor = self.embedding_table(labels)
        return vectors


class Condition(nn.Module):
    """The timestep's vector plus the class's: [1 or B], [B] -> [B, width]."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(WAVES, width)
        self.class_embedder = Labels(classes, width)

    def forward(self, t: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        waves = sinusoids(t, WAVES, flip_sin_to_cos=True, freq_shift=1).to(dtype)
        vector: Tensor = self.timestep_embedder(waves) + self.class_embedder(labels)
        return vector


class AdaptiveNorm(nn.Module):
    """Six vectors of the condition for each block: shift, scale and gate of its attention and of its network.

    Source: Peebles and Xie 2022 (arXiv:2212.09748), section 3.2, "adaLN-Zero".
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.emb = Condition(classes, width)
        self.linear = Linear(width, 6 * width)

    def forward(self, t: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return self.linear(F.silu(self.emb(t, labels, dtype)))[:, None].chunk(6, dim=-1)  # type: ignore[no-any-return]


class DiTBlock(nn.Module):
    """Self-attention and a feed-forward network, each modulated before, gated after and added."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.width, self.eps = width, config.norm_eps
        self.norm1 = AdaptiveNorm(config.num_embeds_ada_norm, width)
        self.attn1 = Attention(width, config.num_attention_heads, bias=config.attention_bias)
        self.norm3 = nn.LayerNorm(width, config.norm_eps, config.norm_elementwise_affine)
        self.ff = FeedForward(width, config.activation_fn)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        shift, scale, gate, shift_after, scale_after, gate_after = self.norm1(t, labels, x.dtype)
        x = x + gate * self.attn1(F.layer_norm(x, (self.width,), eps=EPS) * (1 + scale) + shift)
        total: Tensor = x + gate_after * self.ff(self.norm3(x) * (1 + scale_after) + shift_after)
        return total


class DiTTransformer2DModel(Model):
    """epsilon (and perhaps a variance) of x_t given t and a class: [B, C, s, s], t, [B] -> [B, C_out, s, s].

    Source: Peebles and Xie 2022 (arXiv:2212.09748). Files that call it `Transformer2DModel` are read as well.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": None,
        "num_layers": 28,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "attention_bias": True,
        "sample_size": 32,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "upcast_attention": False,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-5,
    }
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "dropout": (0.0,),
        "activation_fn": tuple(INNER),
        "norm_type": ("ada_norm_zero",),
    }
    FOREIGN: ClassVar[tuple[str, ...]] = tuple(OTHER_FORMS)
    HARMLESS: ClassVar[tuple[str, ...]] = ("pos_embed.pos_embed",)
    PARTS: ClassVar[Mapping[str, str]] = {"transformer": "denoise"}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        full = self.config
        self.width = full.num_attention_heads * full.attention_head_dim
        self.channels_out = full.out_channels or full.in_channels
        self.pos_embed = PatchEmbedding(full, self.width)
        self.transformer_blocks = nn.ModuleList(DiTBlock(full, self.width) for _ in range(full.num_layers))
        self.proj_out_1 = Linear(self.width, 2 * self.width)
        self.proj_out_2 = Linear(self.width, full.patch_size**2 * self.channels_out)

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete(config)
        for key, value in OTHER_FORMS.items():
            if full.get(key, value) != value:
                raise ConfigError(
                    f"{cls.__name__} does not serve {key}={full[key]!r}; that is another model of diffusers' "
                    "Transformer2DModel"
                )
        if None in (full.num_embeds_ada_norm, full.patch_size, full.sample_size):
            raise ConfigError(f"{cls.__name__} needs numbers for num_embeds_ada_norm, patch_size and sample_size")
        if full.num_attention_heads * full.attention_head_dim % 4:
            raise ConfigError(f"{cls.__name__} needs a width (heads times attention_head_dim) that is a multiple of 4")
        return full

    def denoise(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> tuple[Tensor]:
        """One call of the denoiser: [B, C, s, s], t (scalar or [B]), classes [B] -> ([B, C_out, s, s],)."""
        return (self._predict(sample, timestep, class_labels),)

    @overload
    def forward(
        self,
        hidden_states: Tensor,
        timestep: SupportsFloat | Tensor,
        class_labels: Tensor,
        return_dict: Literal[True] = True,
    ) -> Transformer2DModelOutput: ...
    @overload
    def forward(
        self, hidden_states: Tensor, timestep: SupportsFloat | Tensor, class_labels: Tensor, *, return_dict: bool
    ) -> Transformer2DModelOutput | tuple[Tensor]: ...
    def forward(
        self,
        hidden_states: Tensor,
        timestep: SupportsFloat | Tensor,
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict from x_t [B, C, h, w], t (a number, or [B]) and classes int64 [B], `num_embeds_ada_norm` for none.

        Raises InputError: height or width is no multiple of `patch_size`, or t has another shape.
        """
        predicted = self._predict(hidden_states, timestep, class_labels)
        return Transformer2DModelOutput(predicted) if return_dict else (predicted,)

    def _predict(self, sample: Tensor, timestep: SupportsFloat | Tensor, labels: Tensor) -> Tensor:
        side = self.config.patch_size
        rows, columns = (size // side for size in sample.shape[2:])
        if (rows * side, columns * side) != tuple(sample.shape[2:]):
            raise InputError(f"latents are {list(sample.shape[2:])}, expected multiples of patch_size={side}")
        t = timesteps(timestep, sample)
        x = self.pos_embed(sample)
        for block in self.transformer_blocks:
            x = block(x, t, labels)
        condition = self.transformer_blocks[0].norm1.emb(t, labels, x.dtype)  # type: ignore[union-attr,operator]
        shift, scale = self.proj_out_1(F.silu(condition))[:, None].chunk(2, dim=-1)
        x = self.proj_out_2(F.layer_norm(x, (self.width,), eps=EPS) * (1 + scale) + shift)
        patches: Tensor = x.reshape(-1, rows, columns, side, side, self.channels_out).permute(0, 5, 1, 3, 2, 4)
        return patches.reshape(-1, self.channels_out, rows * side, columns * side)
