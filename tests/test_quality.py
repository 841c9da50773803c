"""The nearest training picture, on pictures that are known."""

import numpy as np
import pytest

from anamorph.benchmarks.quality import nearest, recognised


def test_the_nearest_picture_survives_noise_and_tells_another_name() -> None:
    random = np.random.default_rng(0)
    training = random.random((20, 16, 16, 3))
    captions = [f"thing {index}|alias {index}" for index in range(20)]
    drawn = training[[3, 7, 11]] + 0.1 * random.standard_normal((3, 16, 16, 3))
    hits = nearest(drawn, training)
    assert hits.tolist() == [3, 7, 11]
    assert recognised(["thing 3", "alias 7", "thing 11"], hits, captions) == 1.0
    assert recognised(["thing 4", "alias 7", "thing 1"], hits, captions) == pytest.approx(1 / 3)
