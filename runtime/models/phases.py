"""Convolutions of doubled pictures on the small picture: the rewrite "phase-convolutions"."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def doubled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` (3x3, padding 1) of x [B, C, h, w] with each pixel doubled, on x itself: [B, C_out, 2h, 2w].

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


def _summed(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Three taps along one side as the two of even and the two of odd places."""
    first, second, third = weight.unbind(axis)
    return torch.stack((first, second + third), axis), torch.stack((first + second, third), axis)
