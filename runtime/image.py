"""Arrays to pictures and back, pictures that carry the request that made them, and how close two pictures are."""

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from anamorph.errors import InputError
from anamorph.files import replacing

KEYWORD = "anamorph"
"""Keyword of the iTXt chunk that holds the request as JSON."""

LARGEST_REQUEST = 1 << 20
"""A longer request is neither written nor read (bytes)."""

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_unit(images: NDArray[Any]) -> NDArray[np.float32]:
    """Pictures [B, C, H, W] in -1..1 to [B, H, W, C] in 0..1: clip(x / 2 + 1/2, 0, 1).

    Raises InputError: the array has another rank, or C is not 1, 3 or 4.
    """
    if images.ndim != 4 or images.shape[1] not in MODES:
        raise InputError(f"pictures have shape {list(images.shape)}, expected [B, C, H, W] with C = 1, 3 or 4")
    unit = np.clip(images.astype(np.float32, copy=False) * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.ascontiguousarray(unit.transpose(0, 2, 3, 1))


def to_uint8(images: NDArray[Any]) -> NDArray[np.uint8]:
    """Pictures [B, C, H, W] in -1..1 to [B, H, W, C] in 0..255, rounded to the nearest (half to even).

    Those that are bytes already stay as they are.
    """
    if images.dtype == np.uint8:
        return images
    levels: NDArray[np.uint8] = np.rint(to_unit(images) * np.float32(255)).astype(np.uint8)
    return levels


def to_pil(images: NDArray[Any]) -> list[Image.Image]:
    """Pictures [B, C, H, W] in -1..1, or bytes [B, H, W, C], to one Pillow image each (grey, RGB or RGBA by C)."""
    pixels = to_uint8(images)
    return [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in pixels]


def from_pil(images: Sequence[Image.Image]) -> NDArray[np.float32]:
    """Pillow images of one size and mode to [B, C, H, W] in -1..1: 2 p / 255 - 1.

    Raises InputError: there are none, they differ in size or mode, or the mode is not L, RGB or RGBA.
    """
    kinds = {(image.mode, image.size) for image in images}
    if len(kinds) != 1:
        raise InputError(f"got pictures of {len(kinds)} kinds (mode and size), expected one or more of the same kind")
    if (mode := images[0].mode) not in MODES.values():
        raise InputError(f"the picture's mode is {mode}, expected L, RGB or RGBA; use image.convert('RGB')")
    pixels = np.stack([np.asarray(image, np.float32) for image in images]) / np.float32(255)
    pixels = pixels[..., None] if mode == "L" else pixels
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2) * np.float32(2) - np.float32(1))


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of pictures in 0..1, in dB: -10 log10(mean((a - b)^2)); infinite if equal.

    Raises InputError: the shapes differ, or there are no values.
    """
    if a.shape != b.shape or not a.size:
        raise InputError(f"pictures have shapes {list(a.shape)} and {list(b.shape)}, expected the same and not empty")
    mse = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if mse == 0 else -10 * math.log10(mse)


def write_png(image: Image.Image, path: str | Path, request: Mapping[str, Any]) -> None:
    """Write a PNG that carries `request` as JSON, a readable summary of it, and who made it.

    Raises InputError: the request is no JSON or longer than 1 MiB.
    Raises OutputError: the file cannot be written.
    """
    try:
        text = json.dumps(request, ensure_ascii=False)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the request cannot be recorded as JSON: {error}") from None
    if size > LARGEST_REQUEST:
        raise InputError(
            f"the request takes {size} bytes as JSON, expected at most {LARGEST_REQUEST}; shorten its texts"
        )
    info = PngInfo()
    info.add_itxt(KEYWORD, text)
    info.add_itxt("Description", summary(request))
    info.add_itxt("Software", f"Anamorph {version('anamorph')}")
    with replacing(Path(path)) as draft:
        image.save(draft, format="PNG", pnginfo=info)


def summary(request: Mapping[str, Any]) -> str:
    """A line `key: value` for everything that is set in the request (or in its part of that name), for people."""
    values = request.get("request", request)
    shown = values.items() if isinstance(values, Mapping) else ()
    lines = []
    for key, value in shown:
        while isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        if value is not None and value != "":
            lines.append(f"{key}: {value}".replace("\0", "\ufffd"))  # PNG texts must not hold NUL
    return "\n".join(lines)


def read_request(path: str | Path) -> dict[str, Any]:
    """The request that `write_png` stored. No pixel is decoded.

    Raises InputError: the file is missing, is no complete PNG, carries no request, or a damaged or too long one.
    """
    place = Path(path)
    try:
        with place.open("rb") as file:
            if file.read(len(SIGNATURE)) != SIGNATURE:
                raise InputError(f"{place} cannot be read as a PNG: its signature is missing")
            text = _find_request(file, place)
        value = json.loads(text)
    except FileNotFoundError:
        raise InputError(f"there is no file {place}; give a PNG that anamorph wrote") from None
    except OSError as error:
        raise InputError(f"{place} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{place} holds a damaged request: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{place} holds a damaged request: a {type(value).__name__} instead of an object")
    return value


def _find_request(file: BinaryIO, place: Path) -> str:
    """Walk the chunks (length, type, data, CRC-32; PNG specification, section 5.3) to the end; the request's text."""
    prefix, found = KEYWORD.encode() + b"\0", None
    while True:
        head = file.read(8)
        if len(head) < 8:
            raise InputError(f"{place} is cut off before its end; copy it again")
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            break
        begin = file.read(min(len(prefix), length)) if kind == b"iTXt" and found is None else b""
        if begin != prefix:
            file.seek(length - len(begin) + 4, 1)
            continue
        if length > LARGEST_REQUEST + 1024:
            raise InputError(f"{place} holds a request of {length} bytes, expected at most {LARGEST_REQUEST}")
        data, check = begin + file.read(length - len(begin)), file.read(4)
        if check != struct.pack(">I", zlib.crc32(kind + data)):
            raise InputError(f"{place} holds a damaged request (its check sum is wrong); copy the file again")
        found = data[len(prefix) :]
    if found is None:
        raise InputError(f"{place} holds no request; only pictures that anamorph wrote do")
    return _itxt_text(found, place)


def _itxt_text(data: bytes, place: Path) -> str:
    """The text after the keyword: compression flag and method, language, translated keyword, text in UTF-8."""
    fields = data[2:].split(b"\0", 2)
    if len(data) < 2 or len(fields) < 3:
        raise InputError(f"{place} holds a damaged request: its iTXt chunk is incomplete")
    text = fields[2]
    if data[0]:
        unpack = zlib.decompressobj()
        try:
            text = unpack.decompress(text, LARGEST_REQUEST + 1)
        except zlib.error as error:
            raise InputError(f"{place} holds a damaged request: {error}") from None
    if len(text) > LARGEST_REQUEST:
        raise InputError(f"{place} holds a request beyond {LARGEST_REQUEST} bytes; it is refused")
    return text.decode("utf-8")
