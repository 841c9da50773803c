"""T2I-Adapters: small networks that turn a picture into features for each resolution of a UNet, once per picture.

Source: Mou et al. 2023 (arXiv:2302.08453), section 3.3.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.denoiser_interfaces import LIGHT, adapter_levels
from anamorph.models.alone import Alone


class Bottleneck(nn.Module):
    """x + W relu(V x) on [B, C, h, w]; V is a 3x3 convolution, and W one of `last` x `last`."""

    def __init__(self, channels: int, last: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, last, padding=last // 2)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.block2(F.relu(self.block1(x)))
        return x + h


class Features(nn.Module):
    """One resolution: perhaps half of the one before, then residual blocks; a light one computes them with fewer
    channels."""

    def __init__(self, before: int, after: int, blocks: int, *, halve: bool, light: bool) -> None:
        super().__init__()
        self.halve = halve
        inner = after // 4 if light else after
        self.in_conv = nn.Conv2d(before, inner, 1) if light or before != after else None
        self.resnets = nn.Sequential(*(Bottleneck(inner, 3 if light else 1) for _ in range(blocks)))
        self.out_conv = nn.Conv2d(inner, after, 1) if light else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2, ceil_mode=True) if self.halve else x
        x = x if self.in_conv is None else self.in_conv(x)
        x = self.resnets(x)
        return x if self.out_conv is None else self.out_conv(x)


class Body(nn.Module):
    """All resolutions of an adapter, after pixels in squares of `factor` have become channels."""

    def __init__(
        self, channels: int, widths: Sequence[int], halved: Sequence[int], blocks: int, factor: int, *, light: bool
    ) -> None:
        super().__init__()
        self.factor = factor
        entering = channels * factor**2
        self.conv_in = None if light else nn.Conv2d(entering, widths[0], 3, padding=1)
        before = (entering if light else widths[0], *widths)
        self.body = nn.ModuleList(
            Features(before[index], width, blocks, halve=index > 0 and halved[index] > halved[index - 1], light=light)
            for index, width in enumerate(widths)
        )

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        x = unshuffled(picture, self.factor)
        x = x if self.conv_in is None else self.conv_in(x)
        features = []
        for level in self.body:
            x = level(x)
            features.append(x)
        return tuple(features)


def unshuffled(x: Tensor, factor: int) -> Tensor:
    """Squares of pixels as channels: [B, C, f h, f w] -> [B, C f f, h, w]."""
    cut = torch.unflatten(torch.unflatten(x, 2, (-1, factor)), 4, (-1, factor))
    return cut.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


class T2IAdapter(Alone):
    """Features of a picture [B, C, H, W] in 0..1, one for each place of a UNet, [B, C_k, h_k, w_k].

    `full_adapter_xl` is for SDXL and halves but once; `light_adapter` computes with a quarter of the channels.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "in_channels": 3,
            "channels": (320, 640, 1280, 1280),
            "num_res_blocks": 2,
            "downscale_factor": 8,
            "adapter_type": "full_adapter",
        }
    )
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {"adapter_type": ("full_adapter", "full_adapter_xl", LIGHT)}
    )
    PARTS: ClassVar[Mapping[str, str]] = {"adapter": "features"}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        full, levels = self.config, adapter_levels(self.config)
        self.adapter = Body(
            full.in_channels, [width for width, _ in levels], [halved for _, halved in levels], full.num_res_blocks,
            full.downscale_factor, light=full.adapter_type == LIGHT,
        )  # fmt: skip

    @property
    def downscale_factor(self) -> int:
        """Sides of pictures are multiples of this."""
        return int(self.config.downscale_factor)

    @property
    def total_downscale_factor(self) -> int:
        """Pixels for each of the smallest features along one side."""
        return self.downscale_factor * int(2 ** adapter_levels(self.config)[-1][1])

    def features(self, picture: Tensor) -> tuple[Tensor, ...]:
        """See the class; a picture's sides are multiples of `downscale_factor`."""
        features: tuple[Tensor, ...] = self.adapter(picture)
        return features

    def forward(self, x: Tensor) -> list[Tensor]:
        """The same as a list."""
        return list(self.features(x))
