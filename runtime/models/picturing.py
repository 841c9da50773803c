"""Decoders that take a denoiser's latents and also give pictures as files hold them: the rewrite "bytes-out"."""

import torch
from torch import Tensor
from torch.nn import functional as F

from anamorph.decoders import BYTES, is_decoding
from anamorph.models.base import Model
from anamorph.scaling import Scaling


class Picturing(Model):
    """An autoencoder whose decoder can do both."""

    def method(self, part: str) -> str:
        return "pictures" if is_decoding(part) and BYTES in self.rewrites else super().method(part)

    method.__doc__ = Model.method.__doc__

    def pixels(self, latent_sample: Tensor) -> tuple[Tensor]:
        """Unscaled latents [B, c, h, w] -> pictures in about -1..1, ([B, C, H, W],)."""
        raise NotImplementedError

    def pictures(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of a denoiser [B, c, h, w] -> pictures in about -1..1 [B, C, H, W], and as bytes [B, H, W, C]."""
        sample = self.drawn(latents, Scaling.of(self.config))
        return sample, as_bytes(sample)

    def drawn(self, latents: Tensor, scaling: Scaling) -> Tensor:
        """Scaled latents [B, c, h, w] -> pictures in about -1..1 [B, C, H, W]."""
        return self.pixels(scaling.unscaled(latents, lambda values: torch.from_numpy(values).to(latents)))[0]


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures in about -1..1 [B, C, H, W] as `anamorph.image.to_uint8` rounds them, [B, H, W, C]."""
    unit = (pictures.float() * 0.5 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def rescaled(latents: Tensor, conv: torch.nn.Conv2d, scaling: Scaling) -> Tensor:
    """A 1x1 convolution of unscaled latents on scaled ones, by other weights: W (g x + m) + b = (W g) x + (W m + b).

    Only without borders: a larger one, such as the decoder's first, would have to take zeros for g x + m there, not
    for x. So the two are not made into one, either.
    """
    weight, bias = conv.weight, conv.bias
    if scaling.mean is None or scaling.deviation is None:
        return F.conv2d(latents, weight / scaling.factor, bias)
    gain = torch.from_numpy(scaling.deviation / scaling.factor).to(weight)
    shift = weight[:, :, 0, 0] @ torch.from_numpy(scaling.mean[:, 0, 0]).to(weight)
    return F.conv2d(latents, weight * gain, shift if bias is None else shift + bias)
