"""Group normalisation from rows of pixels: the rewrite "row-norms"."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.rewrites import ROWS


class GroupNorm(nn.GroupNorm):
    """PyTorch's, which obeys the rewrite on pictures: [B, C, h, w] -> [B, C, h, w]."""

    REWRITE = ROWS
    rewritten = False

    def forward(self, x: Tensor) -> Tensor:
        plain = not self.rewritten or x.ndim != 4
        return super().forward(x) if plain else by_rows(x, self)


def by_rows(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`norm` of x [B, C, h, w], never seen as groups in a row: engines would move all values there and back for that.

    With the means m_r and the deviations s_r = sqrt(mean((x - m)^2)) of the rows of a group, which are few,

        m = mean(m_r),    s = sqrt(mean(s_r^2) + eps),    y = (w / s) x + (b - w m / s).

    Nothing is squared outside of a sum, so that float16 holds it wherever it holds x.
    Source: Wu and He 2018 (arXiv:1803.08494), equations 1, 2 and 7.
    """
    batch, channels, height, width = x.shape
    groups, inner = norm.num_groups, channels // norm.num_groups
    mean = x.mean(3).reshape(batch, groups, inner * height).mean(2, keepdim=True)
    mean = mean.expand(-1, -1, inner).reshape(batch, channels, 1, 1)
    rows = torch.linalg.vector_norm(x - mean, dim=3) / _root(width)
    spread = torch.linalg.vector_norm(rows.reshape(batch, groups, inner * height), dim=2, keepdim=True)
    spread = spread / _root(inner * height)
    spread = torch.linalg.vector_norm(F.pad(spread, (0, 1), value=norm.eps**0.5), dim=2, keepdim=True)
    scale = (norm.weight.reshape(1, groups, inner) / spread).reshape(batch, channels, 1, 1)
    y: Tensor = x * scale + (norm.bias.reshape(1, channels, 1, 1) - mean * scale)
    return y


def _root(size: int) -> float | Tensor:
    """The square root of a size, which may be open in a graph."""
    if isinstance(size, int):
        return math.sqrt(size)
    last = torch.arange(size).amax(dim=0)
    return (last + 1).float().sqrt()
