"""The native signature of an autoencoder's decoder, by the rewrite bytes-out.

It takes the denoiser's latents, which the plain one gets unscaled, and gives pictures as bytes beside those in float32,
which whoever wants more than bytes, and every check for NaN, still reads. No PyTorch here.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anamorph.interface import Interface, Port

BYTES = "bytes-out"
SCALED, PICTURES = "latents", "pictures"
"""What it takes, and what it gives beside `sample`."""
SHOWN = (1, 3, 4)
"""Channels of pictures as bytes: grey, RGB, RGBA."""


def is_decoding(part: str) -> bool:
    """Whether a part makes pictures of an autoencoder's latents."""
    return part.endswith("_decoder")


def picturing(plain: Interface) -> Interface:
    """The interface of a plain decoder by this rewrite: its pictures [B, H, W, C] as bytes come last."""
    (latents,), (sample,) = plain.inputs, plain.outputs
    batch, channels, *sides = sample.axes
    pictures = Port(PICTURES, (batch, *sides, channels), "uint8")
    return replace(plain, inputs=(replace(latents, name=SCALED),), outputs=(sample, pictures))


def bytes_unmet(part: str, class_name: str, config: Mapping[str, Any]) -> str | None:
    """Why a part makes no pictures as bytes, or None; the name of an autoencoder stands for its decoder."""
    if class_name not in ("AutoencoderKL", "AutoencoderTiny", "VQModel") or part.endswith("_encoder"):
        return "it makes no pictures"
    return None if config["out_channels"] in SHOWN else "its pictures are neither grey, RGB nor RGBA"
