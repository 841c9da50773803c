"""SDXL's invisible watermark, through the package invisible-watermark; off unless it is asked for."""

import importlib.util
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.errors import InputError

BITS = 0b101100111110110010010000011110111011000110011110
"""The mark that pictures of SDXL's kind carry, from the code that its makers published."""
SMALLEST = 256
"""Narrower pictures cannot carry it (pixels)."""


def check(width: int | None = None) -> None:
    """Raise InputError where the package is missing, or the picture is too narrow."""
    if importlib.util.find_spec("imwatermark") is None:
        raise InputError(
            "add_watermarker needs the package invisible-watermark, which is not installed; run: "
            "pip install invisible-watermark, or leave add_watermarker out"
        )
    if width is not None and width < SMALLEST:
        raise InputError(f"a watermark needs pictures at least {SMALLEST} pixels wide, got {width}; leave it out")


def marked(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Pictures [B, 3, H, W] in -1..1 with the mark in their wavelets' cosines."""
    import imwatermark

    encoder = imwatermark.WatermarkEncoder()
    encoder.set_watermark("bits", [int(bit) for bit in f"{BITS:b}"])
    levels = np.float32(255) * (pixels.astype(np.float32) / 2 + np.float32(0.5))
    # The package takes blue first.
    pictures = [encoder.encode(one.transpose(1, 2, 0)[..., ::-1], "dwtDct")[..., ::-1] for one in levels]
    values: NDArray[np.float32] = np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32)
    result: NDArray[np.float32] = (2 * (values / np.float32(255) - np.float32(0.5))).clip(-1, 1)
    return result
