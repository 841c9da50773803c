"""One ControlNet for several kinds of pictures, of which it looks at one or at some together.

Source: the code and weights of ControlNet++ (xinsir 2024), as diffusers has them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self, SupportsFloat, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from anamorph.config import Config
from anamorph.errors import ConfigError, InputError
from anamorph.models.activations import quick_gelu
from anamorph.models.attention import multi_head
from anamorph.models.conditioning import CLASS_TYPES
from anamorph.models.controlnet import CHANNELS, SHARED, Net, zero
from anamorph.models.embeddings import Sinusoids, TimestepEmbedding
from anamorph.models.linear import Linear
from anamorph.models.outputs import ControlNetOutput
from anamorph.models.told import Conditions, mask_bias
from anamorph.models.unet_blocks import timesteps
from anamorph.models.unet_config import DEFAULTS as UNET


class BatchAttention(nn.Module):
    """Attention of the pictures of a batch to one another, [B, C] -> [B, C].

    The published code hands the batch to an attention in the place of the sequence, and weights were trained so.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width).normal_(std=width**-0.5))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = functional.linear(x[None], self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        mixed: Tensor = self.out_proj(multi_head(q, k, v, self.heads))[0]
        return mixed


class Mlp(nn.Module):
    """[B, C] -> [B, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.c_proj(quick_gelu(self.c_fc(x)))
        return hidden


class TokenBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [B, C] -> [B, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = BatchAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        token: Tensor = x + self.mlp(self.ln_2(x))
        return token


class ControlNetUnionModel(Net):
    """Residuals for a UNet from x_t, t, a text and pictures of some of `num_control_type` kinds."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **{key: UNET[key] for key in SHARED if key != "mid_block_type"},
            "conditioning_channels": 3,
            "controlnet_conditioning_channel_order": "rgb",
            "conditioning_embedding_out_channels": (48, 96, 192, 384),
            "global_pool_conditions": False,
            "num_control_type": 6,
            "num_trans_channel": 320,
            "num_trans_head": 8,
            "num_trans_layer": 1,
            "num_proj_channel": 320,
        }
    )
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {
            "encoder_hid_dim_type": (None,),
            "class_embed_type": CLASS_TYPES[:-1],
            "addition_embed_type": ("text_time",),
            "controlnet_conditioning_channel_order": ("rgb",),
        }
    )

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        full, width, waves = self.config, self.config.num_trans_channel, self.config.addition_time_embed_dim
        self.task_embedding = nn.Parameter(width**0.5 * torch.randn(full.num_control_type, width))
        self.transformer_layes = nn.ModuleList(  # as diffusers spells it
            TokenBlock(width, full.num_trans_head) for _ in range(full.num_trans_layer)
        )
        self.spatial_ch_projs = zero(Linear(width, full.num_proj_channel))
        self.control_type_proj = Sinusoids(waves, flip_sin_to_cos=full.flip_sin_to_cos, freq_shift=full.freq_shift)
        self.control_add_embedding = TimestepEmbedding(waves * full.num_control_type, 4 * full.block_out_channels[0])

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete(config)
        for key in ("num_trans_channel", "num_proj_channel"):
            if full[key] != full.block_out_channels[0]:
                raise ConfigError(
                    f"{cls.__name__} has {key}={full[key]}, expected the {full.block_out_channels[0]} channels of its "
                    "first level"
                )
        return full

    @classmethod
    def from_unet(
        cls,
        unet: Any,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: Sequence[int] = CHANNELS,
        load_weights_from_unet: bool = True,
    ) -> Self:
        """A net that begins as a copy of a UNet's way down and middle, and adds nothing before it is trained.

        `conditioning_embedding_out_channels`: one channel count more than the autoencoder halves the resolution.
        Raises ConfigError: the UNet is of a kind that has none.
        """
        return cls._beside(
            unet, load_weights_from_unet,
            controlnet_conditioning_channel_order=controlnet_conditioning_channel_order,
            conditioning_embedding_out_channels=tuple(conditioning_embedding_out_channels),
            num_trans_channel=unet.config.block_out_channels[0], num_proj_channel=unet.config.block_out_channels[0],
        )  # fmt: skip

    def hint(self, picture: Tensor, kind: Tensor, weight: Tensor) -> tuple[Tensor]:
        """w (h + V f(w (mean(h) + e_k))) with h of the picture's encoder: [B, C, H, W] in 0..1, k and w [B] ->
        [B, C_0, h, w].
        """  # fmt: skip
        seen = self.controlnet_cond_embedding(picture)
        token = (seen.mean((2, 3)) + functional.embedding(kind, self.task_embedding)) * weight[:, None]
        for layer in self.transformer_layes:
            token = layer(token)
        return ((seen + self.spatial_ch_projs(token)[:, :, None, None]) * weight[:, None, None, None],)

    def _addition(self, text: Tensor | None, extra: Conditions) -> Tensor | None:
        told = super()._addition(text, extra)
        assert extra.control_type is not None
        waves = self.control_type_proj(extra.control_type.flatten()).to(extra.control_type.dtype)
        kinds: Tensor = self.control_add_embedding(waves.reshape(-1, self.control_add_embedding.linear_1.in_features))
        return kinds if told is None else told + kinds

    @overload
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        encoder_hidden_states: Tensor | None,
        controlnet_cond: Sequence[Tensor],
        control_type: Tensor,
        control_type_idx: Sequence[int],
        conditioning_scale: float | Sequence[float] = 1.0,
        class_labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        from_multi: bool = False,
        guess_mode: bool = False,
        return_dict: Literal[True] = True,
    ) -> ControlNetOutput: ...
    @overload
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        encoder_hidden_states: Tensor | None,
        controlnet_cond: Sequence[Tensor],
        control_type: Tensor,
        control_type_idx: Sequence[int],
        conditioning_scale: float | Sequence[float] = 1.0,
        class_labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        from_multi: bool = False,
        guess_mode: bool = False,
        return_dict: bool,
    ) -> ControlNetOutput | tuple[tuple[Tensor, ...], Tensor]: ...
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        encoder_hidden_states: Tensor | None,
        controlnet_cond: Sequence[Tensor],
        control_type: Tensor,
        control_type_idx: Sequence[int],
        conditioning_scale: float | Sequence[float] = 1.0,
        class_labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        from_multi: bool = False,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[Tensor, ...], Tensor]:
        """Residuals of x_t [B, C, h, w] at t (a number, or [B]) under a text [B, S, D] and pictures [B, 3, H, W].

        `control_type` [B, kinds] is 1 for the pictures' kinds, whose numbers are `control_type_idx`. One picture alone,
        or one of several nets (`from_multi`), weighs the residuals; of several, each weighs what it adds to the first
        state. With `guess_mode` residuals are multiplied by 0.1 (the first) to 1 (the middle).
        Raises InputError: a condition is missing, or pictures, kinds and weights are not as many.
        """
        count = len(control_type_idx)
        given = conditioning_scale
        scales = list(given) if isinstance(given, Sequence) else [given] * count
        if not len(controlnet_cond) == len(scales) == count >= 1:
            raise InputError(
                f"there are {len(controlnet_cond)} pictures, {count} kinds and {len(scales)} weights; give one of each"
            )
        alone = from_multi or count == 1
        extra = Conditions(None, class_labels, added_cond_kwargs or {}, control_type=control_type.to(sample.dtype))
        extra.check(self.layout, encoder_hidden_states)
        hints = [
            self.hint(picture, torch.full_like(picture[:, 0, 0, 0], kind).long(),
                      torch.full_like(picture[:, 0, 0, 0], 1.0 if alone else scale))[0]
            for picture, kind, scale in zip(controlnet_cond, control_type_idx, scales, strict=True)
        ]  # fmt: skip
        extra = replace(extra, hint=sum(hints[1:], hints[0]))
        time = self._time(timesteps(timestep, sample), encoder_hidden_states, extra, sample.dtype)
        mask = mask_bias(attention_mask, sample.dtype)
        results = self._results(sample, time, self._text(encoder_hidden_states, extra, mask), extra)
        weighed = self._weighed(results, scales[0] if alone else 1.0, guess_mode)
        return weighed if return_dict else (weighed.down_block_res_samples, weighed.mid_block_res_sample)
