"""The timestep as a vector."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoids(timesteps: Tensor, width: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoidal embedding of timesteps [N] as [N, width] in float32.

    omega_k = 10000^(-k / (width/2 - freq_shift)), k < width/2; the result is [sin(omega t), cos(omega t)], or the
    cosines first where `flip_sin_to_cos`. An odd width ends in a zero.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5.
    """
    half = width // 2
    # Timesteps reach 1000, which makes an ulp of omega visible: the order of operations is part of the checkpoint.
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    omega = torch.exp(exponents / (half - freq_shift))
    angles = timesteps.float()[:, None] * omega
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(waves, dim=-1), (0, width % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between them: [N, width] -> [N, time_width].

    `condition_width` adds a bias-free projection of the guidance embedding to the input
    (Meng et al. 2022, arXiv:2210.03142, section 3.1).
    """

    def __init__(self, width: int, time_width: int, condition_width: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, time_width)
        self.cond_proj = None if condition_width is None else nn.Linear(condition_width, width, bias=False)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, waves: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and condition is not None:
            waves = waves + self.cond_proj(condition)
        embedding: Tensor = self.linear_2(F.silu(self.linear_1(waves)))
        return embedding
