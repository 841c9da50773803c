"""The denoisers of the Stable Diffusion family: a UNet whose levels also look at the text."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, SupportsFloat, overload

from torch import Tensor, nn

from anamorph.config import Config
from anamorph.denoiser_interfaces import unet_interface
from anamorph.errors import InputError
from anamorph.interface import Interface
from anamorph.models.activations import ACTIVATIONS
from anamorph.models.attention import Attention
from anamorph.models.blocks import same_size
from anamorph.models.levels import UP_BLOCKS, kinds, up_levels
from anamorph.models.outputs import UNet2DConditionOutput
from anamorph.models.told import Conditions, Text, Time, dealt, mask_bias
from anamorph.models.trunk import Trunk
from anamorph.models.unet_blocks import check_even, timesteps, up_sizes, up_ways
from anamorph.models.unet_config import DEFAULTS, ONLY, check_unet
from anamorph.native import CACHING, DEEP, is_shallow
from anamorph.rewrites import MERGING, merging_level, merging_unmet


class UNet2DConditionModel(Trunk):
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
        full = self.config
        up = kinds(type(self).__name__, full, "up_block_types", UP_BLOCKS)
        self.up_blocks = up_ways(list(zip(up, up_levels(full), strict=True)), self.style)
        self.even = any(kind.family == "k" or kind.resample == "resnet" for kind in up)
        # How many states of the way down each block of the way up takes.
        self.taken: tuple[int, ...] = tuple(block.taken for block in self.up_blocks)  # type: ignore[misc]
        groups, first = full.norm_num_groups, full.block_out_channels[0]
        self.conv_norm_out = None if groups is None else nn.GroupNorm(groups, first, eps=full.norm_eps)
        self.conv_out = same_size(first, full.out_channels, full.conv_out_kernel)
        self._place()
        self._give_levels()
        if merging_unmet("unet", type(self).__name__, full) is None and (level := merging_level(full)) is not None:
            for block in (self.down_blocks[level], self.up_blocks[-1 - level]):
                for layer in block.attentions:  # type: ignore[union-attr]
                    layer.REWRITE = MERGING

    def _interface(self) -> Interface:
        return unet_interface(self.config)

    def _give_levels(self) -> None:
        """Tell each attention to the text at which resolution it stands."""
        last = len(self.down_blocks) - 1
        upward = zip(range(last, -1, -1), self.up_blocks, strict=True)
        for level, block in (*enumerate(self.down_blocks), (last, self.mid_block), *upward):
            for layer in () if block is None else block.modules():
                if isinstance(layer, Attention):
                    layer.level = level

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete(config)
        check_unet(cls.__name__, full)
        return full

    def method(self, part: str) -> str:
        return "shallow" if is_shallow(part) else super().method(part)

    method.__doc__ = Trunk.method.__doc__

    def shallow(self, sample: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """The last layer of a step alone, with the state of an earlier one in the place of what precedes it."""
        given, branches = self._given("shallow", inputs)
        x = self._entering(sample, given, branches)
        time, text, extra = self._told(x, given, branches)
        first = dealt(self._enter(x, extra), text.branches)
        if extra.down and extra.down[0] is not None:
            first = first + extra.down[0]
        return self._leaving((self._leave(given[DEEP], first, time, text),), sample, given, branches)

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
            down_block_additional_residuals or (),
            mid_block_additional_residual,
            down_intrablock_additional_residuals or (),
        )
        extra.check(self.config, encoder_hidden_states)
        time = self._time(timesteps(timestep, sample), encoder_hidden_states, extra, sample.dtype)
        mask = mask_bias(encoder_attention_mask, sample.dtype)
        predicted, *_ = self._results(sample, time, self._text(encoder_hidden_states, extra, mask), extra)
        return UNet2DConditionOutput(predicted) if return_dict else (predicted,)

    def _results(self, sample: Tensor, time: Time, text: Text, extra: Conditions) -> tuple[Tensor, ...]:
        if self.even:
            check_even(sample, len(self.taken))
        x, skips = self._descend(sample, time, text, extra)
        skips = extra.joined([*(dealt(state, text.branches) for state in skips[: self.before]), *skips[self.before :]])
        x = x if extra.mid is None else x + extra.mid
        sizes = up_sizes(sample, skips, self.taken, self.even_sizes)
        for block, count, size in zip(self.up_blocks[:-1], self.taken, sizes, strict=False):
            x = block(x, skips[len(skips) - count :], time, text, size)
            del skips[len(skips) - count :]
        last = self.up_blocks[-1]
        if CACHING not in self.rewrites:
            return (self._out(last(x, skips[len(skips) - self.taken[-1] :], time, text)),)
        deep = last(x, skips[1:], time, text, some=slice(None, -1))
        return self._leave(deep, skips[0], time, text), deep

    def _leave(self, deep: Tensor, skip: Tensor, time: Time, text: Text) -> Tensor:
        """The prediction from what enters the last layer, and the state of the way down that meets it there."""
        return self._out(self.up_blocks[-1](deep, [skip], time, text, some=slice(-1, None)))

    def _out(self, x: Tensor) -> Tensor:
        if self.conv_norm_out is not None:
            x = ACTIVATIONS[self.config.act_fn](self.conv_norm_out(x))
        predicted: Tensor = self.conv_out(x)
        return predicted
