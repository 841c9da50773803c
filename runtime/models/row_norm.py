"""Group normalisation from rows of pixels: for the rewrite "row-norms", and in channels-last order."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.rewrites import ROWS

SUMMED = 4096
"""Pixels at most whose values are added up one by one: longer sums lose digits of float32."""


class GroupNorm(nn.GroupNorm):
    """PyTorch's, which obeys the rewrite on pictures, and is exact in every order: [B, C, h, w] -> [B, C, h, w]."""

    REWRITE = ROWS
    rewritten = False

    def forward(self, x: Tensor) -> Tensor:
        if self.rewritten and x.ndim == 4:
            return by_rows(x, self)
        return by_pixels(x, self) if _is_channels_last(x) else super().forward(x)


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


def by_pixels(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`norm` of x [B, C, h, w] in float32 and channels-last order.

    PyTorch's own takes mean(x^2) - m^2 there, of sums over all pixels: where m is ten deviations, pictures of 512x512
    pixels keep four digits. With means m_k and variances v_k about these of each channel over n_k pixels,

        m = sum(n_k m_k) / n,    v = sum(n_k (v_k + (m_k - m)^2)) / n,    y = w (x - m) / sqrt(v + eps) + b.

    Source: Wu and He 2018 (arXiv:1803.08494), equations 1, 2 and 7; Chan, Golub and LeVeque 1983, equation 2.1.
    """
    batch, channels, height, width = x.shape
    groups, inner = norm.num_groups, channels // norm.num_groups
    parts = torch.split(x, max(1, SUMMED // width), 2)
    found = [torch.batch_norm_update_stats(one, None, None, 0.0) for part in parts for one in torch.split(part, 1)]
    means, spreads = (
        torch.stack(each).double().reshape(len(parts), batch, groups, inner) for each in zip(*found, strict=True)
    )
    shares = torch.tensor([part.shape[2] for part in parts], dtype=torch.float64) / (height * inner)
    shares = shares.reshape(-1, 1, 1, 1)
    mean = (shares * means).sum((0, 3), keepdim=True)
    spread = (shares * (spreads + (means - mean).square())).sum((0, 3), keepdim=True)
    scale = norm.weight.reshape(groups, inner) / (spread + norm.eps).sqrt()
    shift = norm.bias.reshape(groups, inner) - mean * scale
    scale, shift = (each.to(x.dtype).reshape(batch, channels, 1, 1) for each in (scale, shift))
    return torch.addcmul(shift, x, scale)


def _is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch on processors would take its norm for channels-last order, and that may be replaced."""
    return (
        x.ndim == 4
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or _traced())
    )


def _traced() -> bool:
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing


def _root(size: int) -> float | Tensor:
    """The square root of a size, which may be open in a graph."""
    if isinstance(size, int):
        return math.sqrt(size)
    last = torch.arange(size).amax(dim=0)
    return (last + 1).float().sqrt()
