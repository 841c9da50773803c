"""The denoiser of Stable Diffusion 1 and 2: a UNet whose levels also look at the text."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, SupportsFloat, overload

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from anamorph.config import Config
from anamorph.errors import ConfigError, InputError
from anamorph.models.attention import SpatialTransformer
from anamorph.models.base import Model
from anamorph.models.blocks import Downsample2D, Residual, ResnetBlock2D, Upsample2D
from anamorph.models.embeddings import TimestepEmbedding, sinusoids
from anamorph.models.levels import DOWN_BLOCKS, UP_BLOCKS, Level, check_levels, levels
from anamorph.models.outputs import UNet2DConditionOutput


class DownBlock(nn.Module):
    """Residual blocks and transformers at one resolution, then half of it; returns every state for the way up."""

    def __init__(
        self, level: Level, channels_in: int, common: Residual, *, attention: bool, padding: int | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(level.channels if layer else channels_in, level.channels, common)
            for layer in range(level.layers)
        )
        self.attentions = _transformers(level, level.layers if attention else 0, common)
        self.downsamplers = nn.ModuleList([] if padding is None else [Downsample2D(level.channels, padding)])

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> list[Tensor]:
        states = []
        for layer, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[layer](x, text)
            states.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            states.append(x)
        return states


class MidBlock(nn.Module):
    """A transformer between two residual blocks at the lowest resolution."""

    def __init__(self, level: Level, common: Residual, scale: float) -> None:
        super().__init__()
        self.attentions = _transformers(level, 1, common, only_cross=False)
        self.resnets = nn.ModuleList(ResnetBlock2D(level.channels, level.channels, common, scale) for _ in range(2))

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), text)
        result: Tensor = self.resnets[1](x, time)
        return result


class UpBlock(nn.Module):
    """Residual blocks, each fed with one state of the way down, and transformers; then twice the resolution."""

    def __init__(
        self, level: Level, channels_in: int, skips: Sequence[int], common: Residual, *, attention: bool, double: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D((level.channels if layer else channels_in) + skip, level.channels, common)
            for layer, skip in enumerate(skips)
        )
        self.attentions = _transformers(level, len(skips) if attention else 0, common)
        self.upsamplers = nn.ModuleList([Upsample2D(level.channels)] if double else [])

    def forward(
        self, x: Tensor, skips: Sequence[Tensor], time: Tensor, text: Tensor, size: Sequence[int] | None
    ) -> Tensor:
        for layer, resnet in enumerate(self.resnets):
            x = resnet(torch.cat((x, skips[-1 - layer]), dim=1), time)
            if self.attentions:
                x = self.attentions[layer](x, text)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


class UNet2DConditionModel(Model):
    """epsilon, v or x_0 of x_t given t and a text: [B, C, h, w], t, [B, S, D] -> [B, C_out, h, w].

    Source: Rombach et al. 2022 (arXiv:2112.10752), section 3.3. `attention_head_dim` is the NUMBER of heads, as in
    diffusers' files; `num_attention_heads` stands before it.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "sample_size": None,
        "in_channels": 4,
        "out_channels": 4,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "only_cross_attention": False,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "dropout": 0.0,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "attention_head_dim": 8,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "use_linear_projection": False,
        "class_embed_type": None,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "num_class_embeds": None,
        "upcast_attention": False,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "projection_class_embeddings_input_dim": None,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "mid_block_only_cross_attention": None,
        "cross_attention_norm": None,
        "addition_embed_type_num_heads": 64,
    }
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "dropout": (0.0,),
        "act_fn": ("silu", "swish"),
        "reverse_transformer_layers_per_block": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "dual_cross_attention": (False,),
        "class_embed_type": (None,),
        "addition_embed_type": (None,),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "time_embedding_type": ("positional",),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "cross_attention_norm": (None,),
    }
    PARTS: ClassVar[Mapping[str, str]] = {"unet": "denoise"}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        full, plan = self.config, levels(self.config)
        first = plan[0].channels
        time_width = full.time_embedding_dim or 4 * first
        common = Residual(full.norm_num_groups, full.norm_eps, time_width)
        self.conv_in = _same_size(full.in_channels, first, full.conv_in_kernel)
        self.time_embedding = TimestepEmbedding(first, time_width, full.time_cond_proj_dim)
        self.down_blocks = nn.ModuleList(_down_blocks(full, plan, common))
        self.mid_block = MidBlock(plan[-1], common, full.mid_block_scale_factor)
        self.up_blocks = nn.ModuleList(_up_blocks(full, plan, common))
        # How many states of the way down each block of the way up takes.
        self.taken = tuple(level.layers + 1 for level in reversed(plan))
        self.conv_norm_out = nn.GroupNorm(common.groups, first, eps=common.eps)
        self.conv_out = _same_size(first, full.out_channels, full.conv_out_kernel)

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete(config)
        check_levels(cls.__name__, full)
        if full.norm_num_groups is None:
            raise ConfigError(f"{cls.__name__} does not serve norm_num_groups=None; it needs the number of groups")
        return full

    def denoise(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        """One call of the denoiser: [B, C, h, w], t (scalar or [B]), [B, S, D] -> ([B, C_out, h, w],)."""
        return (self._predict(sample, timestep, encoder_hidden_states),)

    @overload
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        encoder_hidden_states: Tensor,
        *,
        timestep_cond: Tensor | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: Literal[True] = True,
    ) -> UNet2DConditionOutput: ...
    @overload
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        encoder_hidden_states: Tensor,
        *,
        timestep_cond: Tensor | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool,
    ) -> UNet2DConditionOutput | tuple[Tensor]: ...
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        encoder_hidden_states: Tensor,
        *,
        timestep_cond: Tensor | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict from x_t [B, C, h, w], t (a number, or [B]) and text states [B, S, D].

        `timestep_cond` [B, time_cond_proj_dim] is the guidance embedding of a distilled model. The residuals of a
        ControlNet are one per state of the way down, in order, and one for the middle.
        Raises InputError: an argument does not fit the configuration or the others.
        """
        if (down_block_additional_residuals is None) != (mid_block_additional_residual is None):
            raise InputError(
                "down_block_additional_residuals and mid_block_additional_residual come from one ControlNet; pass both"
            )
        if timestep_cond is not None and self.config.time_cond_proj_dim is None:
            raise InputError("this UNet takes no timestep_cond: its configuration has no time_cond_proj_dim")
        predicted = self._predict(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond,
            down_block_additional_residuals,
            mid_block_additional_residual,
        )
        return UNet2DConditionOutput(predicted) if return_dict else (predicted,)

    def _predict(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        text: Tensor,
        condition: Tensor | None = None,
        down_residuals: Sequence[Tensor] | None = None,
        mid_residual: Tensor | None = None,
    ) -> Tensor:
        time = self._time(timestep, condition, sample)
        x = self.conv_in(2 * sample - 1 if self.config.center_input_sample else sample)
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], time, text)
        x = self.mid_block(skips[-1], time, text)
        if down_residuals is not None and mid_residual is not None:
            skips, x = _added(skips, down_residuals), x + mid_residual
        for block, count, size in zip(self.up_blocks, self.taken, self._sizes(sample, skips), strict=True):
            x = block(x, skips[-count:], time, text, size)
            del skips[-count:]
        predicted: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return predicted

    def _time(self, timestep: SupportsFloat | Tensor, condition: Tensor | None, sample: Tensor) -> Tensor:
        """silu(t_emb), [1 or B, time_width]: every residual block begins with this SiLU, so it is computed once."""
        t = timestep if isinstance(timestep, Tensor) else torch.tensor(float(timestep))
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, sample.shape[0])):
            raise InputError(
                f"timestep has shape {list(t.shape)}, expected a number or one per sample ({sample.shape[0]})"
            )
        config = self.config
        waves = sinusoids(
            t.to(sample.device).reshape(-1),
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        return F.silu(self.time_embedding(waves.to(sample.dtype), condition))

    def _sizes(self, sample: Tensor, skips: Sequence[Tensor]) -> list[Sequence[int] | None]:
        """What each block of the way up grows to: None for twice its size, else the size of the next state.

        Doubling is taken where it is known to fit. An export with dynamic sizes knows it only if its caller stated
        it first, with `torch._check(size % factor == 0)`; otherwise its graph serves every size.
        """
        factor = 2 ** (len(self.taken) - 1)
        if all(statically_known_true(size % factor == 0) for size in sample.shape[2:]):
            return [None] * len(self.taken)
        sizes: list[Sequence[int] | None] = []
        left = len(skips)
        for count in self.taken:
            left -= count
            sizes.append(skips[left - 1].shape[2:] if left else None)
        return sizes


def _down_blocks(config: Config, plan: Sequence[Level], common: Residual) -> list[DownBlock]:
    return [
        DownBlock(
            level,
            plan[max(i - 1, 0)].channels,
            common,
            attention=DOWN_BLOCKS[config.down_block_types[i]],
            padding=config.downsample_padding if i < len(plan) - 1 else None,
        )
        for i, level in enumerate(plan)
    ]


def _up_blocks(config: Config, plan: Sequence[Level], common: Residual) -> list[UpBlock]:
    """The levels in reverse; the last residual block of each meets the state that entered its level."""
    last = len(plan) - 1
    return [
        UpBlock(
            plan[i],
            plan[min(i + 1, last)].channels,
            (plan[i].channels,) * plan[i].layers + (plan[max(i - 1, 0)].channels,),
            common,
            attention=UP_BLOCKS[config.up_block_types[last - i]],
            double=i > 0,
        )
        for i in range(last, -1, -1)
    ]


def _transformers(level: Level, count: int, common: Residual, only_cross: bool | None = None) -> nn.ModuleList:
    return nn.ModuleList(
        SpatialTransformer(
            level.channels,
            level.heads,
            level.context_width,
            depth=level.depth,
            groups=common.groups,
            linear=level.linear,
            only_cross=level.only_cross if only_cross is None else only_cross,
        )
        for _ in range(count)
    )


def _added(states: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
    if len(states) != len(residuals):
        raise InputError(f"down_block_additional_residuals holds {len(residuals)} tensors, expected {len(states)}")
    return [state + residual for state, residual in zip(states, residuals, strict=True)]


def _same_size(channels_in: int, channels_out: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, padding=(kernel - 1) // 2)
