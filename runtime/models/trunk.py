"""What a UNet that looks at a text shares with its ControlNets: time, text, and the way down to the middle."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anamorph.conditions import CONTROL_TYPE, HINT, added_names, intrablock_ports, residual_ports
from anamorph.config import Config
from anamorph.interface import Interface
from anamorph.models.activations import ACTIVATIONS
from anamorph.models.attention import Attention
from anamorph.models.base import Model
from anamorph.models.blocks import ResnetBlock2D, same_size
from anamorph.models.conditioning import add_embedding, addition, class_embedding, context, encoder_projection
from anamorph.models.embeddings import TimestepEmbedding
from anamorph.models.image_attention import Images
from anamorph.models.levels import DOWN_BLOCKS, down_levels, kinds
from anamorph.models.pixel_attention import renamed
from anamorph.models.stepping import stepped
from anamorph.models.told import Conditions, Joint, Text, Time, Times, dealt, give_places
from anamorph.models.transformer import SpatialTransformer
from anamorph.models.unet_blocks import down_ways, timesteps
from anamorph.models.unet_build import middle, style_of, waves
from anamorph.native import (
    KEYS,
    PREFIX,
    TEXT_KEYS,
    TEXT_VALUES,
    TIME_ROW,
    TIMES,
    is_branched,
    is_preparing,
    split,
    splits,
)
from anamorph.rewrites import SPLIT_EINSUM
from anamorph.stepping import SCALE, SCOPE


class Trunk(Model):
    """Layers and calls that both have in common; a subclass says in `_results` what becomes of the states."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        full = self.layout = self._layout()
        first = full.block_out_channels[0]
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
        self.style = style_of(full, 2 * time_width if full.class_embeddings_concat else time_width)
        down = kinds(type(self).__name__, full, "down_block_types", DOWN_BLOCKS)
        self.down_blocks = down_ways(list(zip(down, down_levels(full), strict=True)), self.style)
        self.mid_block = middle(full, self.style)
        # Blocks either share act(t_emb), computed once, or take t_emb as it is.
        self.raw_time = full.resnet_skip_time_act or down[0].family == "k"
        # The first block that looks at the text, and how many states of the way down come before that.
        self.first_look = next((index for index, kind in enumerate(down) if kind.cross), len(down))
        self.before = 1 + sum(len(level.depths) + 1 for level in down_levels(full)[: self.first_look])
        self._named = tuple(port.name for port in self._interface().inputs[2:])

    def _layout(self) -> Config:
        """The configuration with every key of a UNet's."""
        return self.config

    @abstractmethod
    def _interface(self) -> Interface:
        """Inputs and outputs of a call."""

    @abstractmethod
    def _results(self, sample: Tensor, time: Time, text: Text, extra: Conditions) -> tuple[Tensor, ...]:
        """What a call returns, every branch of guidance in the batch."""

    def _place(self) -> None:
        """Let the projections of the time, and those of the text, lie side by side; called when all layers exist."""
        give_places(self._timed)
        give_places(self._looking)

    @property
    def _timed(self) -> list[ResnetBlock2D]:
        """The layers that project the time."""
        return [layer for layer in self.modules() if isinstance(layer, ResnetBlock2D)]

    @property
    def _looking(self) -> list[Attention]:
        """The layers that project the text."""
        return [layer for layer in self.modules() if isinstance(layer, Attention) and layer.cross]

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
        for layer in self.modules():
            if isinstance(layer, SpatialTransformer):
                layer.split = SPLIT_EINSUM in self.rewrites
        if splits(self.rewrites):  # read here, so that compilers of `step` meet names and no interfaces
            parts = split(self._interface(), self.config, self.rewrites)
            self._takes = {
                self.method(name): [(port.name, is_branched(port)) for port in part.inputs]
                for name, part in parts.items()
            }

    rewrite.__doc__ = Model.rewrite.__doc__

    def denoise(self, sample: Tensor, timestep: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """One call: [B, C, h, w], t (scalar or [B]), then what the interface lists; optional inputs are None, or left
        out.
        """  # fmt: skip
        given = {name: value for name, value in zip(self._named, inputs, strict=False) if value is not None}
        states, extra = given.get("encoder_hidden_states"), self._extra(given)
        time = self._time(timesteps(timestep, sample), states, extra, sample.dtype)
        text = replace(self._text(states, extra), images=self._images(given))
        return self._results(sample, time, text, extra)

    def prepare(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What no step changes, from what `native.split` lists: the time projections of all residual blocks at all
        steps [T, 1 or B, sum of channels], and the keys and values of all attentions to the text [B, S, sum of widths].

        Each layer projects all steps, or the whole text, in one product; the layers' weights stay as they are stored.
        """
        given = dict(zip((name for name, _ in self._takes["prepare"]), inputs, strict=True))
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

    def step(self, sample: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """One call with what `native.split` lists, most of which `prepare` made.

        Where branches share the prefix, samples are [N, C, h, w] and what differs between branches is
        [branches, N, ...], and so are the results.
        """
        given, branches = self._given("step", inputs)
        x = self._entering(sample, given, branches)
        return self._leaving(self._results(x, *self._told(x, given, branches)), sample, given, branches)

    def _given(self, method: str, inputs: Sequence[Tensor | None]) -> tuple[dict[str, Tensor], int | None]:
        """The inputs of a step after its samples by their names, branches in the batch, and how many there are."""
        ports = self._takes[method][1:]
        named = [(*port, value) for port, value in zip(ports, inputs, strict=False) if value is not None]
        counts = [value.shape[0] for _, branched, value in named if branched]
        given = {name: value.flatten(0, 1) if branched else value for name, branched, value in named}
        return given, counts[0] if counts else None

    def _entering(self, sample: Tensor, given: Mapping[str, Tensor], branches: int | None) -> Tensor:
        """What the layers see of samples."""
        if SCOPE not in self.rewrites:
            return sample
        x = (given[SCALE] * sample).to(self.conv_in.weight.dtype)
        return x if PREFIX in self.rewrites else dealt(x, branches)

    def _told(self, x: Tensor, given: Mapping[str, Tensor], branches: int | None) -> tuple[Time, Text, Conditions]:
        """What layers are told in a step that sees x."""
        states, extra = given.get("encoder_hidden_states"), self._extra(given)
        time: Time
        if TIMES in self.rewrites:
            time = Times(given[TIME_ROW])
        else:
            time = self._time(timesteps(given["timestep"], x), states, extra, x.dtype)
        if KEYS in self.rewrites:
            text = Text(keys=given[TEXT_KEYS], values=given[TEXT_VALUES])
        else:
            text = self._text(states, extra)
        shared = branches if PREFIX in self.rewrites else None
        return time, replace(text, branches=shared, images=self._images(given)), extra

    def _leaving(
        self, results: tuple[Tensor, ...], sample: Tensor, given: Mapping[str, Tensor], branches: int | None
    ) -> tuple[Tensor, ...]:
        """Results [branches N, ...] as [branches, N, ...] where samples enter once for all; see `anamorph.stepping`."""
        if branches is None:
            return results
        apart = tuple(torch.unflatten(each, 0, (branches, sample.shape[0])) for each in results)
        if SCOPE not in self.rewrites:
            return apart
        following, history = stepped(sample, apart[0], given)
        return following, *apart[1:], history

    def _extra(self, given: Mapping[str, Tensor]) -> Conditions:
        """The conditions among the inputs of a part."""
        added = {name: given[name] for name in added_names(self.config) if name in given}
        residuals = [given.get(port.name) for port in residual_ports(self.config)]
        inside = [given.get(port.name) for port in intrablock_ports(self.config)]
        controlled = any(residual is not None for residual in residuals)
        return Conditions(
            given.get("timestep_cond"),
            given.get("class_labels"),
            added,
            residuals[:-1] if controlled else (),
            residuals[-1] if controlled else None,
            inside,
            given.get(HINT),
            given.get(CONTROL_TYPE),
        )

    def _images(self, given: Mapping[str, Tensor]) -> Images | None:
        """The pictures among the inputs of a part."""
        return Images.among(given, len(self.layout.block_out_channels))

    def _text(self, states: Tensor | None, extra: Conditions, mask: Tensor | None = None) -> Text:
        """What the attentions look at."""
        if self.encoder_hid_proj is not None:
            states = context(self.encoder_hid_proj, self.layout, states, extra.added)
        return Text(states, mask)

    def _enter(self, sample: Tensor, extra: Conditions) -> Tensor:
        """The first state of the way down."""
        x: Tensor = self.conv_in(2 * sample - 1 if self.layout.center_input_sample else sample)
        return x if extra.hint is None else x + extra.hint

    def _descend(self, sample: Tensor, time: Time, text: Text, extra: Conditions) -> tuple[Tensor, list[Tensor]]:
        """The state of the middle, and all states of the way down; the first `before` of these as many as samples."""
        x = self._enter(sample, extra)
        skips, inside = [x], (*extra.inside, *[None] * (len(self.down_blocks) + 1 - len(extra.inside)))
        for index, (block, residual) in enumerate(zip(self.down_blocks, inside[:-1], strict=True)):
            branches = None if index < self.first_look else text.branches
            x, states = block(x, time, text, None if residual is None else Joint(residual, branches))
            skips += states
        if self.mid_block is not None:
            x = self.mid_block(x, time, text)
        x = x if inside[-1] is None else Joint(inside[-1], text.branches).added(x)
        return x, skips

    def _addition(self, text: Tensor | None, extra: Conditions) -> Tensor | None:
        """What is added to the time besides the classes, [B, time_width]."""
        return None if self.add_embedding is None else addition(self.add_embedding, self.layout, text, extra.added)

    def _time(self, t: Tensor, text: Tensor | None, extra: Conditions, dtype: torch.dtype) -> Tensor:
        """t_emb of [1 or B] with all that is added to it, [1 or B, time_width]; of [T, 1] for [T, 1 or B, time_width].

        Behind the blocks' activation if they share it.
        """
        waved = self.time_proj(t.flatten()).to(dtype)
        waved = waved if t.ndim == 1 else waved[:, None]
        time: Tensor = self.time_embedding(waved, extra.timestep_cond)
        if self.class_embedding is not None and extra.class_labels is not None:
            labels = extra.class_labels
            labels = self.time_proj(labels).to(dtype) if self.layout.class_embed_type == "timestep" else labels
            vector = self.class_embedding(labels).to(dtype)
            if self.layout.class_embeddings_concat:
                shape = (*t.shape[:-1], vector.shape[0], -1)
                time = torch.cat((time.expand(*shape), vector.expand(*shape)), dim=-1)
            else:
                time = time + vector
        if (told := self._addition(text, extra)) is not None:
            time = time + told
        if self.layout.time_embedding_act_fn is not None:
            time = ACTIVATIONS[self.layout.time_embedding_act_fn](time)
        return time if self.raw_time else ACTIVATIONS[self.layout.act_fn](time)
