"""Arrays to pictures, and PNG files that carry the request they were made from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from anamorph.errors import InputError
from anamorph.files import replacing

KEYWORD = "anamorph"
"""Keyword of the PNG text chunk that holds the request as JSON."""

LARGEST_REQUEST = 1 << 20
"""A longer chunk is refused (bytes)."""


def to_unit(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Decoded pictures [N, C, H, W] in about -1..1 to [N, H, W, C] in 0..1: clamp(x / 2 + 1/2)."""
    unit = np.clip(pixels.astype(np.float32, copy=False) * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.ascontiguousarray(unit.transpose(0, 2, 3, 1))


def to_uint8(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Decoded pictures [N, C, H, W] in about -1..1 to bytes [N, H, W, C], rounded to the nearest (halves to even)."""
    return np.round(to_unit(pixels) * 255).astype(np.uint8)


def to_pil(pixels: NDArray[Any]) -> list[Image.Image]:
    """Decoded pictures [N, C, H, W] in about -1..1, C = 1 or 3, as Pillow images."""
    return [Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture) for picture in to_uint8(pixels)]


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of two arrays in 0..1: -10 log10(mean((a - b)^2)), dB; infinite when equal."""
    error = float(np.mean(np.square(a.astype(np.float64) - b)))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def write_png(image: Image.Image, path: Path, request: Mapping[str, Any]) -> None:
    """Write a PNG whose text chunk holds `request` as JSON.

    Raises OutputError: the disk is full or read-only.
    """
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEYWORD, json.dumps(request, ensure_ascii=False))
    info.add_text("Software", "Anamorph")
    with replacing(path) as draft:
        image.save(draft, format="PNG", pnginfo=info)


def read_request(path: Path) -> dict[str, Any]:
    """The request inside a PNG; its pixels are not decoded.

    Raises InputError: the file is missing, is no PNG, or holds no request.
    """
    try:
        # Pillow itself bounds what text chunks may unpack to (1 MiB each, 64 MiB together).
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(KEYWORD)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} cannot be read as a PNG: {error}") from None
    if not isinstance(text, str) or len(text) > LARGEST_REQUEST:
        raise InputError(f"{path} holds no request; only pictures written by `anamorph generate` do")
    try:
        request = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} holds a damaged request: {error}") from None
    if not isinstance(request, dict):
        raise InputError(f"{path} holds a damaged request: a {type(request).__name__} instead of an object")
    return request
