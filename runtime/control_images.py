"""Pictures that ControlNets and T2I-Adapters follow, made of others without any model: edges, tiles, depths."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anamorph.arrays import to_numpy
from anamorph.errors import InputError

TAN = 13573
"""tan(22.5 degrees) as a fraction of 2^15, rounded."""
BITS = 15
SOBEL = (1, 2, 1)
SIDE = 64
"""Tiles have sides of a multiple of this, in pixels."""


def canny(image: Any, low_threshold: float = 100, high_threshold: float = 200) -> Image.Image:
    """Edges of a picture (Pillow, or uint8 [H, W] or [H, W, C]), white on black, one pixel wide, in RGB.

    At each pixel the channel with the largest gradient |g_x| + |g_y| counts (3x3 Sobel filters, borders repeated).
    Edges are local maxima along the gradient, in steps of 45 degrees, above `low_threshold` that are connected to one
    above `high_threshold`: OpenCV's definition of Canny 1986, which published nets were trained with, to the pixel.
    Raises InputError: something else than such a picture, or thresholds below 0.
    """
    if not 0 <= low_threshold <= high_threshold:
        raise InputError(f"thresholds are {low_threshold} and {high_threshold}, expected 0 <= low <= high")
    pixels = _pixels(image)
    gx, gy = _gradients(pixels)
    magnitude = np.abs(gx) + np.abs(gy)
    channel = magnitude.argmax(-1)[..., None]
    gx, gy, magnitude = (np.take_along_axis(each, channel, -1)[..., 0] for each in (gx, gy, magnitude))
    thin = _maxima(gx, gy, magnitude) & (magnitude > int(low_threshold))
    edges = _connected(thin, thin & (magnitude > int(high_threshold)))
    return Image.fromarray(np.where(edges, np.uint8(255), np.uint8(0))).convert("RGB")


def tile(image: Image.Image, resolution: int = 512) -> Image.Image:
    """A picture whose shorter side is `resolution`, each side rounded to 64 pixels, for nets that add detail.

    Raises InputError: something else than a picture, or no positive resolution.
    """
    if not isinstance(image, Image.Image) or resolution < 1:
        raise InputError(
            f"tile takes a Pillow image and a positive resolution, got {type(image).__name__}, {resolution}"
        )
    scale = resolution / min(image.size)
    width, height = (max(SIDE, round(side * scale / SIDE) * SIDE) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def depth(values: Any) -> Image.Image:
    """Inverse depths [H, W] of any unit, larger is nearer, as a picture: the nearest white, the farthest black.

    Raises InputError: another shape, NaN, or depths that are all the same.
    """
    depths = np.asarray(to_numpy(values), np.float64)
    if depths.ndim != 2 or not depths.size or not np.isfinite(depths).all():
        raise InputError(f"depths have shape {list(depths.shape)}, expected finite numbers [H, W]")
    low, high = depths.min(), depths.max()
    if low == high:
        raise InputError("depths are the same everywhere; expected near and far")
    return Image.fromarray(np.round(255 * (depths - low) / (high - low)).astype(np.uint8)).convert("RGB")


def _pixels(image: Any) -> NDArray[np.int32]:
    values = np.asarray(image)
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or not values.size:
        raise InputError(f"canny takes a picture of bytes, got {values.dtype} {list(values.shape)}; convert it to RGB")
    return (values[..., None] if values.ndim == 2 else values).astype(np.int32)


def _gradients(pixels: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sobel's derivatives along x and y of [H, W, C]."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = sum(weight * padded[k : k + height] for k, weight in enumerate(SOBEL))
    columns = sum(weight * padded[:, k : k + width] for k, weight in enumerate(SOBEL))
    return rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]  # type: ignore[index]


def _maxima(gx: NDArray[np.int32], gy: NDArray[np.int32], magnitude: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where the magnitude is a maximum along the gradient; of two that are equal in a row, the later is."""
    around = np.pad(magnitude, 1)
    height, width = magnitude.shape

    def at(down: int, right: int) -> NDArray[np.int32]:
        return around[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = np.abs(gx).astype(np.int64), np.abs(gy).astype(np.int64) << BITS
    level, steep = y < x * TAN, y > x * TAN + (x << (BITS + 1))
    falling = (gx ^ gy) < 0
    along = np.where(falling, (magnitude > at(-1, 1)) & (magnitude > at(1, -1)),
                     (magnitude > at(-1, -1)) & (magnitude > at(1, 1)))  # fmt: skip
    horizontal = (magnitude > at(0, -1)) & (magnitude >= at(0, 1))
    vertical = (magnitude > at(-1, 0)) & (magnitude >= at(1, 0))
    chosen: NDArray[np.bool_] = np.where(level, horizontal, np.where(steep, vertical, along))
    return chosen


def _connected(weak: NDArray[np.bool_], strong: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Those weak pixels that touch a strong one, over other weak ones, also at corners."""
    stride = weak.shape[1] + 2
    left, kept = np.pad(weak, 1).ravel(), np.pad(strong, 1).ravel()
    steps = np.array([dy * stride + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dx or dy])
    front = np.flatnonzero(kept)
    while front.size:
        near = np.unique(front[:, None] + steps)
        front = near[left[near] & ~kept[near]]
        kept[front] = True
    return kept.reshape(-1, stride)[1:-1, 1:-1]
