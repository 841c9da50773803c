"""Arrays to pictures as diffusers does, requests in PNG files, and PSNR."""

import json
import math
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from anamorph.errors import InputError, OutputError
from anamorph.image import LARGEST_REQUEST, from_pil, psnr, read_request, to_pil, to_uint8, to_unit, write_png
from anamorph.sheet import LINES, Row, contact_sheet, wrapped

REQUEST: dict[str, Any] = {
    "schema": 1,
    "request": {
        "prompt": ['ein rotes Äpfelchen 🍎 - 林檎\u0000\n"x"'],
        "seeds": [2**64 - 1],
        "eta": 0.0,
        "sigmas": None,
    },
    "scheduler": {"lambda_min_clipped": -math.inf, "betas": [1e-4, 0.02]},
}


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    return Image.fromarray(pixels)


def samples(channels: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Values beyond the range, and all that lie halfway between two levels."""
    halves = (np.arange(-4, 260) + 0.5) / 255 * 2 - 1
    noise = np.random.default_rng(1).normal(0, 0.7, 2 * channels * 16 * 24 - halves.size)
    return np.concatenate([halves, noise]).astype(np.float32).reshape(2, channels, 16, 24)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_equal_those_of_diffusers(channels: int) -> None:
    images = samples(channels)
    processor = VaeImageProcessor()
    theirs = processor.postprocess(torch.from_numpy(images), output_type="np")
    np.testing.assert_array_equal(to_unit(images), theirs)
    for ours, reference in zip(to_pil(images), processor.postprocess(torch.from_numpy(images)), strict=True):
        assert (ours.mode, ours.size) == (reference.mode, reference.size) == ("L" if channels == 1 else "RGB", (24, 16))
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(reference))


def test_known_levels() -> None:
    images = np.array([-2, -1, 0, 1, 2, 0.2], np.float32).reshape(1, 1, 1, 6)
    assert to_uint8(images).tolist() == [[[[0], [0], [128], [255], [255], [153]]]]  # 127.5 goes to the even 128


def test_from_pil_equals_diffusers_and_comes_back(picture: Image.Image) -> None:
    ours = from_pil([picture, picture])
    theirs = VaeImageProcessor(do_resize=False).preprocess([picture, picture]).numpy()
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(to_uint8(ours)[0], np.asarray(picture))
    assert from_pil([picture.convert("L")]).shape == (1, 1, 12, 20)


def test_wrong_pictures(picture: Image.Image) -> None:
    with pytest.raises(InputError, match=r"shape \[3, 4, 4\]"):
        to_unit(np.zeros((3, 4, 4)))
    with pytest.raises(InputError, match="C = 1, 3 or 4"):
        to_pil(np.zeros((1, 5, 4, 4)))
    with pytest.raises(InputError, match="2 kinds"):
        from_pil([picture, picture.resize((3, 3))])
    with pytest.raises(InputError, match="0 kinds"):
        from_pil([])
    with pytest.raises(InputError, match="mode is CMYK"):
        from_pil([picture.convert("CMYK")])


def test_psnr_by_hand() -> None:
    a = np.zeros((2, 2), np.float32)
    b = np.array([[0.1, 0], [0, 0]], np.float64)
    assert psnr(a, b) == pytest.approx(10 * math.log10(400))  # mean square 0.01 / 4
    assert psnr(a, a + 1) == 0.0
    assert psnr(b, b.copy()) == math.inf
    with pytest.raises(InputError, match="expected the same"):
        psnr(a, b[:1])


def test_request_survives_in_the_file(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    write_png(picture, path, REQUEST)
    assert read_request(path) == REQUEST
    with Image.open(path) as opened:
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(picture))
        assert isinstance(opened, Image.Image)
        texts: dict[str, str] = dict(opened.text)  # type: ignore[attr-defined]
    assert texts["Software"].startswith("Anamorph 0.")
    assert texts["Description"].splitlines() == [
        "prompt: ein rotes Äpfelchen 🍎 - 林檎\ufffd", '"x"', "seeds: 18446744073709551615", "eta: 0.0"
    ]  # fmt: skip
    assert list(path.parent.iterdir()) == [path]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes) -> bytes:
    """A PNG that claims 60000 x 60000 pixels and holds none: reading its texts must not care."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def itxt(text: bytes, keyword: bytes = b"anamorph", *, packed: bool = False) -> bytes:
    return chunk(b"iTXt", keyword + b"\0" + bytes([packed, 0]) + b"\0\0" + (zlib.compress(text) if packed else text))


@pytest.mark.parametrize("packed", [False, True])
def test_requests_are_found_among_other_chunks(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "a.png"
    others = chunk(b"tEXt", b"anamorph\0{}"), itxt(b"{}", b"anamorphosis"), itxt(b"{}", b"a"), chunk(b"iTXt", b"")
    path.write_bytes(png(*others, itxt('{"a": "é"}'.encode(), packed=packed)))
    assert read_request(path) == {"a": "é"}


BROKEN = {
    "cannot be read as a PNG": b"GIF89a",
    "an empty file": b"",
    "holds no request": png(),
    "cut off": png()[:20],
    "check sum": png(itxt(b"{}")[:-1] + b"\0"),
    "damaged request: Expecting": png(itxt(b"{")),
    "damaged request: 'utf-8'": png(itxt(b'"\xff"')),
    "damaged request: a list": png(itxt(b"[1]")),
    "incomplete": png(chunk(b"iTXt", b"anamorph\0\0\0")),
    "expected at most": png(itxt(b" " * (2 * LARGEST_REQUEST))),
    "beyond": png(itxt(b" " * (64 * LARGEST_REQUEST), packed=True)),
    "Error -3": png(chunk(b"iTXt", b"anamorph\0\1\0\0\0not deflated")),
    "recursion": png(itxt(b"[" * 500_000)),
}


@pytest.mark.parametrize("message", BROKEN)
def test_files_without_a_sound_request(tmp_path: Path, message: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(BROKEN[message])
    with pytest.raises(InputError, match="as a PNG" if message == "an empty file" else message) as caught:
        read_request(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_chunk_that_lies_about_its_length(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IDAT" + b"x" * 50)
    with pytest.raises(InputError, match="cut off"):
        read_request(path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        read_request(tmp_path / "none.png")
    with pytest.raises(InputError, match="cannot be read"):
        read_request(tmp_path)


def test_what_cannot_be_written(picture: Image.Image, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recorded as JSON"):
        write_png(picture, tmp_path / "a.png", {"x": object()})
    with pytest.raises(InputError, match="recorded as JSON"):
        write_png(picture, tmp_path / "a.png", {"x": "\ud800"})
    with pytest.raises(InputError, match="shorten"):
        write_png(picture, tmp_path / "a.png", {"x": "é" * (LARGEST_REQUEST // 2)})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_png(picture, tmp_path / "file" / "a.png", {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the device that is always full")
def test_full_disk(picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda self, _path, **options: save(self, "/dev/full", **options))
    with pytest.raises(OutputError, match="No space left"):
        write_png(picture, tmp_path / "a.png", {})
    assert not list(tmp_path.iterdir())


def test_a_truncated_png_is_refused(tmp_path: Path) -> None:
    write_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"x": "y" * 2000})
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"a\.png"):
        read_request(tmp_path / "a.png")


def test_a_sheet_shows_every_picture_at_its_place() -> None:
    colours = [[(250, 10, 10), (10, 10, 250)], [(10, 250, 10), (90, 90, 90)]]
    rows = [Row(f"row {n}", "note", [Image.new("RGB", (8, 8), c) for c in line]) for n, line in enumerate(colours)]
    sheet = contact_sheet("Title", json.dumps({}), ["one", "two"], rows, picture_size=50)
    found = {colour: [] for line in colours for colour in line}
    for y in range(0, sheet.height, 5):
        for x in range(0, sheet.width, 5):
            if (colour := sheet.getpixel((x, y))) in found:
                found[colour].append((x, y))
    centres = {colour: np.mean(places, axis=0) for colour, places in found.items()}
    (red, blue), (green, grey) = ([centres[colour] for colour in line] for line in colours)
    assert red[0] < blue[0]
    assert red[1] < green[1]
    assert abs(red[1] - blue[1]) < 6
    assert abs(blue[0] - grey[0]) < 6


@pytest.mark.parametrize(
    "text", ["", "cat", "a photograph of an astronaut on the moon", "Donaudampfschiff" * 3, "many words " * 30]
)
def test_captions_stay_within_their_column(text: str) -> None:
    lines, face = wrapped(text, 130)
    assert len(lines) <= LINES
    assert all(face.getlength(line) <= 130 for line in lines)
    shown = " ".join(lines)
    whole = " ".join(text.split())
    assert shown == whole or (shown.endswith("…") and whole.startswith(shown[:-1].rstrip()))
    assert shown == whole or len(text) > 40


def test_a_sheet_keeps_proportions() -> None:
    row = Row("row", "", [Image.new("RGB", (40, 20), (250, 10, 10))])
    sheet = np.asarray(contact_sheet("", "", ["wide"], [row], picture_size=100))
    ys, xs = np.nonzero((sheet == (250, 10, 10)).all(axis=-1))
    assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == (100, 50)
