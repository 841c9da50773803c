"""Pictures and masks that a caller brings, in all the forms that diffusers takes, as arrays of one layout."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anamorph.arrays import to_numpy
from anamorph.errors import InputError
from anamorph.image import from_pil
from anamorph.pipelines.cropping import Box, fill
from anamorph.pipelines.request import check_size

F32 = NDArray[np.float32]
Layout = Callable[[F32, bool, str], F32]
"""From an array, whether it was a tensor, and its name, to [B, C, H, W]."""
MASK_MODES = ("1", "L", "RGB")
TOLERANCE = 1e-3
"""How far values may leave 0..1, as resampling makes them do."""


@dataclass(frozen=True)
class Fit:
    """The size that pictures are brought to (pixels); `box` is cut out first and fitted without distortion."""

    height: int
    width: int
    box: Box | None = None
    bicubic: bool = False

    def pillow(self, image: Image.Image) -> Image.Image:
        """Resize one picture as diffusers does, with Lanczos' filter unless `bicubic`."""
        if self.box is not None:
            return fill(image.crop(self.box), self.width, self.height)
        kind = Image.Resampling.BICUBIC if self.bicubic else Image.Resampling.LANCZOS
        return image.resize((self.width, self.height), kind)

    def array(self, values: F32) -> F32:
        """Resize [B, C, H, W] by repeating or leaving out lines, as diffusers does with arrays."""
        rows, columns = _nearest(values.shape[2], self.height), _nearest(values.shape[3], self.width)
        return np.ascontiguousarray(values[:, :, rows[:, None], columns])


def _nearest(before: int, after: int) -> NDArray[np.int64]:
    scale = np.float32(before) / np.float32(after)
    positions = np.floor(np.arange(after, dtype=np.float32) * scale).astype(np.int64)
    nearest: NDArray[np.int64] = np.minimum(positions, before - 1)
    return nearest


@dataclass(frozen=True)
class Given:
    """What a caller brought under one name: Pillow images, or one array in the layout [B, C, H, W]."""

    name: str
    images: tuple[Image.Image, ...] = ()
    array: F32 | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as they came."""
        if self.array is not None:
            return self.array.shape[2], self.array.shape[3]
        return self.images[0].height, self.images[0].width

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.images) if self.array is None else len(self.array)


def read_pictures(value: Any, channels: int, latent_channels: int) -> Given:
    """Pictures as Pillow images, NumPy [H, W, C], torch [C, H, W], batches or lists of those; or latents.

    Raises InputError: something else, other channels, or values outside 0..1 (latents may have any).
    """
    given = _read(value, "image", _picture_layout(latent_channels))
    if given.array is None:
        if modes := sorted({image.mode for image in given.images} - {"RGB"}):
            raise InputError(f"image has mode {modes[0]}, expected RGB; use image.convert('RGB')")
        return given
    if is_latent(given, latent_channels):
        return given
    if given.array.shape[1] != channels:
        raise InputError(
            f"image has {given.array.shape[1]} channels, expected {channels} (or {latent_channels} of latents); NumPy "
            "arrays are [B, H, W, C], torch tensors [B, C, H, W]"
        )
    _check_range(given)
    return given


def read_controls(value: Any, name: str, channels: int) -> Given:
    """Pictures that a net follows, as `read_pictures` takes them, in any mode; arrays may leave 0..1, as masks do.

    Raises InputError: something else, or other channels.
    """
    given = _read(value, name, _picture_layout(None))
    if given.array is None:
        return Given(name, tuple(image.convert("RGB" if channels == 3 else "L") for image in given.images))
    if given.array.shape[1] != channels:
        raise InputError(
            f"{name} has {given.array.shape[1]} channels, expected {channels}; NumPy arrays are [B, H, W, C], torch "
            "tensors [B, C, H, W]"
        )
    return given


def is_latent(given: Given, latent_channels: int) -> bool:
    """Whether these are latents, which are not encoded again."""
    return given.array is not None and given.array.shape[1] == latent_channels


def read_masks(value: Any) -> Given:
    """Masks as Pillow images, or arrays [H, W], [B, H, W], or with one channel where pictures have theirs.

    Raises InputError: something else, more channels, or values outside 0..1.
    """
    given = _read(value, "mask_image", _mask_layout)
    if given.array is not None:
        _check_range(given)
    elif modes := sorted({image.mode for image in given.images}.difference(MASK_MODES)):
        raise InputError(f"mask_image has mode {modes[0]}, expected {' or '.join(MASK_MODES)}; use convert('L')")
    return given


def read_depth(value: Any, size: tuple[int, int]) -> F32:
    """Depths [H, W] or [B, H, W] of any unit as [B, 1, h, w] of that size, each from -1 to 1.

    Raises InputError: something else, or depths that are all the same.
    """
    if not _is_tensor(value) and not isinstance(value, np.ndarray):
        raise InputError(f"depth_map is {type(value).__name__}, expected a torch tensor or NumPy array [B, H, W]")
    depth = to_numpy(value).astype(np.float32)
    depth = depth[None] if depth.ndim == 2 else depth
    if depth.ndim != 3 or not depth.size or not np.isfinite(depth).all():
        raise InputError(f"depth_map has shape {list(depth.shape)}, expected finite numbers [B, H, W]")
    depth = bicubic(depth, size)
    low, high = depth.min((1, 2), keepdims=True), depth.max((1, 2), keepdims=True)
    if (low == high).any():
        raise InputError("depth_map is the same everywhere; expected near and far")
    scaled: F32 = (2 * (depth - low) / (high - low) - 1)[:, None].astype(np.float32)
    return scaled


def bicubic(values: F32, size: tuple[int, int]) -> F32:
    """Resize [B, H, W] by cubic convolution with a = -3/4, edges repeated, as PyTorch does (Keys 1981, eq. 4)."""
    rows, columns = (_cubic(before, after) for before, after in zip(values.shape[1:], size, strict=True))
    resized: F32 = np.einsum("hi,bij,wj->bhw", rows, values, columns, dtype=np.float64).astype(np.float32)
    return resized


def _cubic(before: int, after: int) -> NDArray[np.float64]:
    """Weight of each old place in each new one, [after, before]."""
    places = (np.arange(after) + 0.5) * before / after - 0.5
    weights = np.zeros((after, before))
    for step in range(-1, 3):
        near = np.floor(places).astype(int) + step
        far = np.abs(places - near)
        inner = (1.25 * far - 2.25) * far * far + 1
        outer = ((-0.75 * far + 3.75) * far - 6) * far + 3
        np.add.at(weights, (np.arange(after), near.clip(0, before - 1)), np.where(far <= 1, inner, outer))
    return weights


def pixels(given: Given, fit: Fit) -> F32:
    """Pictures of the size that is asked for, in -1..1, [B, C, H, W]."""
    if given.array is None:
        return from_pil([fit.pillow(image) for image in given.images])
    return np.float32(2) * fit.array(given.array) - np.float32(1)


def binary(given: Given, fit: Fit) -> F32:
    """Masks of the size that is asked for, 1 where something is to be drawn (0.5 and above), else 0: [B, 1, H, W]."""
    if given.array is None:
        grey = from_pil([fit.pillow(image).convert("L") for image in given.images])
        return (grey >= 0).astype(np.float32)
    return (fit.array(given.array) >= 0.5).astype(np.float32)


def own_size(given: Given, multiple: int) -> tuple[int, int]:
    """Height and width, rounded down to what the autoencoder takes; raises InputError: too small or too large."""
    height, width = (side - side % multiple for side in given.size)
    check_size(height, width, multiple)
    return height, width


def _read(value: Any, name: str, layout: Layout) -> Given:
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items:
        raise InputError(f"{name} is an empty list; give at least one picture")
    if all(isinstance(item, Image.Image) for item in items):
        if len({(item.mode, item.size) for item in items}) != 1:
            raise InputError(f"the pictures of {name} differ in mode or size; expected the same")
        return Given(name, tuple(items))
    if not all(_is_tensor(item) or isinstance(item, np.ndarray) for item in items):
        kinds = ", ".join(sorted({type(item).__name__ for item in items}))
        raise InputError(f"{name} is {kinds}, expected Pillow images, NumPy arrays or torch tensors, or a list")
    batches = [_batch(item, name, layout) for item in items]
    if len({batch.shape[1:] for batch in batches}) != 1:
        raise InputError(f"the pictures of {name} differ in shape; expected the same")
    return Given(name, array=np.concatenate(batches))


def _batch(item: Any, name: str, layout: Layout) -> F32:
    array = to_numpy(item)
    if array.dtype.kind not in "fb" or not array.size:
        raise InputError(f"{name} is an array of {array.dtype} with {array.size} values, expected floats in 0..1")
    values = layout(array.astype(np.float32), _is_tensor(item), name)
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds NaN or infinity, expected values in 0..1")
    return values


def _picture_layout(latent_channels: int | None) -> Layout:
    def layout(array: F32, tensor: bool, name: str) -> F32:
        if array.ndim not in (3, 4):
            raise InputError(f"{name} has shape {list(array.shape)}, expected three or four dimensions")
        batch = array[None] if array.ndim == 3 else array
        # Latents come as this package hands them out, channels first, also as NumPy arrays.
        latent = array.ndim == 4 and array.shape[1] == latent_channels and array.shape[3] not in (1, 3)
        return batch if tensor or latent else batch.transpose(0, 3, 1, 2)

    return layout


def _mask_layout(array: F32, tensor: bool, name: str) -> F32:
    channel = 1 if tensor else -1
    if array.ndim == 2:
        return array[None, None]
    if array.ndim == 3:
        return array[None, None, :, :, 0] if not tensor and array.shape[2] == 1 else array[:, None]
    if array.ndim != 4 or array.shape[channel] != 1:
        raise InputError(f"{name} has shape {list(array.shape)}, expected one channel")
    return array if tensor else array.transpose(0, 3, 1, 2)


def _check_range(given: Given) -> None:
    assert given.array is not None
    low, high = float(given.array.min()), float(given.array.max())
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise InputError(f"{given.name} has values from {low:g} to {high:g}, expected 0 to 1")


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # a tensor can only exist where its maker has imported PyTorch
    return torch is not None and isinstance(value, torch.Tensor)


def check_count(name: str, count: int, images: int) -> None:
    """Raise InputError where `count` pictures cannot be dealt out evenly to `images`."""
    if images % count:
        raise InputError(f"there are {count} of {name} for {images} pictures; give one, or one per picture")


def repeated(values: F32, images: int) -> F32:
    """Dealt out in turn, as diffusers does: picture i gets number i modulo their count."""
    return np.concatenate([values] * (images // len(values)))
