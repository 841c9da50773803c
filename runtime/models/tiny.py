"""The tiny autoencoder: latents to pictures and back in a few milliseconds."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from anamorph.config import Config
from anamorph.errors import ConfigError
from anamorph.models.activations import ACTIVATIONS, Activation
from anamorph.models.blocks import Scaled, grow
from anamorph.models.outputs import AutoencoderTinyOutput, DecoderOutput
from anamorph.models.picturing import Picturing
from anamorph.models.savings import Savings
from anamorph.tiling import Tiles

CLAMP = 3
"""Latents are clamped softly to -3..3 before they are decoded."""


class TinyBlock(nn.Module):
    """relu(conv(act(conv(act(conv(x))))) + x) on [B, C, h, w]."""

    def __init__(self, channels: int, activation: Activation) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, Scaled(activation), second, Scaled(activation), third)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class Half(nn.Module):
    """The encoder or the decoder: layers in one sequence, as checkpoints count them."""

    def __init__(self, layers: Iterator[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def _encoder(config: Config) -> Iterator[nn.Module]:
    activation, before = ACTIVATIONS[config.act_fn], config.in_channels
    for level, (width, count) in enumerate(
        zip(config.encoder_block_out_channels, config.num_encoder_blocks, strict=True)
    ):
        yield nn.Conv2d(before if level == 0 else width, width, 3, 1 if level == 0 else 2, 1, bias=level == 0)
        yield from (TinyBlock(width, activation) for _ in range(count))
    yield nn.Conv2d(config.encoder_block_out_channels[-1], config.latent_channels, 3, padding=1)


def _decoder(config: Config) -> Iterator[nn.Module]:
    activation, widths = ACTIVATIONS[config.act_fn], config.decoder_block_out_channels
    yield nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
    yield Scaled(activation)
    for level, (width, count) in enumerate(zip(widths, config.num_decoder_blocks, strict=True)):
        last = level == len(widths) - 1
        yield from (TinyBlock(width, activation) for _ in range(count))
        if not last:
            yield Scaled(grow)
        yield nn.Conv2d(width, config.out_channels if last else width, 3, padding=1, bias=last)


class AutoencoderTiny(Savings, Picturing):
    """A distilled autoencoder (TAESD, github.com/madebyollin/taesd) with the latents of the one that it replaces.

    Its latents are already scaled: `scaling_factor` is 1.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "in_channels": 3,
        "out_channels": 3,
        "encoder_block_out_channels": (64, 64, 64, 64),
        "decoder_block_out_channels": (64, 64, 64, 64),
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "latent_channels": 4,
        "upsampling_scaling_factor": 2,
        "num_encoder_blocks": (1, 3, 3, 3),
        "num_decoder_blocks": (3, 3, 3, 1),
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "force_upcast": False,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": tuple(ACTIVATIONS),
        "upsample_fn": ("nearest",),
        "upsampling_scaling_factor": (2,),
    }
    FOREIGN: ClassVar[tuple[str, ...]] = ("block_out_channels",)
    PARTS: ClassVar[Mapping[str, str]] = {"vae_encoder": "latents", "vae_decoder": "pixels"}
    SIDE: ClassVar[int] = 512
    """Side of a tile in pixels; tiles overlap by an eighth."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.encoder, self.decoder = Half(_encoder(self.config)), Half(_decoder(self.config))

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete(config)
        for half in ("encoder", "decoder"):
            widths, counts = full[f"{half}_block_out_channels"], full[f"num_{half}_blocks"]
            if len(widths) != len(counts) or len(set(widths)) != 1:
                raise ConfigError(
                    f"{cls.__name__} needs {half}_block_out_channels of one width, one per entry of "
                    f"num_{half}_blocks, got {widths} and {counts}"
                )
        # diffusers writes this key beside its own parameters, for whoever computes the number of levels.
        return full.replace(block_out_channels=full.decoder_block_out_channels)

    def latents(self, sample: Tensor) -> tuple[Tensor]:
        """Pictures in -1..1 [B, C, H, W] -> their latents, ([B, c, h, w],)."""
        return (self.encoder((sample + 1) / 2),)

    def pixels(self, latent_sample: Tensor) -> tuple[Tensor]:
        """Latents [B, c, h, w] -> pictures in about -1..1, ([B, C, H, W],)."""
        return (self.decoder(torch.tanh(latent_sample / CLAMP) * CLAMP) * 2 - 1,)

    @property
    def tiles(self) -> tuple[Tiles, Tiles]:
        """How pictures are cut to encode them and latents to decode them, where tiling is enabled."""
        scale = 2 ** (len(self.config.decoder_block_out_channels) - 1)
        pixels, latents = self.SIDE, self.SIDE // scale
        return (
            Tiles(pixels, pixels - pixels // 8, latents // 8, latents - latents // 8),
            Tiles(latents, latents - latents // 8, pixels // 8, pixels - pixels // 8),
        )

    @overload
    def encode(self, x: Tensor, return_dict: Literal[True] = True) -> AutoencoderTinyOutput: ...
    @overload
    def encode(self, x: Tensor, return_dict: bool) -> AutoencoderTinyOutput | tuple[Tensor]: ...
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Pictures in -1..1 [B, C, H, W] -> latents [B, c, h, w]."""
        encoded = self.saving(lambda part: self.latents(part)[0], x, self.tiles[0])
        return AutoencoderTinyOutput(encoded) if return_dict else (encoded,)

    @overload
    def decode(self, x: Tensor, return_dict: Literal[True] = True) -> DecoderOutput: ...
    @overload
    def decode(self, x: Tensor, return_dict: bool) -> DecoderOutput | tuple[Tensor]: ...
    def decode(self, x: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents [B, c, h, w] -> pictures in about -1..1 [B, C, H, W]."""
        decoded = self.saving(lambda part: self.pixels(part)[0], x, self.tiles[1])
        return DecoderOutput(decoded) if return_dict else (decoded,)

    def scale_latents(self, x: Tensor) -> Tensor:
        """Latents as shades 0..1: clip(x / (2 latent_magnitude) + latent_shift, 0, 1)."""
        shades: Tensor = x / (2 * self.config.latent_magnitude) + self.config.latent_shift
        return shades.clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """Shades 0..1 as latents: (x - latent_shift) 2 latent_magnitude."""
        latents: Tensor = (x - self.config.latent_shift) * (2 * self.config.latent_magnitude)
        return latents

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pictures -> latents, as whole shades 0..255 -> pictures."""
        shades = (self.scale_latents(self.encode(sample).latents) * 255).round()
        return self.decode(self.unscale_latents(shades / 255), return_dict)
