"""How far the pictures of options that are not exact are from those of the full computation, and what they save.

    python -m anamorph.benchmarks.fidelity [--model FOLDER] [--prompts FILE] [--count 50] [--steps 20]
        [--guidance 4] [--out SHEET.png] ARM ...

An ARM is a text of options, `guidance_interval=[0.1,0.8]` or `backend=openvino torch_dtype=bf16`: arguments of
`from_pretrained` and of a call, values as JSON or plain words; `model=FOLDER` opens another folder, such as an export
in int8. Every arm draws each prompt from the same seed as the full computation, which is PyTorch eager in float32
without rewrites, in turns with the others. Seconds are of this process and this machine; claims about speed belong to
`anamorph bench`.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anamorph.benchmarks import metrics
from anamorph.errors import InputError
from anamorph.files import replacing
from anamorph.image import psnr, to_pil
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.sheet import Row, contact_sheet

OPENING = ("backend", "torch_dtype", "rewrites")
FULL = {"backend": "eager", "torch_dtype": "float32", "rewrites": "none"}
SHOWN = 8
"""Columns of the sheet."""
PROMPTS = (
    "red apple", "yellow heart", "soccer ball", "grinning face", "sunflower", "rocket", "crescent moon", "tulip",
    "green apple", "strawberry", "banana", "watermelon", "cherries", "pineapple", "carrot", "mushroom", "bread",
    "pizza", "birthday cake", "hot beverage", "beer mug", "cat face", "dog face", "panda", "fox", "lion", "frog",
    "penguin", "octopus", "butterfly", "honeybee", "cactus", "evergreen tree", "snowflake", "rainbow", "sun", "star",
    "umbrella", "automobile", "bicycle", "airplane", "sailboat", "house", "alarm clock", "light bulb", "guitar",
    "basketball", "trophy", "gem stone", "wrapped gift",
)  # fmt: skip
"""Names of emoji, which the bundled model draws."""


@dataclass
class Arm:
    """One way to draw: its pipeline, the options of its calls, and what came of it."""

    label: str
    pipe: Any
    call: Mapping[str, Any]
    pictures: list[NDArray[Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def draw(self, prompt: str, common: Mapping[str, Any]) -> NDArray[Any]:
        """One picture [1, H, W, C] in 0..1."""
        picture: NDArray[Any] = self.pipe(prompt, **common, **self.call, output_type="np").images
        return picture


def parsed(text: str) -> dict[str, Any]:
    """The options of an arm; raises InputError where one has no value."""
    options: dict[str, Any] = {}
    for part in text.split():
        name, sign, value = part.partition("=")
        if not sign:
            raise InputError(f"{part!r} is no option like guidance_interval=[0.1,0.8]")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def opened(model: str | None, text: str) -> Arm:
    """An arm, ready to draw."""
    given = parsed(text)
    folder = given.pop("model", model)
    options = {**FULL, "rewrites": FULL["rewrites"] if folder == model else None, **given}  # an export has its own
    opening = {name: options.pop(name) for name in OPENING}
    pipe: Any = DiffusionPipeline.from_pretrained(folder, **opening)
    pipe.set_progress_bar_config(disable=True)
    return Arm(text or "full", pipe, options)


def compare(arms: Sequence[Arm], prompts: Sequence[str], common: Mapping[str, Any]) -> None:
    """Draw every prompt by every arm, one after another; a first picture of each is drawn before and not counted."""
    for arm in arms:
        arm.draw(prompts[0], common)
    for prompt in prompts:
        for arm in arms:
            started = time.perf_counter()
            arm.pictures.append(arm.draw(prompt, common))
            arm.seconds.append(time.perf_counter() - started)


def summary(full: Arm, arm: Arm) -> dict[str, Any]:
    """Fidelity and speed of an arm beside the full computation."""
    pairs = list(zip(arm.pictures, full.pictures, strict=True))
    decibels = [min(psnr(*pair), 200.0) for pair in pairs]
    return {
        "arm": arm.label,
        "pictures": len(pairs),
        "psnr_db_mean": round(mean(decibels), 2),
        "psnr_db_least": round(min(decibels), 2),
        "ssim": round(metrics.ssim(*(np.concatenate(every) for every in zip(*pairs, strict=True))), 4),
        "seconds": round(median(arm.seconds), 4),
        "full_seconds": round(median(full.seconds), 4),
        "faster": round(median(full.seconds) / median(arm.seconds), 3),
    }


def write_sheet(path: Path, arms: Sequence[Arm], prompts: Sequence[str]) -> None:
    """The first pictures of all arms below one another, to be looked at."""
    rows = [Row(*_named(arm.label), [_shown(one) for one in arm.pictures[:SHOWN]]) for arm in arms]
    sheet = contact_sheet("Fidelity", "the same seed in each column", prompts[:SHOWN], rows)
    with replacing(path) as draft:
        sheet.save(draft, "PNG")


def _named(label: str) -> tuple[str, str]:
    """The last option of an arm, which usually tells it from others, and those before it."""
    before, _, last = label.rpartition(" ")
    return last, before


def _shown(picture: NDArray[Any]) -> Image.Image:
    return to_pil(2 * picture.transpose(0, 3, 1, 2) - 1)[0]


def main() -> None:
    """Draw, compare, print one JSON line per arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="ARM")
    parser.add_argument("--model", help="checkpoint folder or hub id (default: the bundled model)")
    parser.add_argument("--prompts", type=Path, help="text file, a prompt in each line (default: names of emoji)")
    parser.add_argument("--count", type=int, default=50, help="prompts, from the first (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--out", type=Path, help="PNG with the pictures of all arms below one another")
    options = parser.parse_args()
    lines = PROMPTS if options.prompts is None else options.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line][: options.count]
    full, *arms = (opened(options.model, text) for text in ("", *options.arms))
    common = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, "seed": 0}
    compare([full, *arms], prompts, common)
    for arm in arms:
        print(json.dumps(summary(full, arm)))
    if options.out:
        write_sheet(options.out, [full, *arms], prompts)


if __name__ == "__main__":
    main()
