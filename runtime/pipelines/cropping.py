"""Inpainting at full resolution around a mask: which region is cut out, and how it is put back.

Regions and resizing follow diffusers' `padding_mask_crop` to the pixel, so that both draw the same picture.
"""

import numpy as np
from PIL import Image, ImageOps

from anamorph.errors import InputError

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""
LANCZOS = Image.Resampling.LANCZOS


def region(mask: Image.Image, width: int, height: int, pad: int) -> Box:
    """The smallest box around the mask, `pad` pixels wider, grown to the aspect ratio width / height.

    Raises InputError: the mask is black everywhere.
    """
    drawn = np.asarray(mask.convert("L")) != 0
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    if not rows.size:
        raise InputError("mask_image is black everywhere; paint white what is to be drawn")
    top, bottom = _padded(int(rows[0]), int(rows[-1]) + 1, pad, mask.height)
    left, right = _padded(int(columns[0]), int(columns[-1]) + 1, pad, mask.width)
    ratio = width / height
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _grown(top, bottom, int((right - left) / ratio - (bottom - top)), mask.height)
    else:
        left, right = _grown(left, right, int((bottom - top) * ratio - (right - left)), mask.width)
    return left, top, right, bottom


def _padded(low: int, high: int, pad: int, limit: int) -> tuple[int, int]:
    return max(low - pad, 0), min(high + pad, limit)


def _grown(low: int, high: int, by: int, limit: int) -> tuple[int, int]:
    """`by` pixels longer, about the same middle, moved inside 0..limit and cut where it is too long."""
    low, high = low - by // 2, high + by - by // 2
    if high >= limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, high - low
    return low, min(high, limit)


def fill(image: Image.Image, width: int, height: int) -> Image.Image:
    """Fit a picture into a size without distortion; its outermost lines fill what stays free."""
    wide = width / height < image.width / image.height
    inner = (width, image.height * width // image.width) if wide else (image.width * height // image.height, height)
    resized = image.resize(inner, LANCZOS)
    result = Image.new("RGB", (width, height))
    left, top = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    result.paste(resized, (left, top))
    if wide and top > 0:
        result.paste(resized.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        result.paste(resized.resize((width, top), box=(0, inner[1], width, inner[1])), (0, top + inner[1]))
    elif not wide and left > 0:
        result.paste(resized.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        result.paste(resized.resize((left, height), box=(inner[0], 0, inner[0], height)), (left + inner[0], 0))
    return result


def put_back(drawn: Image.Image, original: Image.Image, mask: Image.Image, box: Box) -> Image.Image:
    """The original picture with what was drawn for `box` wherever the mask is white."""
    left, top, right, bottom = box
    base = Image.new("RGBA", original.size)
    base.paste(_cropped(drawn, right - left, bottom - top), (left, top))
    kept = Image.new("RGBa", original.size)
    kept.paste(original.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    result = base.convert("RGB").convert("RGBA")
    result.alpha_composite(kept.convert("RGBA"))
    return result.convert("RGB")


def _cropped(image: Image.Image, width: int, height: int) -> Image.Image:
    """Cover a size without distortion; what lies outside is cut off."""
    wide = width / height > image.width / image.height
    inner = (width, image.height * width // image.width) if wide else (image.width * height // image.height, height)
    result = Image.new("RGB", (width, height))
    result.paste(image.resize(inner, LANCZOS), (width // 2 - inner[0] // 2, height // 2 - inner[1] // 2))
    return result
