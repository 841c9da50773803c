"""Convolutions of doubled pictures on the small picture: the rewrite "phase-convolutions"."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def doubled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` (3x3, padding 1) of x [B, C, h, w] with each pixel doubled, on x itself: [B, C_out, 2h, 2w].

    Graphs for engines hold four convolutions; PyTorch computes the same as one, which writes its values where they
    stay.
    """
    return (by_phases if torch.compiler.is_exporting() else transposed)(x, conv)


def pays(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether `doubled` saves more than it costs: PyTorch sums the taps in each call, for however few pixels."""
    return torch.compiler.is_exporting() or x.numel() >= conv.in_channels**2


def by_phases(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """See `doubled`: the four phases of the result, each a convolution of its own.

    Neighbouring taps that meet the same pixel are summed first. Along one side, with x_-1 = x_h = 0,

        y_2i = w_0 x_i-1 + (w_1 + w_2) x_i,    y_2i+1 = (w_0 + w_1) x_i + w_2 x_i+1,

    so that two sides take four convolutions of 2x2 taps, 4 products for each value instead of 9.
    """
    phases = [
        F.conv2d(F.pad(x, (1 - right, right, 1 - below, below)), taps, conv.bias)
        for below, rows in enumerate(_summed(conv.weight, 2))
        for right, taps in enumerate(_summed(rows, 3))
    ]
    height, width = x.shape[2:]
    # Each phase is written where it lies in one array, and moved once.
    four = torch.cat(phases, dim=1).reshape(-1, 2, 2, conv.out_channels, height, width)
    return four.permute(0, 3, 4, 1, 5, 2).reshape(-1, conv.out_channels, 2 * height, 2 * width)


def transposed(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """See `doubled`: one transposed convolution with 4x4 taps, stride 2 and padding 1.

    Pixel i adds its products to the places 2i-1 to 2i+2, along one side with the taps

        w_2,    w_1 + w_2,    w_0 + w_1,    w_0.
    """
    taps = _spread(_spread(conv.weight, 2), 3).transpose(0, 1)
    return F.conv_transpose2d(x, taps, conv.bias, stride=2, padding=1)


def _spread(weight: Tensor, axis: int) -> Tensor:
    """Three taps along one side as the four of the transposed convolution."""
    first, second, third = weight.unbind(axis)
    return torch.stack((third, second + third, first + second, first), axis)


def _summed(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Three taps along one side as the two of even and the two of odd places."""
    first, second, third = weight.unbind(axis)
    return torch.stack((first, second + third), axis), torch.stack((first + second, third), axis)
