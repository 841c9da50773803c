"""The denoisers of the Stable Diffusion family: a UNet whose levels also look at the text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, SupportsFloat, overload

import torch
from torch import Tensor, nn

from anamorph.components import unet_interface
from anamorph.conditions import added_names, condition_ports, residual_ports
from anamorph.config import Config
from anamorph.errors import InputError
from anamorph.image_prompts import image_ports
from anamorph.models.activations import ACTIVATIONS
from anamorph.models.attention import Attention, renamed
from anamorph.models.base import Model
from anamorph.models.blocks import ResnetBlock2D, same_size
from anamorph.models.conditioning import (
    add_embedding,
    addition,
    class_embedding,
    context,
    encoder_projection,
)
from anamorph.models.embeddings import TimestepEmbedding
from anamorph.models.image_attention import Images
from anamorph.models.levels import DOWN_BLOCKS, UP_BLOCKS, down_levels, kinds, up_levels
from anamorph.models.outputs import UNet2DConditionOutput
from anamorph.models.told import Conditions, Text, Time, Times, dealt, give_places, mask_bias
from anamorph.models.unet_blocks import check_even, down_ways, timesteps, up_sizes, up_ways
from anamorph.models.unet_build import middle, style_of, waves
from anamorph.models.unet_config import DEFAULTS, ONLY, check_unet
from anamorph.native import KEYS, TEXT_KEYS, TEXT_VALUES, TIME_ROW, TIMES, is_branched, is_preparing, split, splits
from anamorph.rewrites import MERGING, merging_level, merging_unmet


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
        width = time_width if fourier else first
        self.conv_in = same_size(full.in_channels, first, full.conv_in_kernel)
        self.time_proj = waves(full, width)
        self.time_embedding = TimestepEmbedding(
            width, time_width, full.time_cond_proj_dim, activation=full.act_fn, last=full.timestep_post_act
        )
        self.class_embedding = class_embedding(full, width, time_width, full.act_fn)
        self.add_embedding = add_embedding(full, time_width)
        self.encoder_hid_proj = encoder_projection(full)
        style = style_of(full, 2 * time_width if full.class_embeddings_concat else time_width)
        down = kinds(type(self).__name__, full, "down_block_types", DOWN_BLOCKS)
        up = kinds(type(self).__name__, full, "up_block_types", UP_BLOCKS)
        self.down_blocks = down_ways(list(zip(down, down_levels(full), strict=True)), style)
        self.mid_block = middle(full, style)
        self.up_blocks = up_ways(list(zip(up, up_levels(full), strict=True)), style)
        # Blocks either share act(t_emb), computed once, or take t_emb as it is.
        self.raw_time = full.resnet_skip_time_act or down[0].family == "k"
        self.even = any(kind.family == "k" or kind.resample == "resnet" for kind in up)
        # How many states of the way down each block of the way up takes.
        self.taken: tuple[int, ...] = tuple(block.taken for block in self.up_blocks)  # type: ignore[misc]
        # How many of these states come before the first attention to the text.
        first_look = next((index for index, kind in enumerate(down) if kind.cross), len(down))
        self.before = 1 + sum(len(level.depths) + 1 for level in down_levels(full)[:first_look])
        groups = full.norm_num_groups
        self.conv_norm_out = None if groups is None else nn.GroupNorm(groups, first, eps=full.norm_eps)
        self.conv_out = same_size(first, full.out_channels, full.conv_out_kernel)
        # Read here, so that compilers of `denoise` meet names and no interfaces.
        ports = (*condition_ports(full), *residual_ports(full), *image_ports(full))
        self._listed = tuple(port.name for port in ports)
        give_places(self._timed)
        give_places(self._looking)
        self._give_levels()
        if merging_unmet("unet", type(self).__name__, full) is None and (level := merging_level(full)) is not None:
            for block in (self.down_blocks[level], self.up_blocks[-1 - level]):
                for layer in block.attentions:  # type: ignore[union-attr]
                    layer.REWRITE = MERGING

    @property
    def _timed(self) -> list[ResnetBlock2D]:
        """The layers that project the time."""
        return [layer for layer in self.modules() if isinstance(layer, ResnetBlock2D)]

    @property
    def _looking(self) -> list[Attention]:
        """The layers that project the text."""
        return [layer for layer in self.modules() if isinstance(layer, Attention) and layer.cross]

    def _give_levels(self) -> None:
        """Tell each attention to the text at which resolution it stands."""
        last = len(self.down_blocks) - 1
        ways = [*enumerate(self.down_blocks), (last, self.mid_block), *zip(range(last, -1, -1), self.up_blocks)]
        for level, block in ways:
            for layer in () if block is None else block.modules():
                if isinstance(layer, Attention):
                    layer.level = level

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete(config)
        check_unet(cls.__name__, full)
        return full

    @classmethod
    def rename(cls, name: str) -> str:
        return renamed(name)

    def method(self, part: str) -> str:
        if is_preparing(part):
            return "prepare"
        return "step" if splits(self.rewrites) else "denoise"

    method.__doc__ = Model.method.__doc__

    def rewrite(self, names: Iterable[str]) -> None:
        super().rewrite(names)
        if splits(self.rewrites):  # read here, so that compilers of `step` meet names and no interfaces
            stepping, *once = split(unet_interface(self.config), self.config, self.rewrites)
            self._stepping = tuple((port.name, is_branched(port)) for port in stepping.inputs[1:])
            self._once = tuple(port.name for each in once for port in each.inputs)

    rewrite.__doc__ = Model.rewrite.__doc__

    def denoise(self, sample: Tensor, timestep: Tensor, *inputs: Tensor | None) -> tuple[Tensor]:
        """One call of the denoiser: [B, C, h, w], t (scalar or [B]), then what `condition_ports`, `residual_ports` and
        `image_ports` list, these last two None or left out where there is nothing of the kind -> ([B, C_out, h, w],).
        """  # fmt: skip
        given = {name: value for name, value in zip(self._listed, inputs, strict=False) if value is not None}
        states, extra = given.get("encoder_hidden_states"), self._extra(given)
        time = self._time(timesteps(timestep, sample), states, extra, sample.dtype)
        text = replace(self._text(states, extra), images=self._images(given))
        return (self._predict(sample, time, text, extra),)

    def prepare(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What no step changes, from what `native.split` lists: the time projections of all residual blocks at all
        steps [T, 1 or B, sum of channels], and the keys and values of all attentions to the text [B, S, sum of widths].

        Each layer projects all steps, or the whole text, in one product; the layers' weights stay as they are stored.
        """
        given = dict(zip(self._once, inputs, strict=True))
        states, extra = given.get("encoder_hidden_states"), self._extra(given)
        outputs: list[Tensor] = []
        if TIMES in self.rewrites:
            time = self._time(given["timesteps"][:, None], states, extra, self.conv_in.weight.dtype)
            rows = (layer.time_emb_proj(time) for layer in self._timed if layer.time_emb_proj is not None)
            outputs.append(torch.cat(list(rows), dim=-1))
        if KEYS in self.rewrites:
            text = self._text(states, extra).states
            assert text is not None
            pairs = [layer.keys_values(text) for layer in self._looking]
            outputs += [torch.cat(each, dim=-1) for each in zip(*pairs, strict=True)]
        return tuple(outputs)

    def step(self, sample: Tensor, *inputs: Tensor | None) -> tuple[Tensor]:
        """One call of the denoiser with what `native.split` lists, most of which `prepare` made.

        Where branches share the prefix, samples are [N, C, h, w] and what differs between branches is
        [branches, N, ...], and so is the prediction.
        """
        named = [(*port, value) for port, value in zip(self._stepping, inputs, strict=False) if value is not None]
        counts = [value.shape[0] for _, branched, value in named if branched]
        branches = counts[0] if counts else None
        given = {name: value.flatten(0, 1) if branched else value for name, branched, value in named}
        states, extra = given.get("encoder_hidden_states"), self._extra(given)
        time: Time
        if TIMES in self.rewrites:
            time = Times(given[TIME_ROW])
        else:
            time = self._time(timesteps(given["timestep"], sample), states, extra, sample.dtype)
        if KEYS in self.rewrites:
            text = Text(keys=given[TEXT_KEYS], values=given[TEXT_VALUES])
        else:
            text = self._text(states, extra)
        predicted = self._predict(sample, time, replace(text, branches=branches, images=self._images(given)), extra)
        return (predicted if branches is None else torch.unflatten(predicted, 0, (branches, sample.shape[0])),)

    def _extra(self, given: Mapping[str, Tensor]) -> Conditions:
        """The conditions among the inputs of a part."""
        added = {name: given[name] for name in added_names(self.config) if name in given}
        residuals = [given.get(port.name) for port in residual_ports(self.config)]
        controlled = any(residual is not None for residual in residuals)
        return Conditions(
            given.get("timestep_cond"),
            given.get("class_labels"),
            added,
            residuals[:-1] if controlled else (),
            residuals[-1] if controlled else None,
        )

    def _images(self, given: Mapping[str, Tensor]) -> Images | None:
        """The pictures among the inputs of a part."""
        return Images.among(given, len(self.config.block_out_channels))

    def _text(self, states: Tensor | None, extra: Conditions, mask: Tensor | None = None) -> Text:
        """What the attentions look at."""
        if self.encoder_hid_proj is not None:
            states = context(self.encoder_hid_proj, self.config, states, extra.added)
        return Text(states, mask)

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
        predicted = self._predict(sample, time, self._text(encoder_hidden_states, extra, mask), extra)
        return UNet2DConditionOutput(predicted) if return_dict else (predicted,)

    def _predict(self, sample: Tensor, time: Time, text: Text, extra: Conditions) -> Tensor:
        if self.even:
            check_even(sample, len(self.taken))
        x = self.conv_in(2 * sample - 1 if self.config.center_input_sample else sample)
        skips, inside = [x], (*extra.inside, *[None] * (len(self.down_blocks) + 1 - len(extra.inside)))
        for block, residual in zip(self.down_blocks, inside[:-1], strict=True):
            x, states = block(x, time, text, residual)
            skips += states
        if self.mid_block is not None:
            x = self.mid_block(x, time, text)
        x = x if inside[-1] is None else x + inside[-1]
        skips = extra.joined([*(dealt(state, text.branches) for state in skips[: self.before]), *skips[self.before :]])
        x = x if extra.mid is None else x + extra.mid
        sizes = up_sizes(sample, skips, self.taken, self.even_sizes)
        for block, count, size in zip(self.up_blocks, self.taken, sizes, strict=True):
            x = block(x, skips[len(skips) - count :], time, text, size)
            del skips[len(skips) - count :]
        if self.conv_norm_out is not None:
            x = ACTIVATIONS[self.config.act_fn](self.conv_norm_out(x))
        predicted: Tensor = self.conv_out(x)
        return predicted

    def _time(self, t: Tensor, text: Tensor | None, extra: Conditions, dtype: torch.dtype) -> Tensor:
        """t_emb of [1 or B] with all that is added to it, [1 or B, time_width]; of [T, 1] for [T, 1 or B, time_width].

        Behind the blocks' activation if they share it.
        """
        waved = self.time_proj(t.flatten()).to(dtype)
        waved = waved if t.ndim == 1 else waved[:, None]
        time: Tensor = self.time_embedding(waved, extra.timestep_cond)
        if self.class_embedding is not None and extra.class_labels is not None:
            labels = extra.class_labels
            labels = self.time_proj(labels).to(dtype) if self.config.class_embed_type == "timestep" else labels
            vector = self.class_embedding(labels).to(dtype)
            if self.config.class_embeddings_concat:
                shape = (*t.shape[:-1], vector.shape[0], -1)
                time = torch.cat((time.expand(*shape), vector.expand(*shape)), dim=-1)
            else:
                time = time + vector
        if self.add_embedding is not None:
            time = time + addition(self.add_embedding, self.config, text, extra.added)
        if self.config.time_embedding_act_fn is not None:
            time = ACTIVATIONS[self.config.time_embedding_act_fn](time)
        return time if self.raw_time else ACTIVATIONS[self.config.act_fn](time)
