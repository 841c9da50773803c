"""The autoencoder between pictures and latents."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.config import Config
from anamorph.errors import ConfigError
from anamorph.models.attention import PixelAttention, renamed
from anamorph.models.base import Model
from anamorph.models.blocks import Downsample2D, Residual, ResnetBlock2D, Upsample2D, through
from anamorph.models.outputs import AutoencoderKLOutput, DecoderOutput, DiagonalGaussianDistribution


class EncoderLevel(nn.Module):
    """Residual blocks at one resolution, then half of it."""

    def __init__(self, channels_in: int, channels: int, layers: int, common: Residual, *, halve: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnets(channels_in, channels, layers, common))
        self.downsamplers = nn.ModuleList([Downsample2D(channels, padding=0)] if halve else [])

    def forward(self, x: Tensor) -> Tensor:
        return through(x, self.resnets, self.downsamplers)


class DecoderLevel(nn.Module):
    """Residual blocks at one resolution, then twice of it."""

    def __init__(self, channels_in: int, channels: int, layers: int, common: Residual, *, double: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnets(channels_in, channels, layers, common))
        self.upsamplers = nn.ModuleList([Upsample2D(channels)] if double else [])

    def forward(self, x: Tensor) -> Tensor:
        return through(x, self.resnets, self.upsamplers)


class MidBlock(nn.Module):
    """Two residual blocks at the lowest resolution, attention between them where the configuration has it."""

    def __init__(self, channels: int, common: Residual, *, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups=common.groups)] if attention else [])
        self.resnets = nn.ModuleList(_resnets(channels, channels, 2, common))

    def forward(self, x: Tensor) -> Tensor:
        return through(x, self.resnets[:1], self.attentions, self.resnets[1:])


class Encoder(nn.Module):
    """Pictures [B, C, H, W] -> [B, 2 c, h, w], one level per entry of `block_out_channels`."""

    def __init__(self, config: Config, common: Residual) -> None:
        super().__init__()
        widths, layers = config.block_out_channels, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderLevel(widths[max(i - 1, 0)], width, layers, common, halve=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], common, attention=config.mid_block_add_attention)
        self.conv_norm_out = common.norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = through(self.conv_in(x), self.down_blocks)
        encoded: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return encoded


class Decoder(nn.Module):
    """Latents [B, c, h, w] -> pictures [B, C, H, W]; the encoder's levels in reverse, one residual block more each."""

    def __init__(self, config: Config, common: Residual) -> None:
        super().__init__()
        widths, layers = config.block_out_channels[::-1], config.layers_per_block + 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], common, attention=config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            DecoderLevel(widths[max(i - 1, 0)], width, layers, common, double=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = common.norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = through(self.mid_block(self.conv_in(z)), self.up_blocks)
        decoded: Tensor = self.conv_out(F.silu(self.conv_norm_out(z)))
        return decoded


class AutoencoderKL(Model):
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
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    }
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {"act_fn": ("silu", "swish")}
    POINTWISE: ClassVar[tuple[str, ...]] = ("*.attentions.0.to_*.weight",)
    PARTS: ClassVar[Mapping[str, str]] = {"vae_encoder": "moments", "vae_decoder": "pixels"}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        full, latents = self.config, self.config.latent_channels
        common = Residual(full.norm_num_groups, eps=1e-6)
        self.encoder = Encoder(full, common)
        self.decoder = Decoder(full, common)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1) if full.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if full.use_post_quant_conv else None

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete(config)
        levels = len(full.block_out_channels)
        for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if full[key] != (block,) * levels:
                raise ConfigError(
                    f"{cls.__name__} does not serve {key}={full[key]!r}; it serves {levels} times {block}"
                )
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

    @overload
    def encode(self, x: Tensor, return_dict: Literal[True] = True) -> AutoencoderKLOutput: ...
    @overload
    def encode(self, x: Tensor, return_dict: bool) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]: ...
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pictures in -1..1 [B, C, H, W] -> the distribution of their latents [B, c, h, w]."""
        posterior = DiagonalGaussianDistribution(*self.moments(x))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    @overload
    def decode(self, z: Tensor, return_dict: Literal[True] = True) -> DecoderOutput: ...
    @overload
    def decode(self, z: Tensor, return_dict: bool) -> DecoderOutput | tuple[Tensor]: ...
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Unscaled latents [B, c, h, w] -> pictures in about -1..1 [B, C, H, W]."""
        return DecoderOutput(*self.pixels(z)) if return_dict else self.pixels(z)

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


def _resnets(channels_in: int, channels: int, layers: int, common: Residual) -> Iterable[ResnetBlock2D]:
    return (ResnetBlock2D(channels if layer else channels_in, channels, common) for layer in range(layers))
