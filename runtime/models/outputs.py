"""What the models return."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Output:
    """Named results that unpack and index like the tuple of those that are not None."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The results in order, without those that were not asked for."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)

    def __getitem__(self, index: int) -> Any:
        return self.to_tuple()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())


@dataclass(frozen=True)
class UNet2DConditionOutput(Output):
    """`sample`: the prediction [B, C_out, h, w]; epsilon, v or x_0, as the scheduler's `prediction_type` says."""

    sample: Tensor


@dataclass(frozen=True)
class ControlNetOutput(Output):
    """What joins a UNet: one residual per state of its way down, in order, and one for its middle."""

    down_block_res_samples: tuple[Tensor, ...]
    mid_block_res_sample: Tensor


@dataclass(frozen=True)
class UNet2DOutput(Output):
    """`sample`: the prediction [B, C_out, h, w]; epsilon, v or x_0, as the scheduler's `prediction_type` says."""

    sample: Tensor


@dataclass(frozen=True)
class Transformer2DModelOutput(Output):
    """`sample`: the prediction [B, C_out, h, w]; a learned variance is its second half of channels."""

    sample: Tensor


@dataclass(frozen=True)
class DepthEstimatorOutput(Output):
    """`predicted_depth`: inverse depth of each pixel in a unit of its own, [B, h, w]."""

    predicted_depth: Tensor


@dataclass(frozen=True)
class DecoderOutput(Output):
    """`sample`: pictures in about -1..1, [B, C, H, W]."""

    sample: Tensor


@dataclass(frozen=True)
class AutoencoderTinyOutput(Output):
    """`latents`: [B, c, h, w], already scaled."""

    latents: Tensor


@dataclass(frozen=True)
class VQEncoderOutput(Output):
    """`latents`: [B, c, h, w], before they are quantised."""

    latents: Tensor


@dataclass(frozen=True)
class PooledOutput(Output):
    """States [B, S, D], the one that stands for all [B, D], and every layer's.

    Of a text: after the final norm, the end token's, and before that norm. Of a picture: before the final norm, and
    the whole picture's after it.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class EncoderOutput(Output):
    """`last_hidden_state`: states after the final norm, [B, S, D]."""

    last_hidden_state: Tensor


@dataclass(frozen=True)
class ImageProjectionOutput(Output):
    """`image_embeds`: the projected state of the whole picture [B, P]; the rest as in `PooledOutput`."""

    image_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class TextProjectionOutput(Output):
    """`text_embeds`: the projected states of the end token [B, P]; the rest as in `PooledOutput`."""

    text_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class DiagonalGaussianDistribution:
    """The latents' posterior q(z|x) = N(mean, diag(exp(logvar))), each [B, c, h, w]; logvar clamped to -30..20.

    `parameters` is mean and logvar joined on channels, [B, 2 c, h, w]. Source: Kingma and Welling 2013
    (arXiv:1312.6114), appendix B.
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @cached_property
    def std(self) -> Tensor:
        """Standard deviation, exp(logvar / 2)."""
        return torch.exp(0.5 * self.logvar)

    @cached_property
    def var(self) -> Tensor:
        """Variance, exp(logvar)."""
        return torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * z with standard normal z, drawn on the generator's device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The most probable latents, mean."""
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """KL(self || other) per picture [B], in nats; `other=None` is the standard normal distribution."""
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = ((self.mean - other.mean) ** 2 + self.var) / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))


@dataclass(frozen=True)
class AutoencoderKLOutput(Output):
    """`latent_dist`: the distribution of the latents of each picture."""

    latent_dist: DiagonalGaussianDistribution
