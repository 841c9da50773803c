"""Pictures to follow that need no model: edges by the published definition, tiles, depths."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from anamorph.control_images import canny, depth, tile
from anamorph.errors import InputError


def edges(image: NDArray[np.uint8], low: float, high: float) -> NDArray[np.bool_]:
    """Canny's definition pixel by pixel, with angles in floating point."""
    pixels = image.astype(int) if image.ndim == 3 else image.astype(int)[..., None]
    height, width, channels = pixels.shape

    def value(y: int, x: int, c: int) -> int:
        return int(pixels[min(max(y, 0), height - 1), min(max(x, 0), width - 1), c])

    gradient = np.zeros((height, width, 2), int)
    for y in range(height):
        for x in range(width):
            found = []
            for c in range(channels):
                near = [[value(y + dy, x + dx, c) for dx in (-1, 0, 1)] for dy in (-1, 0, 1)]
                gx = sum(w * (row[2] - row[0]) for w, row in zip((1, 2, 1), near, strict=True))
                gy = sum(w * (near[2][k] - near[0][k]) for k, w in enumerate((1, 2, 1)))
                found.append((abs(gx) + abs(gy), -c, gx, gy))
            gradient[y, x] = max(found)[2:]
    size = np.abs(gradient).sum(-1)

    def magnitude(y: int, x: int) -> int:
        return int(size[y, x]) if 0 <= y < height and 0 <= x < width else 0

    weak = np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            gx, gy = gradient[y, x]
            angle, m = np.degrees(np.arctan2(abs(gy), abs(gx))), magnitude(y, x)
            if angle < 22.5:
                thin = m > magnitude(y, x - 1) and m >= magnitude(y, x + 1)
            elif angle > 67.5:
                thin = m > magnitude(y - 1, x) and m >= magnitude(y + 1, x)
            else:
                s = -1 if (gx < 0) != (gy < 0) else 1
                thin = m > magnitude(y - 1, x - s) and m > magnitude(y + 1, x + s)
            weak[y, x] = thin and m > low
    kept = weak & (size > high)
    while True:
        around = np.pad(kept, 1)
        grown = weak & np.any([around[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)], 0)
        if (grown == kept).all():
            return kept
        kept = grown


def found(image: NDArray[np.uint8], low: float, high: float) -> NDArray[np.bool_]:
    picture = np.asarray(canny(Image.fromarray(image), low, high))
    assert picture.shape == (*image.shape[:2], 3)
    assert set(np.unique(picture)) <= {0, 255}
    return np.asarray(picture[..., 0] == 255)


@pytest.mark.parametrize(("seed", "smooth", "low", "high"), [(0, 1, 300, 700), (1, 3, 60, 200), (2, 5, 20, 90)])
def test_edges_are_those_of_the_definition(seed: int, smooth: int, low: float, high: float) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (26 + smooth, 35 + smooth, 3)).astype(float)
    height, width = 26, 35
    blurred = sum(noise[dy : dy + height, dx : dx + width] for dy in range(smooth) for dx in range(smooth)) / smooth**2
    image = np.asarray(blurred).astype(np.uint8)
    for one in (image, image[..., 0]):
        expected = edges(one, low, high)
        assert 0.01 < expected.mean() < 0.5
        np.testing.assert_array_equal(found(one, low, high), expected)


def test_a_step_is_a_line_of_one_pixel_where_it_is_strong_or_touches_what_is() -> None:
    image = np.zeros((12, 16), np.uint8)
    image[:, 8:] = 60  # |g| is 4 times the step
    assert not found(image, 100, 250).any()
    line = found(image, 100, 230)
    assert line[:, 7].all()
    assert line.sum() == 12
    image[:4, 8:] = 64
    assert found(image, 100, 250)[:, 7:9].any(1).all()  # the upper part is strong, and the rest is connected to it
    apart = np.zeros((12, 16), np.uint8)
    apart[:, 4:], apart[:, 12:] = 60, 130
    assert found(apart, 100, 250).any(0).nonzero()[0].tolist() == [11]  # the weak line touches no strong one


def test_tiles_and_depths_are_of_the_sizes_and_values_that_nets_take() -> None:
    assert tile(Image.new("RGB", (300, 200)), 512).size == (768, 512)
    assert tile(Image.new("L", (10, 1000)), 64).size == (64, 6400)
    picture = np.asarray(depth(np.array([[1.0, 2.0], [3.0, 5.0]])))
    assert picture[..., 0].tolist() == [[0, 64], [128, 255]]


def test_what_is_no_picture_is_refused() -> None:
    for wrong in (lambda: canny(np.zeros((4, 4))), lambda: canny(Image.new("RGB", (4, 4)), 200, 100),
                  lambda: depth(np.ones((2, 2))), lambda: depth(np.full((2, 2), np.nan)),
                  lambda: tile(Image.new("RGB", (4, 4)), 0)):  # fmt: skip
        with pytest.raises(InputError):
            wrong()
