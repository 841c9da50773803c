"""Residual blocks and changes of resolution, shared by the UNets and the autoencoders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.models.activations import ACTIVATIONS
from anamorph.models.linear import Linear
from anamorph.models.phases import doubled, pays
from anamorph.models.row_norm import GroupNorm
from anamorph.models.told import Time, Times
from anamorph.rewrites import PHASES

Resample = Callable[[Tensor], Tensor]
MOST_GROUPS = 32
"""Groups of a norm whose number is not configured: a quarter of the channels, at most this."""


@dataclass(frozen=True)
class Residual:
    """What all residual blocks of a model or level have in common.

    `groups` None: a quarter of the channels, at most 32. `scale_shift`: the time scales and shifts the second norm
    instead of being added before it. `scale`: the sum of both branches is divided by it.
    """

    groups: int | None
    eps: float
    time_width: int | None = None
    scale_shift: bool = False
    activation: str = "silu"
    scale: float = 1.0

    def norm(self, channels: int, groups: int | None = None) -> nn.GroupNorm:
        """The group norm for so many channels."""
        return GroupNorm(groups or self.groups or min(channels // 4, MOST_GROUPS), channels, eps=self.eps)


class ResnetBlock2D(nn.Module):
    """(shortcut(x) + conv(act(norm(conv(act(norm(x))) + time)))) / scale on [B, C_in, h, w] -> [B, C_out, h, w].

    `time` is what the model's blocks share, [1 or B, time_width], or what they have made of it before. With
    `scale_shift` it gives scale s and shift t of the second norm, norm(h) (1 + s) + t (Dhariwal and Nichol 2021,
    arXiv:2105.05233, section 3). `resample` changes the resolution of both branches; a block that has it may want a
    1x1 shortcut between equal channels, too.
    Source: Ho et al. 2020 (arXiv:2006.11239), appendix B.
    """

    place: slice | None = None
    """Where its time projection lies among those of all residual blocks."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        common: Residual,
        *,
        resample: Resample | None = None,
        shortcut: bool | None = None,
        groups_in: int | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.scale_shift = common.scale, common.scale_shift
        self.activation, self.resample = ACTIVATIONS[common.activation], resample
        projected = channels_in != channels_out if shortcut is None else shortcut
        self.norm1 = common.norm(channels_in, groups_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.width = channels_out * (2 if common.scale_shift else 1)
        self.time_emb_proj = None if common.time_width is None else Linear(common.time_width, self.width)
        self.norm2 = common.norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if projected else None

    def forward(self, x: Tensor, time: Time | None = None) -> Tensor:
        h = self.activation(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self._timed(self.conv1(h), time)
        h = self.conv2(self.activation(h))
        total: Tensor = (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h
        return total if self.scale == 1.0 else total / self.scale

    def _timed(self, h: Tensor, time: Time | None) -> Tensor:
        """The second norm, with the time before or inside it."""
        if time is None or self.time_emb_proj is None:
            return cast(Tensor, self.norm2(h))
        row = time.row[:, self.place] if isinstance(time, Times) else self.time_emb_proj(time)
        told = row[:, :, None, None]
        if not self.scale_shift:
            return cast(Tensor, self.norm2(h + told))
        scale, shift = told.chunk(2, dim=1)
        return cast(Tensor, self.norm2(h) * (1 + scale) + shift)


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

    REWRITE = PHASES
    rewritten = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        if size is None and self.rewritten and pays(x, self.conv):
            return doubled(x, self.conv)
        grown: Tensor = self.conv(grow(x) if size is None else F.interpolate(x, size=list(size)))
        return grown


def grow(x: Tensor) -> Tensor:
    """Each pixel twice in both directions: [B, C, h, w] -> [B, C, 2h, 2w]."""
    return F.interpolate(x, scale_factor=2.0)


def shrink(x: Tensor) -> Tensor:
    """Means of 2x2 pixels: [B, C, h, w] -> [B, C, floor(h/2), floor(w/2)]."""
    return F.avg_pool2d(x, 2)


def blurred_shrink(x: Tensor, mode: str = "constant") -> Tensor:
    """Half the resolution after the filter [1, 3, 3, 1]/8 in both directions; `mode` says how edges are padded.

    The filter is the mean of neighbours taken three times, the last time with stride 2.
    Source: Karras et al. 2020 (arXiv:1912.04958), appendix B; Zhang 2019 (arXiv:1904.11486), section 3.
    """
    x = F.pad(x, (1, 1, 1, 1), mode=mode)
    return F.avg_pool2d(F.avg_pool2d(F.avg_pool2d(x, 2, stride=1), 2, stride=1), 2)


def blurred_grow(x: Tensor) -> Tensor:
    """Twice the resolution: zeros between the pixels, then the filter [1, 3, 3, 1]/4; zeros beyond the edges.

    Zeros and one mean of neighbours make nearest neighbours; [1, 2, 1]/4 is left of the filter.
    """
    return F.avg_pool2d(F.avg_pool2d(F.pad(grow(x), (1, 1, 1, 1)), 2, stride=1), 2, stride=1)


def reflected_grow(x: Tensor) -> Tensor:
    """As `blurred_grow`, with the pixels reflected at the edges."""
    wide = F.avg_pool2d(F.avg_pool2d(grow(F.pad(x, (1, 1, 1, 1), mode="reflect")), 2, stride=1), 2, stride=1)
    return wide[:, :, 1:-1, 1:-1]


def reflected_shrink(x: Tensor) -> Tensor:
    """As `blurred_shrink`, with the pixels reflected at the edges."""
    return blurred_shrink(x, "reflect")


class Scaled(nn.Module):
    """A change of resolution without weights, with the face of a layer."""

    def __init__(self, resample: Resample) -> None:
        super().__init__()
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class AdaGroupNorm(nn.Module):
    """norm(x) (1 + s) + t on [B, C, h, w] with [s, t] = W time + c and no weights of its own.

    Source: Dhariwal and Nichol 2021 (arXiv:2105.05233), section 3.
    """

    def __init__(self, time_width: int, channels: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.linear = Linear(time_width, 2 * channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.linear(time)[:, :, None, None].chunk(2, dim=1)
        normed: Tensor = F.group_norm(x, self.groups, eps=self.eps) * (1 + scale) + shift
        return normed


def through(x: Tensor, *groups: Sequence[nn.Module] | nn.ModuleList) -> Tensor:
    """x through all modules, in order."""
    for group in groups:
        for module in group:
            x = module(x)
    return x


def same_size(channels_in: int, channels_out: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps height and width (odd kernels)."""
    return nn.Conv2d(channels_in, channels_out, kernel, padding=(kernel - 1) // 2)
