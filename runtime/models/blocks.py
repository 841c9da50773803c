"""Residual blocks and changes of resolution, shared by the UNet and the autoencoder."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Residual:
    """What all residual blocks of a model have in common."""

    groups: int
    eps: float
    time_width: int | None = None


class ResnetBlock2D(nn.Module):
    """(shortcut(x) + conv(silu(norm(conv(silu(norm(x))) + time)))) / scale on [B, C_in, h, w] -> [B, C_out, h, w].

    `time` is silu(t_emb), [1 or B, time_width]. Source: Ho et al. 2020 (arXiv:2006.11239), appendix B.
    """

    def __init__(self, channels_in: int, channels_out: int, common: Residual, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.norm1 = nn.GroupNorm(common.groups, channels_in, eps=common.eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = None if common.time_width is None else nn.Linear(common.time_width, channels_out)
        self.norm2 = nn.GroupNorm(common.groups, channels_out, eps=common.eps)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = None if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        total: Tensor = (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h
        return total if self.scale == 1.0 else total / self.scale


class Downsample2D(nn.Module):
    """A convolution of stride 2: [B, C, h, w] -> [B, C, ceil(h/2), ceil(w/2)] for `padding=1`.

    `padding=0` pads below and to the right instead, as the first latent autoencoders were trained: floor(h/2).
    """

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))
        return halved


class Upsample2D(nn.Module):
    """Nearest neighbours and a convolution: [B, C, h, w] -> [B, C, 2h, 2w], or to `size` where it is given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        grown = F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=list(size))
        doubled: Tensor = self.conv(grown)
        return doubled
