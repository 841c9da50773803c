"""The helpers that diffusers' users import from its `utils`, beside diffusers' own."""

import urllib.request
from pathlib import Path

import diffusers.utils
import numpy as np
import pytest
from pictures import picture
from PIL import Image

from anamorph.benchmarks.snippets.cache import picture_name
from anamorph.benchmarks.snippets.running import Shelf
from anamorph.errors import InputError
from anamorph.utils import load_image, make_image_grid

ADDRESS = "https://example.org/a.png"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture that a camera turned, one with transparency, and a network that holds one picture."""
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(24, 16).save(tmp_path / "turned.jpg", exif=turned, quality=95)
    picture(24, 16).convert("RGBA").save(tmp_path / "clear.png")
    (tmp_path / "none.png").write_text("no picture")
    picture(8, 8).save(tmp_path / picture_name(ADDRESS))
    opener = urllib.request.build_opener(Shelf(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", lambda address, timeout: opener.open(address, timeout=timeout))
    return tmp_path


def test_pictures_are_loaded_as_diffusers_loads_them(files: Path) -> None:
    for name in ("turned.jpg", "clear.png"):
        expected = diffusers.utils.load_image(str(files / name))
        found = load_image(files / name)
        assert (found.mode, found.size) == (expected.mode, expected.size)
        assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert load_image(str(files / "turned.jpg")).size == (24, 16)
    assert load_image(picture(8, 8).convert("L")).mode == "RGB"
    assert load_image(files / "clear.png", lambda image: image.convert("L")).mode == "L"
    assert np.array_equal(np.asarray(load_image(ADDRESS)), np.asarray(picture(8, 8)))


def test_what_is_no_picture_is_refused(files: Path) -> None:
    for name, match in (
        ("nowhere.png", "there is no file nowhere.png"),
        (str(files / "none.png"), "cannot be opened as a picture"),
        (str(files), "cannot be had"),
        ("https://example.org/other.png", "cannot be had: no picture lies here"),
    ):
        with pytest.raises(InputError, match=match):
            load_image(name)


def test_grids_are_those_of_diffusers() -> None:
    images = [picture(12, 8), picture(12, 8).rotate(180), picture(12, 8).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    for resize in (None, 5):
        expected = diffusers.utils.make_image_grid(images, 1, 3, resize)  # type: ignore[arg-type]
        assert np.array_equal(np.asarray(make_image_grid(images, 1, 3, resize)), np.asarray(expected))
    assert not np.array_equal(
        np.asarray(make_image_grid(images, 1, 3)), np.asarray(make_image_grid(images[::-1], 1, 3))
    )
    with pytest.raises(InputError, match="got 3 pictures for 2 rows of 2, expected 4"):
        make_image_grid(images, 2, 2)
