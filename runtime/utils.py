"""Small helpers around pictures, under the names that diffusers' users import them by."""

import io
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from anamorph.errors import InputError

SECONDS = 10.0
"""Longest wait for an address to answer."""
LARGEST = 64 << 20
"""A larger file is not downloaded (bytes)."""


def load_image(
    image: str | Path | Image.Image, convert_method: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """A picture from a file, an address (http or https) or a Pillow image, upright as its camera noted, and in RGB.

    `convert_method` takes the place of the conversion to RGB.
    Raises InputError: there is no such file, the address cannot be had, or it is no picture.
    """
    found = image if isinstance(image, Image.Image) else _opened(str(image))
    upright = ImageOps.exif_transpose(found)
    return upright.convert("RGB") if convert_method is None else convert_method(upright)


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Pictures beside each other, row by row, in places of the first one's size; `resize` makes them squares before.

    Raises InputError: there are not rows x cols pictures.
    """
    if not images or len(images) != rows * cols:
        raise InputError(f"got {len(images)} pictures for {rows} rows of {cols}, expected {rows * cols}, at least one")
    shown = images if resize is None else [image.resize((resize, resize)) for image in images]
    width, height = shown[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for index, image in enumerate(shown):
        grid.paste(image, (index % cols * width, index // cols * height))
    return grid


def _opened(name: str) -> Image.Image:
    try:
        if name.startswith(("http://", "https://")):
            return Image.open(io.BytesIO(_downloaded(name)))
        return Image.open(Path(name).expanduser())
    except FileNotFoundError:
        raise InputError(f"there is no file {name}; name a picture or its address (http or https)") from None
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} cannot be opened as a picture: {error}") from None
    except OSError as error:
        raise InputError(f"{name} cannot be had: {error}") from None


def _downloaded(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=SECONDS) as answer:
        content: bytes = answer.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise InputError(f"{address} holds more than {LARGEST >> 20} MiB; download it yourself and name the file")
    return content
