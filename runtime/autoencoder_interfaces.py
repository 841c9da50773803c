"""What autoencoders take and return, computed from their configurations."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anamorph.config import Config
from anamorph.interface import BATCH, Axis, Interface, Port, Scaled


def vae_encoder_interface(config: Config) -> Interface:
    """Pictures in -1..1 [B, C, H, W] -> mean and log-variance of the latents, joined [B, 2 c, h, w]."""
    return _encoder(config, Port("latent_parameters", (BATCH, 2 * config["latent_channels"])))


def plain_encoder_interface(config: Config) -> Interface:
    """Pictures in -1..1 [B, C, H, W] -> their latents [B, c, h, w]."""
    return _encoder(config, Port("latents", (BATCH, latent_channels(config))))


def _encoder(config: Config, latents: Port) -> Interface:
    multiple = vae_scale_factor(config)
    height, width = Axis("height", multiple, multiple), Axis("width", multiple, multiple)
    size = (Scaled("height", 1, multiple), Scaled("width", 1, multiple))
    sample = Port("sample", (BATCH, config["in_channels"], height, width))
    return Interface("vae_encoder", (sample,), (replace(latents, axes=(*latents.axes, *size)),))


def vae_decoder_interface(config: Config) -> Interface:
    """Unscaled latents [B, c, h, w] -> pictures in about -1..1 [B, C, H, W]."""
    latents = (BATCH, latent_channels(config), Axis("latent_height"), Axis("latent_width"))
    factor = vae_scale_factor(config)
    pictures = (BATCH, config["out_channels"], Scaled("latent_height", factor), Scaled("latent_width", factor))
    return Interface("vae_decoder", (Port("latent_sample", latents),), (Port("sample", pictures),))


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of an autoencoder's latents; a codebook may be narrower than what it is looked up for."""
    return int(config.get("vq_embed_dim") or config["latent_channels"])


def vae_scale_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent along one side: 2 to the number of levels less one."""
    levels = config.get("block_out_channels") or config["decoder_block_out_channels"]
    return int(2 ** (len(levels) - 1))
