"""Measures of pictures beside SciPy's filters and closed forms."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from anamorph.benchmarks.quality import nearest, recognised, ssim


def test_ssim_is_the_papers_formula_with_scipys_windows() -> None:
    random = np.random.default_rng(0)
    a = random.random((24, 30, 3))
    b = np.clip(a + 0.1 * random.standard_normal(a.shape), 0, 1)

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, axes=(0, 1), radius=5)[5:-5, 5:-5]

    m, n = mean(a), mean(b)
    v, w, c = mean(a * a) - m * m, mean(b * b) - n * n, mean(a * b) - m * n
    exact = ((2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (v + w + 9e-4))).mean()
    assert ssim(a, b) == pytest.approx(exact, rel=1e-9)
    assert ssim(a, a) == pytest.approx(1.0)
    assert ssim(np.full((11, 11, 1), 0.2), np.full((11, 11, 1), 0.6)) == pytest.approx(0.2401 / 0.4001)


def test_the_nearest_picture_survives_noise_and_tells_another_name() -> None:
    random = np.random.default_rng(0)
    training = random.random((20, 16, 16, 3))
    captions = [f"thing {index}|alias {index}" for index in range(20)]
    drawn = training[[3, 7, 11]] + 0.1 * random.standard_normal((3, 16, 16, 3))
    hits = nearest(drawn, training)
    assert hits.tolist() == [3, 7, 11]
    assert recognised(["thing 3", "alias 7", "thing 11"], hits, captions) == 1.0
    assert recognised(["thing 4", "alias 7", "thing 1"], hits, captions) == pytest.approx(1 / 3)
