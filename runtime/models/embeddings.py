"""The timestep as a vector."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.models.activations import ACTIVATIONS
from anamorph.models.linear import Linear


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


class Sinusoids(nn.Module):
    """`sinusoids` of a fixed width as a layer; it has no weights."""

    def __init__(self, width: int, *, flip_sin_to_cos: bool, freq_shift: float) -> None:
        super().__init__()
        self.width, self.flip_sin_to_cos, self.freq_shift = width, flip_sin_to_cos, freq_shift

    def forward(self, timesteps: Tensor) -> Tensor:
        return sinusoids(timesteps, self.width, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)


class FourierFeatures(nn.Module):
    """[sin(2 pi w t), cos(2 pi w t)] with stored random frequencies w [F]: [N] -> [N, 2 F] in float32.

    `log` takes ln t for t; `flip_sin_to_cos` puts the cosines first.
    Source: Song et al. 2021 (arXiv:2011.13456), appendix C.2; Tancik et al. 2020 (arXiv:2006.10739), equation 5.
    """

    def __init__(self, frequencies: int, *, log: bool, flip_sin_to_cos: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.log, self.flip_sin_to_cos = log, flip_sin_to_cos
        self.weight = nn.Parameter(torch.randn(frequencies) * scale, requires_grad=False)

    def forward(self, timesteps: Tensor) -> Tensor:
        t = timesteps.float()
        # Angles reach 10^5, where an ulp is a hundredth: the order of operations is part of the checkpoint.
        angles = (t.log() if self.log else t)[:, None] * self.weight.float() * 2 * math.pi
        return torch.cat((angles.cos(), angles.sin()) if self.flip_sin_to_cos else (angles.sin(), angles.cos()), dim=-1)


class LearnedSteps(nn.Embedding):
    """One stored vector per whole timestep: [N] -> [N, width]."""

    def forward(self, timesteps: Tensor) -> Tensor:
        return super().forward(timesteps.long())


class TimestepEmbedding(nn.Module):
    """Two linear layers with an activation between them and, where named, one after: [N, width] -> [N, time_width].

    `condition_width` adds a bias-free projection of the guidance embedding to the input
    (Meng et al. 2022, arXiv:2210.03142, section 3.1).
    """

    def __init__(
        self,
        width: int,
        time_width: int,
        condition_width: int | None = None,
        *,
        activation: str = "silu",
        last: str | None = None,
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.last = None if last is None else ACTIVATIONS[last]
        self.linear_1 = Linear(width, time_width)
        self.cond_proj = None if condition_width is None else Linear(condition_width, width, bias=False)
        self.linear_2 = Linear(time_width, time_width)

    def forward(self, waves: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and condition is not None:
            waves = waves + self.cond_proj(condition)
        embedding: Tensor = self.linear_2(self.activation(self.linear_1(waves)))
        return embedding if self.last is None else self.last(embedding)
