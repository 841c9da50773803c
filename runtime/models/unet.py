"""The denoisers of the Stable Diffusion family: a UNet whose levels also look at the text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, SupportsFloat, overload

import torch
from torch import Tensor, nn

from anamorph.conditions import added_names, condition_ports, projection
from anamorph.config import Config
from anamorph.errors import InputError
from anamorph.models.activations import ACTIVATIONS
from anamorph.models.attention import renamed
from anamorph.models.base import Model
from anamorph.models.blocks import Residual, same_size
from anamorph.models.conditioning import (
    add_embedding,
    addition,
    class_embedding,
    context,
    encoder_projection,
)
from anamorph.models.embeddings import FourierFeatures, Sinusoids, TimestepEmbedding
from anamorph.models.levels import DOWN_BLOCKS, MID_BLOCKS, UP_BLOCKS, down_levels, kinds, up_levels
from anamorph.models.outputs import UNet2DConditionOutput
from anamorph.models.unet_blocks import MidBlock, Style, check_even, down_ways, timesteps, up_sizes, up_ways
from anamorph.models.unet_config import DEFAULTS, ONLY, check_unet


@dataclass(frozen=True)
class Conditions:
    """What a call of the denoiser knows besides x_t, t and the text; the names are those of `forward`."""

    timestep_cond: Tensor | None = None
    class_labels: Tensor | None = None
    added: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    down: Sequence[Tensor | None] = ()
    mid: Tensor | None = None
    inside: Sequence[Tensor] = ()


class UNet2DConditionModel(Model):
    """epsilon, v or x_0 of x_t given t and a text: [B, C, h, w], t, [B, S, D] -> [B, C_out, h, w].

    Source: Rombach et al. 2022 (arXiv:2112.10752), section 3.3. `attention_head_dim` is the NUMBER of heads, as in
    diffusers' files, for blocks with transformers; `num_attention_heads` stands before it. For other attentions it is
    the width of a head.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = DEFAULTS
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = ONLY
    PARTS: ClassVar[Mapping[str, str]] = {"unet": "denoise"}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        full, first = self.config, self.config.block_out_channels[0]
        fourier = full.time_embedding_type == "fourier"
        time_width = full.time_embedding_dim or (2 if fourier else 4) * first
        waves = time_width if fourier else first
        self.conv_in = same_size(full.in_channels, first, full.conv_in_kernel)
        self.time_proj = _waves(full, waves)
        self.time_embedding = TimestepEmbedding(
            waves, time_width, full.time_cond_proj_dim, activation=full.act_fn, last=full.timestep_post_act
        )
        self.class_embedding = class_embedding(full, waves, time_width, full.act_fn)
        self.add_embedding = add_embedding(full, time_width)
        self.encoder_hid_proj = encoder_projection(full)
        style = _style(full, 2 * time_width if full.class_embeddings_concat else time_width)
        down = kinds(type(self).__name__, full, "down_block_types", DOWN_BLOCKS)
        up = kinds(type(self).__name__, full, "up_block_types", UP_BLOCKS)
        self.down_blocks = down_ways(list(zip(down, down_levels(full), strict=True)), style)
        self.mid_block = _middle(full, style)
        self.up_blocks = up_ways(list(zip(up, up_levels(full), strict=True)), style)
        # Blocks either share act(t_emb), computed once, or take t_emb as it is.
        self.raw_time = full.resnet_skip_time_act or down[0].family == "k"
        self.even = any(kind.family == "k" or kind.resample == "resnet" for kind in up)
        # How many states of the way down each block of the way up takes.
        self.taken: tuple[int, ...] = tuple(block.taken for block in self.up_blocks)  # type: ignore[misc]
        groups = full.norm_num_groups
        self.conv_norm_out = None if groups is None else nn.GroupNorm(groups, first, eps=full.norm_eps)
        self.conv_out = same_size(first, full.out_channels, full.conv_out_kernel)

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete(config)
        check_unet(cls.__name__, full)
        return full

    @classmethod
    def rename(cls, name: str) -> str:
        return renamed(name)

    def denoise(self, sample: Tensor, timestep: Tensor, *inputs: Tensor | None) -> tuple[Tensor]:
        """One call of the denoiser: [B, C, h, w], t (scalar or [B]), then what `condition_ports` and `residual_ports`
        list, the latter None or left out where there is no control -> ([B, C_out, h, w],).
        """  # fmt: skip
        names = [port.name for port in condition_ports(self.config)]
        given = {name: value for name, value in zip(names, inputs, strict=False) if value is not None}
        residuals = inputs[len(names) :]
        added = {name: given[name] for name in added_names(self.config)}
        extra = Conditions(given.get("timestep_cond"), given.get("class_labels"), added)
        if residuals:
            extra = replace(extra, down=residuals[:-1], mid=residuals[-1])
        return (self._predict(sample, timestep, given.get("encoder_hidden_states"), extra),)

    @overload
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        encoder_hidden_states: Tensor | None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        *,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: Literal[True] = True,
    ) -> UNet2DConditionOutput: ...
    @overload
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        encoder_hidden_states: Tensor | None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        *,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool,
    ) -> UNet2DConditionOutput | tuple[Tensor]: ...
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        encoder_hidden_states: Tensor | None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        *,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict from x_t [B, C, h, w], t (a number, or [B]) and text states [B, S, D].

        `timestep_cond` [B, time_cond_proj_dim] is the guidance embedding of a distilled model, `class_labels` what
        `class_embed_type` says, `added_cond_kwargs` what `addition_embed_type` and `encoder_hid_dim_type` take. The
        residuals of a ControlNet are one per state of the way down, in order, and one for the middle; those of a
        T2I-Adapter (`down_intrablock_...`) one per block of the way down, and perhaps one for the middle.
        `encoder_attention_mask` [B, S] is 1 (or True) for tokens to look at.
        Raises InputError: an argument does not fit the configuration or the others.
        """
        if cross_attention_kwargs:
            raise InputError(f"no attention here takes cross_attention_kwargs, got {sorted(cross_attention_kwargs)}")
        if (down_block_additional_residuals is None) != (mid_block_additional_residual is None):
            raise InputError(
                "down_block_additional_residuals and mid_block_additional_residual come from one ControlNet; pass both"
            )
        extra = Conditions(
            timestep_cond,
            class_labels,
            added_cond_kwargs or {},
            _bias(encoder_attention_mask, sample.dtype),
            down_block_additional_residuals or (),
            mid_block_additional_residual,
            down_intrablock_additional_residuals or (),
        )
        self._check_call(encoder_hidden_states, extra)
        predicted = self._predict(sample, timestep, encoder_hidden_states, extra)
        return UNet2DConditionOutput(predicted) if return_dict else (predicted,)

    def _check_call(self, text: Tensor | None, extra: Conditions) -> None:
        """Raise InputError where a condition is missing, or given to a model that does not take it."""
        taken = {
            "encoder_hidden_states": (text is not None, projection(self.config) != "image_proj"),
            "class_labels": (extra.class_labels is not None, self.class_embedding is not None),
            **{f"added_cond_kwargs[{name!r}]": (True, False) for name in extra.added},
            **{f"added_cond_kwargs[{name!r}]": (name in extra.added, True) for name in added_names(self.config)},
        }
        for name, (given, wanted) in taken.items():
            if wanted and not given:
                raise InputError(f"this UNet needs {name}, which is missing; pass it")
            # Where a picture takes the text's place, diffusers passes a text all the same.
            if given and not wanted and name != "encoder_hidden_states":
                raise InputError(f"this UNet takes no {name}; its configuration has no place for it, leave it out")
        if extra.timestep_cond is not None and self.config.time_cond_proj_dim is None:
            raise InputError("this UNet takes no timestep_cond: its configuration has no time_cond_proj_dim")
        blocks = len(self.down_blocks)
        if extra.inside and len(extra.inside) not in (blocks, blocks + 1):
            raise InputError(
                f"down_intrablock_additional_residuals holds {len(extra.inside)} tensors, expected one per block of "
                f"the way down ({blocks}), and perhaps one for the middle"
            )

    def _predict(
        self, sample: Tensor, timestep: SupportsFloat | Tensor, text: Tensor | None, extra: Conditions
    ) -> Tensor:
        if self.even:
            check_even(sample, len(self.taken))
        time = self._time(timestep, text, sample, extra)
        if self.encoder_hid_proj is not None:
            text = context(self.encoder_hid_proj, self.config, text, extra.added)
        x = self.conv_in(2 * sample - 1 if self.config.center_input_sample else sample)
        skips, inside = [x], (*extra.inside, *[None] * (len(self.down_blocks) + 1 - len(extra.inside)))
        for block, residual in zip(self.down_blocks, inside[:-1], strict=True):
            x, states = block(x, time, text, extra.mask, residual)
            skips += states
        if self.mid_block is not None:
            x = self.mid_block(x, time, text, extra.mask)
        x = x if inside[-1] is None else x + inside[-1]
        if extra.down:
            skips = _added(skips, extra.down)
        x = x if extra.mid is None else x + extra.mid
        for block, count, size in zip(self.up_blocks, self.taken, up_sizes(sample, skips, self.taken), strict=True):
            x = block(x, skips[len(skips) - count :], time, text, extra.mask, size)
            del skips[len(skips) - count :]
        if self.conv_norm_out is not None:
            x = ACTIVATIONS[self.config.act_fn](self.conv_norm_out(x))
        predicted: Tensor = self.conv_out(x)
        return predicted

    def _time(self, timestep: SupportsFloat | Tensor, text: Tensor | None, sample: Tensor, extra: Conditions) -> Tensor:
        """t_emb with all that is added to it, [1 or B, time_width]; behind the blocks' activation if they share it."""
        waves = self.time_proj(timesteps(timestep, sample)).to(sample.dtype)
        time: Tensor = self.time_embedding(waves, extra.timestep_cond)
        if self.class_embedding is not None and extra.class_labels is not None:
            labels = extra.class_labels
            labels = self.time_proj(labels).to(sample.dtype) if self.config.class_embed_type == "timestep" else labels
            vector = self.class_embedding(labels).to(sample.dtype)
            joined = self.config.class_embeddings_concat
            time = torch.cat((time.expand(vector.shape[0], -1), vector), dim=-1) if joined else time + vector
        if self.add_embedding is not None:
            time = time + addition(self.add_embedding, self.config, text, extra.added)
        if self.config.time_embedding_act_fn is not None:
            time = ACTIVATIONS[self.config.time_embedding_act_fn](time)
        return time if self.raw_time else ACTIVATIONS[self.config.act_fn](time)


def _waves(config: Config, width: int) -> nn.Module:
    if config.time_embedding_type == "fourier":
        return FourierFeatures(width // 2, log=False, flip_sin_to_cos=config.flip_sin_to_cos)
    return Sinusoids(width, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift)


def _style(config: Config, time_width: int) -> Style:
    scale_shift = config.resnet_time_scale_shift == "scale_shift"
    return Style(
        Residual(config.norm_num_groups, config.norm_eps, time_width, scale_shift, config.act_fn),
        config.norm_num_groups,
        padding=config.downsample_padding,
        out_scale=config.resnet_out_scale_factor,
        linear=config.use_linear_projection,
        norm_context=config.cross_attention_norm,
    )


def _middle(config: Config, style: Style) -> MidBlock | None:
    kind, level = MID_BLOCKS[config.mid_block_type], down_levels(config)[-1]
    if kind is None:
        return None
    only_cross = config.mid_block_only_cross_attention
    if only_cross is None:
        only_cross = config.only_cross_attention if isinstance(config.only_cross_attention, bool) else False
    # A transformer in the middle looks at its own tokens first whatever the configuration says, as in diffusers.
    level = replace(level, only_cross=only_cross and kind.attention != "transformer")
    style = replace(style, residual=replace(style.residual, scale=config.mid_block_scale_factor))
    return MidBlock(kind, level, style, count=2 if kind.attention else 1)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 for tokens to look at and -10000 for the others, as attention adds it to its scores: [B, S] -> [B, 1, 1, S]."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0)[:, None, None, :]


def _added(states: Sequence[Tensor], residuals: Sequence[Tensor | None]) -> list[Tensor]:
    if len(states) != len(residuals):
        raise InputError(f"down_block_additional_residuals holds {len(residuals)} tensors, expected {len(states)}")
    pairs = zip(states, residuals, strict=True)
    return [state if residual is None else state + residual for state, residual in pairs]
