"""How well the bundled model draws what it is told, beside the pictures that it learned from.

    python -m anamorph.benchmarks.quality PICTURES.npz [--count 100] [--steps 20] [--backend NAME]
        [--clip FOLDER] [--inception FILE]

PICTURES.npz is the training set that `examples/emoji/pictures.py` renders. Each prompt is an emoji's name; the share of
pictures whose nearest training picture is the one that the prompt names needs no other model to judge. The CLIP score
and FID need local weights; see `anamorph.benchmarks.metrics`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.benchmarks import metrics

F64 = NDArray[np.float64]
SHRUNK = 4
"""Pixels of a side that are one when pictures are compared: a shift by a pixel is no other picture."""


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
    parser.add_argument("--clip", type=Path, help="folder of a CLIPModel with its processor")
    parser.add_argument("--inception", type=Path, help="Inception as TorchScript, such as inception-2015-12-05.pt")
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
    pictures = np.stack(drawn)
    found: dict[str, Any] = {
        "prompts": len(names),
        "nearest_is_the_one_named": round(recognised(names, nearest(pictures, training), captions), 3),
        "engines": [str(placed) for placed in pipe.placement.values()],
    }
    if options.clip:
        found["clip_score"] = round(metrics.clip_score(pictures, names, options.clip), 3)
    if options.inception:
        found["fid"] = round(metrics.fid(training, pictures, metrics.inception(options.inception)), 3)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
