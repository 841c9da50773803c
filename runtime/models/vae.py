"""The autoencoder between pictures and latents."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from anamorph.checkpoint import LATER_KEYS
from anamorph.config import Config
from anamorph.models.blocks import Residual
from anamorph.models.outputs import AutoencoderKLOutput, DecoderOutput, DiagonalGaussianDistribution
from anamorph.models.picturing import Picturing, rescaled
from anamorph.models.pixel_attention import renamed
from anamorph.models.savings import Savings
from anamorph.models.vae_blocks import Decoder, Encoder, check_blocks
from anamorph.scaling import Scaling
from anamorph.tiling import Tiles, autoencoder_tiles


class AutoencoderKL(Savings, Picturing):
    """The KL-regularised autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.1).

    It neither scales nor shifts latents: `scaling_factor` and its kin are for whoever calls it.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "block_out_channels": (64,),
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": 32,
        **LATER_KEYS["AutoencoderKL"],
    }
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {"act_fn": ("silu", "swish")}
    POINTWISE: ClassVar[tuple[str, ...]] = ("*.attentions.0.to_*.weight",)
    PARTS: ClassVar[Mapping[str, str]] = {"vae_encoder": "moments", "vae_decoder": "pixels"}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        full, latents = self.config, self.config.latent_channels
        common = Residual(full.norm_num_groups, eps=1e-6)
        self.encoder = Encoder(full, common, 2 * latents)
        self.decoder = Decoder(full, common)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1) if full.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if full.use_post_quant_conv else None

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete(config)
        check_blocks(cls.__name__, full)
        return full

    @classmethod
    def rename(cls, name: str) -> str:
        return renamed(name)

    def moments(self, sample: Tensor) -> tuple[Tensor]:
        """Pictures in -1..1 [B, C, H, W] -> mean and log-variance of their latents, joined: ([B, 2 c, h, w],)."""
        encoded = self.encoder(sample)
        return (encoded if self.quant_conv is None else self.quant_conv(encoded),)

    def pixels(self, latent_sample: Tensor) -> tuple[Tensor]:
        """Unscaled latents [B, c, h, w] -> pictures in about -1..1, ([B, C, H, W],)."""
        z = latent_sample if self.post_quant_conv is None else self.post_quant_conv(latent_sample)
        return (self.decoder(z),)

    def drawn(self, latents: Tensor, scaling: Scaling) -> Tensor:
        if self.post_quant_conv is None:
            return super().drawn(latents, scaling)
        pictures: Tensor = self.decoder(rescaled(latents, self.post_quant_conv, scaling))
        return pictures

    drawn.__doc__ = Picturing.drawn.__doc__

    @overload
    def encode(self, x: Tensor, return_dict: Literal[True] = True) -> AutoencoderKLOutput: ...
    @overload
    def encode(self, x: Tensor, return_dict: bool) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]: ...
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pictures in -1..1 [B, C, H, W] -> the distribution of their latents [B, c, h, w]."""
        encode, _ = self.tiles
        posterior = DiagonalGaussianDistribution(self.saving(lambda part: self.moments(part)[0], x, encode))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    @overload
    def decode(self, z: Tensor, return_dict: Literal[True] = True) -> DecoderOutput: ...
    @overload
    def decode(self, z: Tensor, return_dict: bool) -> DecoderOutput | tuple[Tensor]: ...
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Unscaled latents [B, c, h, w] -> pictures in about -1..1 [B, C, H, W]."""
        _, decode = self.tiles
        decoded = self.saving(lambda part: self.pixels(part)[0], z, decode)
        return DecoderOutput(decoded) if return_dict else (decoded,)

    @property
    def tiles(self) -> tuple[Tiles, Tiles]:
        """How pictures are cut to encode them and latents to decode them, where tiling is enabled."""
        return autoencoder_tiles(self.config)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Pictures -> latents (their mode, or a sample of them) -> pictures."""
        posterior = self.encode(sample).latent_dist
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)
