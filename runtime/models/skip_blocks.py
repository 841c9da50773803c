"""The blocks of NCSN++, which carry a picture along: down beside the states, and up as a sum of drafts.

Source: Song et al. 2021 (arXiv:2011.13456), appendix H.1; Karras et al. 2020 (arXiv:1912.04958), section 4.1.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.models.blocks import MOST_GROUPS, Residual, ResnetBlock2D, blurred_grow, blurred_shrink
from anamorph.models.levels import Kind, Level
from anamorph.models.pixel_attention import PixelAttention

COLOURS = 3
"""Channels of the picture that is carried along."""


def _attention(level: Level, common: Residual) -> PixelAttention:
    heads = level.channels // level.head_width
    return PixelAttention(level.channels, groups=MOST_GROUPS, heads=heads, eps=common.eps, scale=common.scale)


def _common(common: Residual) -> Residual:
    """Both branches of a residual block count the same: their sum is divided by sqrt 2."""
    return replace(common, groups=None, scale=math.sqrt(2))


class SkipDownBlock(nn.Module):
    """Residual blocks, with attention behind each where the kind has it; then half the resolution, and the picture."""

    def __init__(self, kind: Kind, level: Level, channels_in: int, common: Residual, *, halve: bool) -> None:
        super().__init__()
        common, width, layers = _common(common), level.channels, range(len(level.depths))
        self.resnets = nn.ModuleList(ResnetBlock2D(width if i else channels_in, width, common) for i in layers)
        self.attentions = nn.ModuleList(_attention(level, common) for _ in layers if kind.attention)
        self.resnet_down = (
            ResnetBlock2D(width, width, common, resample=blurred_shrink, shortcut=True) if halve else None
        )
        self.skip_conv = nn.Conv2d(COLOURS, width, 1) if halve else None

    def forward(self, x: Tensor, picture: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        states: list[Tensor] = []
        for layer, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            x = self.attentions[layer](x) if self.attentions else x
            states.append(x)
        if self.resnet_down is not None and self.skip_conv is not None:
            picture = blurred_shrink(picture)
            x = self.skip_conv(picture) + self.resnet_down(x, time)
            states.append(x)
        return x, states, picture


class SkipUpBlock(nn.Module):
    """Residual blocks, each fed with one state of the way down, one attention where the kind has it; then a draft.

    The draft of the blocks below is doubled and this one's added; then the resolution is doubled.
    """

    def __init__(
        self, kind: Kind, level: Level, channels_in: int, skips: Sequence[int], common: Residual, *, double: bool
    ) -> None:
        super().__init__()
        common, width = _common(common), level.channels
        befores = [width if layer else channels_in for layer in range(len(skips))]
        # Beside attention the first norm's groups are counted otherwise, and checkpoints are trained with it.
        groups = [min(a + b // 4, MOST_GROUPS) if kind.attention else None for a, b in zip(befores, skips, strict=True)]
        self.resnets = nn.ModuleList(
            ResnetBlock2D(before + skip, width, common, groups_in=count)
            for before, skip, count in zip(befores, skips, groups, strict=True)
        )
        self.attentions = nn.ModuleList([_attention(level, common)] if kind.attention else [])
        self.taken = len(skips)
        self.resnet_up = ResnetBlock2D(width, width, common, resample=blurred_grow, shortcut=True) if double else None
        self.skip_norm = common.norm(width) if double else None
        self.skip_conv = nn.Conv2d(width, COLOURS, 3, padding=1) if double else None

    def forward(
        self, x: Tensor, skips: Sequence[Tensor], draft: Tensor | None, time: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        for layer, resnet in enumerate(self.resnets):
            x = resnet(torch.cat((x, skips[-1 - layer]), dim=1), time)
        for attention in self.attentions:
            x = attention(x)
        draft = None if draft is None else blurred_grow(draft)
        if self.resnet_up is not None and self.skip_norm is not None and self.skip_conv is not None:
            added: Tensor = self.skip_conv(F.silu(self.skip_norm(x)))
            draft = added if draft is None else draft + added
            x = self.resnet_up(x, time)
        return x, draft
