"""The blocks of k-diffusion's UNet, which the latent upscaler by two uses.

Their norms have no weights and take scale and shift from the time; resolutions change by fixed filters; each level
hands a single state to the way up.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anamorph.errors import InputError
from anamorph.models.activations import ACTIVATIONS
from anamorph.models.attention import Attention
from anamorph.models.blocks import AdaGroupNorm, Residual, Scaled, reflected_grow, reflected_shrink
from anamorph.models.levels import Kind, Level
from anamorph.models.pixel_attention import to_pixels, to_tokens
from anamorph.models.told import Joint, Text

GROUP = 32
"""Channels per group of the norms."""


class KResnet(nn.Module):
    """shortcut(x) + conv(act(norm(conv(act(norm(x, time))), time))) on [B, C_in, h, w] -> [B, C_out, h, w]."""

    def __init__(self, channels_in: int, channels: int, channels_out: int, common: Residual, groups: int) -> None:
        super().__init__()
        time_width = common.time_width or 0
        self.activation = ACTIVATIONS[common.activation]
        self.norm1 = AdaGroupNorm(time_width, channels_in, channels_in // GROUP, common.eps)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = AdaGroupNorm(time_width, channels, groups, common.eps)
        self.conv2 = nn.Conv2d(channels, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.conv_shortcut = None if same else nn.Conv2d(channels_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(self.activation(self.norm1(x, time)))
        h = self.conv2(self.activation(self.norm2(h, time)))
        total: Tensor = (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h
        return total


class KAttention(nn.Module):
    """Attention of the pixels to themselves (where `itself`) and to the text, each normed before and added after."""

    def __init__(self, channels: int, level: Level, common: Residual, *, itself: bool) -> None:
        super().__init__()
        time_width, groups, heads = common.time_width or 0, max(1, channels // GROUP), channels // level.head_width
        self.norm1 = AdaGroupNorm(time_width, channels, groups) if itself else None
        self.attn1 = Attention(channels, heads, bias=True) if itself else None
        self.norm2 = AdaGroupNorm(time_width, channels, groups)
        self.attn2 = Attention(channels, heads, level.context_width, bias=True, norm_context=True)

    def forward(self, x: Tensor, time: Tensor, text: Text | None) -> Tensor:
        if self.norm1 is not None and self.attn1 is not None:
            x = to_pixels(self.attn1(to_tokens(self.norm1(x, time))), x) + x
        return to_pixels(self.attn2(to_tokens(self.norm2(x, time)), text), x) + x


class KLayers(nn.Module):
    """Residual blocks of widths (in, inside, out), with attention behind each where the kind has it."""

    def __init__(
        self, kind: Kind, level: Level, widths: Sequence[tuple[int, int, int]], common: Residual, *, itself: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(KResnet(*three, common, level.channels // GROUP) for three in widths)
        self.attentions = nn.ModuleList(
            KAttention(out, level, common, itself=itself) for *_, out in widths if kind.attention
        )

    def layers(self, x: Tensor, time: Tensor, text: Text | None) -> Tensor:
        """x through all of them."""
        for layer, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[layer](x, time, text)
        return x


class KDownBlock(KLayers):
    """Layers, then half the resolution; their last state is for the way up, but not that of the lowest attention."""

    def __init__(self, kind: Kind, level: Level, channels_in: int, common: Residual, *, halve: bool) -> None:
        width = level.channels
        widths = [(width if layer else channels_in, width, width) for layer in range(len(level.depths))]
        super().__init__(kind, level, widths, common, itself=not halve)
        self.kept = halve or kind.attention is None
        self.downsamplers = nn.ModuleList([Scaled(reflected_shrink)] if halve else [])

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: Text | None = None,
        residual: Joint | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        if residual is not None:
            raise InputError("blocks of k-diffusion take no down_intrablock_additional_residuals; leave them out")
        x = self.layers(x, time, text)
        states = [x] if self.kept else []
        for downsample in self.downsamplers:
            x = downsample(x)
        return x, states


class KUpBlock(KLayers):
    """Layers, fed with the state of the way down where there is one; then twice the resolution."""

    def __init__(self, kind: Kind, level: Level, channels_out: int, common: Residual, *, double: bool) -> None:
        # How many states of the way down it takes: the lowest one takes none, its widths tell.
        width, last = level.channels, len(level.depths) - 2
        self.taken = 0 if kind.attention and width == channels_out == common.time_width else 1
        widths = [
            (
                (1 + self.taken) * width if layer == 0 else width,
                width if kind.attention or layer < last else channels_out,
                width if layer < last else channels_out,
            )
            for layer in range(last + 1)
        ]
        super().__init__(kind, level, widths, common, itself=self.taken == 0)
        self.upsamplers = nn.ModuleList([Scaled(reflected_grow)] if double else [])

    def forward(
        self,
        x: Tensor,
        skips: Sequence[Tensor],
        time: Tensor,
        text: Text | None = None,
        _size: Sequence[int] | None = None,
    ) -> Tensor:
        x = self.layers(torch.cat((x, *skips), dim=1) if skips else x, time, text)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x
