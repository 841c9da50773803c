"""How good pictures are: beside other pictures, and, for the bundled model, beside those that it learned from.

    python -m anamorph.benchmarks.quality PICTURES.npz [--count 100] [--steps 20] [--backend NAME]

PICTURES.npz is the training set that `examples/emoji/pictures.py` renders. Each prompt is an emoji's name; the share of
pictures whose nearest training picture is the one that the prompt names needs no other model to judge.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
SHRUNK = 4
"""Pixels of a side that are one when pictures are compared: a shift by a pixel is no other picture."""


def ssim(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Structural similarity of pictures [..., H, W, C] in 0..1, the mean over all windows (Wang et al. 2004, eq. 13).

    (2 m_a m_b + K1^2) (2 s_ab + K2^2) / ((m_a^2 + m_b^2 + K1^2) (s_a^2 + s_b^2 + K2^2)), Gaussian windows of 11 pixels.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    return float(np.mean(light * (2 * covariance + K2**2) / (var_x + var_y + K2**2)))


def _windowed(x: F64) -> F64:
    """Gaussian means of all whole windows."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for axis in (-3, -2):
        windows = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis)
        x = np.asarray(windows @ weights)
    return x


def nearest(pictures: NDArray[Any], training: NDArray[Any]) -> NDArray[np.int64]:
    """For each picture [N, H, W, C] the number of the training picture [M, H, W, C] at the least distance."""
    found, known = (_shrunk(values).reshape(len(values), -1) for values in (pictures, training))
    distances = (known**2).sum(1) - 2 * found @ known.T  # the picture's own square is the same for all
    return np.asarray(distances.argmin(1), np.int64)


def _shrunk(pictures: NDArray[Any]) -> F64:
    count, height, width, channels = pictures.shape
    cut = pictures.astype(np.float64)[:, : height // SHRUNK * SHRUNK, : width // SHRUNK * SHRUNK]
    return np.asarray(cut.reshape(count, height // SHRUNK, SHRUNK, width // SHRUNK, SHRUNK, channels).mean((2, 4)))


def recognised(names: list[str], hits: NDArray[np.int64], captions: list[str]) -> float:
    """Share of prompts whose picture is nearest to one that has the prompt among its names."""
    return float(np.mean([name in captions[hit].split("|") for name, hit in zip(names, hits, strict=True)]))


def main() -> None:
    """Draw, compare, print."""
    from anamorph.pipelines.base import DiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--count", type=int, default=100, help="prompts, evenly over the set (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    with np.load(options.pictures) as stored:
        training, captions = stored["images"] / 255, [str(text) for text in stored["captions"]]
    chosen = np.linspace(0, len(captions) - 1, min(options.count, len(captions))).astype(int)
    names = [captions[index].split("|")[0] for index in chosen]
    pipe: Any = DiffusionPipeline.from_pretrained(backend=options.backend)
    drawn = [
        pipe(name, num_inference_steps=options.steps, guidance_scale=4.0, seed=0, output_type="np").images[0]
        for name in names
    ]
    share = recognised(names, nearest(np.stack(drawn), training), captions)
    print(json.dumps({"prompts": len(names), "nearest_is_the_one_named": round(share, 3), "engines": [
        str(placed) for placed in pipe.placement.values()]}, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
