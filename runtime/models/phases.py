"""Convolutions of doubled pictures on the small picture: the rewrite "phase-convolutions"."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def doubled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` (3x3, padding 1) of x [B, C, h, w] with each pixel doubled, on x itself: [B, C_out, 2h, 2w].

    Two neighbouring taps w_k, w_k+1 that meet the same pixel are summed first. Along one side, with x_-1 = x_h = 0,

        y_2i = w_0 x_i-1 + (w_1 + w_2) x_i,    y_2i+1 = (w_0 + w_1) x_i + w_2 x_i+1,

    which takes 4 products instead of 9 on two sides and is the transposed convolution of stride 2 with the taps
    (w_2, w_1 + w_2, w_0 + w_1, w_0).
    """
    return F.conv_transpose2d(x, _summed(_summed(conv.weight, 2), 3).transpose(0, 1), conv.bias, stride=2, padding=1)


def _summed(weight: Tensor, axis: int) -> Tensor:
    """Three taps as four along one side."""
    first, second, third = weight.unbind(axis)
    return torch.stack((third, second + third, first + second, first), axis)
