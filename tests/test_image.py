"""Pictures, their metadata, and how close two of them are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from anamorph.errors import InputError, OutputError
from anamorph.image import psnr, read_request, to_pil, to_uint8, to_unit, write_png
from anamorph.sheet import Row, contact_sheet

PIXELS = np.random.default_rng(0).normal(0, 0.8, (2, 3, 5, 7)).astype(np.float32)


def test_pixels_become_what_diffusers_makes_of_them() -> None:
    processor = VaeImageProcessor()
    assert np.array_equal(to_unit(PIXELS), processor.postprocess(torch.from_numpy(PIXELS), output_type="np"))
    theirs = processor.postprocess(torch.from_numpy(PIXELS), output_type="pil")
    assert np.array_equal(to_uint8(PIXELS), np.stack([np.asarray(image) for image in theirs]))
    assert [image.tobytes() for image in to_pil(PIXELS)] == [image.tobytes() for image in theirs]


def test_psnr_of_a_known_difference() -> None:
    a = np.full((4, 4), 0.5)
    assert psnr(a, a + 0.01) == pytest.approx(40)  # -10 log10(1e-4)
    assert psnr(a, a) == float("inf")


def test_a_request_survives_the_png(tmp_path: Path) -> None:
    request = {"prompt": ["ein Apfel, 林檎 🍎"], "seed": 2**64 - 1, "sigmas": [0.1, 1 / 3]}
    write_png(Image.new("RGB", (8, 8), "red"), tmp_path / "a.png", request)
    assert read_request(tmp_path / "a.png") == request
    assert Image.open(tmp_path / "a.png").getpixel((3, 3)) == (255, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_files_without_a_request_are_refused_in_one_sentence(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    info = {"plain.png": "holds no request", "text.png": "cannot be read as a PNG", "gone.png": "there is no file"}
    for name, words in info.items():
        with pytest.raises(InputError, match=words):
            read_request(tmp_path / name)


def test_a_truncated_png_is_refused(tmp_path: Path) -> None:
    write_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"x": "y" * 2000})
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="a.png"):
        read_request(tmp_path / "a.png")


@pytest.mark.parametrize("text", ["[1, 2]", "{broken"])
def test_a_damaged_request_is_refused(tmp_path: Path, text: str) -> None:
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt("anamorph", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(InputError, match="damaged request"):
        read_request(tmp_path / "a.png")


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_png(Image.new("RGB", (8, 8)), tmp_path / "file" / "a.png", {})


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
