"""The blocks of a UNet's three ways, built from their kinds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import SupportsFloat

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from anamorph.errors import InputError
from anamorph.models.blocks import (
    MOST_GROUPS,
    Downsample2D,
    Residual,
    ResnetBlock2D,
    Upsample2D,
    grow,
    shrink,
)
from anamorph.models.k_blocks import KDownBlock, KUpBlock
from anamorph.models.levels import Kind, Level
from anamorph.models.pixel_attention import AddedAttention, PixelAttention
from anamorph.models.skip_blocks import SkipDownBlock, SkipUpBlock
from anamorph.models.told import Joint, Text, Time
from anamorph.models.transformer import SpatialTransformer


@dataclass(frozen=True)
class Style:
    """What all blocks of a UNet have in common.

    `out_scale` divides the sums of residual blocks where residual blocks change the resolution, too. `linear`:
    transformers project their tokens, not the pixels. `norm_context`: how
    attention to text and pixels at once norms the text. `attention_groups`: of the norm before attention over pixels;
    None leaves it out.
    """

    residual: Residual
    attention_groups: int | None
    padding: int = 1
    out_scale: float = 1.0
    linear: bool = False
    norm_context: str | None = None

    def common(self, kind: Kind) -> Residual:
        """What the residual blocks of such a block have in common."""
        return replace(self.residual, scale=self.out_scale) if kind.resample == "resnet" else self.residual


def _transformer(level: Level, style: Style, common: Residual, depth: int) -> nn.Module:
    groups = common.groups or min(level.channels // 4, MOST_GROUPS)
    return SpatialTransformer(
        level.channels,
        level.heads,
        level.context_width,
        depth=depth,
        groups=groups,
        linear=style.linear,
        only_cross=level.only_cross,
    )


def _added(level: Level, style: Style, common: Residual, _depth: int) -> nn.Module:
    return AddedAttention(
        level.channels,
        level.channels // level.head_width,
        level.context_width,
        groups=common.groups or min(level.channels // 4, MOST_GROUPS),
        only_cross=level.only_cross,
        norm_context=style.norm_context,
    )


def _pixels(level: Level, style: Style, common: Residual, _depth: int) -> nn.Module:
    return PixelAttention(
        level.channels,
        groups=style.attention_groups,
        heads=level.channels // level.head_width,
        eps=common.eps,
        scale=common.scale,
    )


ATTENTIONS: Mapping[str, Callable[[Level, Style, Residual, int], nn.Module]] = MappingProxyType(
    {"transformer": _transformer, "added": _added, "pixels": _pixels}
)
"""`Kind.attention` -> how it is built."""


class Layers(nn.Module):
    """Residual blocks at one resolution, with an attention behind each where the kind has one."""

    def __init__(
        self, kind: Kind, level: Level, widths: Sequence[tuple[int, int]], style: Style, common: Residual
    ) -> None:
        super().__init__()
        self.cross = kind.cross
        self.resnets = nn.ModuleList(ResnetBlock2D(before, after, common) for before, after in widths)
        build = None if kind.attention is None else ATTENTIONS[kind.attention]
        depths = level.depths if build else ()
        self.attentions = nn.ModuleList(build(level, style, common, depth) for depth in depths if build)

    def attend(self, layer: int, x: Tensor, text: Text | None) -> Tensor:
        """x through the attention behind one residual block, if there is one."""
        if not self.attentions:
            return x
        attended: Tensor = self.attentions[layer](x, text) if self.cross else self.attentions[layer](x)
        return attended


class DownBlock(Layers):
    """Layers, then half the resolution; returns the last state and every state for the way up.

    `residual` of an adapter joins the last state before the change of resolution where the attentions look at the
    text, and the last state of all elsewhere, as diffusers has it.
    """

    def __init__(self, kind: Kind, level: Level, channels_in: int, style: Style, *, halve: bool) -> None:
        count, width, common = len(level.depths), level.channels, style.common(kind)
        widths = [(width if layer else channels_in, width) for layer in range(count)]
        super().__init__(kind, level, widths, style, common)
        self.timed = kind.resample == "resnet"
        halver = (
            ResnetBlock2D(width, width, common, resample=shrink) if self.timed else Downsample2D(width, style.padding)
        )
        self.downsamplers = nn.ModuleList([halver] if halve else [])

    def forward(
        self,
        x: Tensor,
        time: Time,
        text: Text | None = None,
        residual: Joint | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        states: list[Tensor] = []
        for layer, resnet in enumerate(self.resnets):
            states.append(self.attend(layer, resnet(states[-1] if states else x, time), text))
        if residual is not None and self.cross:
            states[-1] = residual.added(states[-1])
        for downsample in self.downsamplers:
            states.append(downsample(states[-1], time) if self.timed else downsample(states[-1]))
        if residual is not None and not self.cross:
            states[-1] = residual.added(states[-1])
        return states[-1], states


class MidBlock(Layers):
    """Residual blocks at the lowest resolution, with attention after each but the last."""

    def __init__(self, kind: Kind, level: Level, style: Style, *, count: int) -> None:
        level = replace(level, depths=level.depths[:1] * (count - 1))
        super().__init__(kind, level, [(level.channels, level.channels)] * count, style, style.residual)

    def forward(self, x: Tensor, time: Time, text: Text | None = None) -> Tensor:
        for layer, resnet in enumerate(self.resnets):
            x = resnet(self.attend(layer - 1, x, text) if layer else x, time)
        return x


class UpBlock(Layers):
    """Layers, each fed with one state of the way down; then twice the resolution, or `size` where it is given.

    `some` are the layers to compute, with their states, where not all are; the resolution then stays.
    """

    def __init__(
        self, kind: Kind, level: Level, channels_in: int, skips: Sequence[int], style: Style, *, double: bool
    ) -> None:
        width, common = level.channels, style.common(kind)
        widths = [((width if layer else channels_in) + skip, width) for layer, skip in enumerate(skips)]
        super().__init__(kind, level, widths, style, common)
        self.timed, self.taken = kind.resample == "resnet", len(skips)
        self.upsamplers = nn.ModuleList()
        if double:
            self.upsamplers.append(
                ResnetBlock2D(width, width, common, resample=grow) if self.timed else Upsample2D(width)
            )

    def forward(
        self,
        x: Tensor,
        skips: Sequence[Tensor],
        time: Time,
        text: Text | None = None,
        size: Sequence[int] | None = None,
        some: slice | None = None,
    ) -> Tensor:
        layers = range(len(self.resnets))[some or slice(None)]
        for layer, skip in zip(layers, reversed(skips), strict=True):
            x = self.attend(layer, self.resnets[layer](torch.cat((x, skip), dim=1), time), text)
        for upsample in () if some else self.upsamplers:
            x = upsample(x, time) if self.timed else upsample(x, size)
        return x


def timesteps(timestep: SupportsFloat | Tensor, sample: Tensor) -> Tensor:
    """A number, or one per sample, as a tensor [1 or B] beside the sample; raises InputError on other shapes."""
    t = timestep if isinstance(timestep, Tensor) else torch.tensor(float(timestep))
    if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, sample.shape[0])):
        raise InputError(f"timestep has shape {list(t.shape)}, expected a number or one per sample ({sample.shape[0]})")
    return t.to(sample.device).reshape(-1)


def check_even(sample: Tensor, levels: int) -> None:
    """Say that every level's size is twice the next one's, for models whose blocks know no other.

    Raises InputError: height or width is no multiple of 2 to the number of levels less one.
    """
    factor = 2 ** (levels - 1)
    for size in sample.shape[2:]:
        if isinstance(size, int) and size % factor:
            raise InputError(
                f"the sample is {list(sample.shape[2:])} high and wide, but this model changes resolutions by exactly "
                f"two on {levels} levels; give sizes that are multiples of {factor}"
            )
        torch._check(size % factor == 0)  # type: ignore[no-untyped-call]


def up_sizes(
    sample: Tensor, skips: Sequence[Tensor], taken: Sequence[int], even: bool = False
) -> list[Sequence[int] | None]:
    """What each block of the way up grows to: None for twice its size, else the size of the next state.

    Doubling is taken where it is known to fit: where the caller says that all sizes are `even` enough, or has stated
    it with `torch._check(size % factor == 0)`. Otherwise an export with dynamic sizes serves every size, as do the
    graphs that `torch.jit.trace` makes, to which sizes are tensors.
    """
    factor = 2 ** (len(taken) - 1)
    sides = sample.shape[2:]
    if even or all(not isinstance(side, Tensor) and statically_known_true(side % factor == 0) for side in sides):
        return [None] * len(taken)
    sizes: list[Sequence[int] | None] = []
    left = len(skips)
    for count in taken:
        left -= count
        sizes.append(skips[left - 1].shape[2:] if left else None)
    return sizes


def down_ways(plan: Sequence[tuple[Kind, Level]], style: Style) -> nn.ModuleList:
    """The blocks of the way down, the highest resolution first."""
    before = [plan[0][1].channels, *(level.channels for _, level in plan)]
    blocks = nn.ModuleList()
    for index, (kind, level) in enumerate(plan):
        halve = index < len(plan) - 1
        if kind.family == "plain":
            blocks.append(DownBlock(kind, level, before[index], style, halve=halve))
        else:
            build = KDownBlock if kind.family == "k" else SkipDownBlock
            blocks.append(build(kind, level, before[index], style.residual, halve=halve))
    return blocks


def up_ways(plan: Sequence[tuple[Kind, Level]], style: Style) -> nn.ModuleList:
    """The blocks of the way up, the lowest resolution first.

    The last residual block of each meets the state that entered its level on the way down.
    """
    widths = [level.channels for _, level in plan]
    before, after = [widths[0], *widths], [*widths[1:], widths[-1]]
    blocks = nn.ModuleList()
    for index, (kind, level) in enumerate(plan):
        double = index < len(plan) - 1
        skips = (level.channels,) * (len(level.depths) - 1) + (after[index],)
        if kind.family == "k":
            blocks.append(KUpBlock(kind, level, after[index], style.residual, double=double))
        elif kind.family == "skip":
            blocks.append(SkipUpBlock(kind, level, before[index], skips, style.residual, double=double))
        else:
            blocks.append(UpBlock(kind, level, before[index], skips, style, double=double))
    return blocks
