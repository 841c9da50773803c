"""Pictures of the bundled model along edges, beside those without: one column per prompt.

    python examples/control/draw.py CONTROLNET [--out FILE]

Rows: what the edges are of, which stands where the model would not put it by itself; the edges; the prompt alone; the
prompt along the edges.
"""

import argparse
from pathlib import Path

from PIL import Image

from anamorph import ControlNetModel, StableDiffusionControlNetPipeline
from anamorph.control_images import canny

COLUMNS = (
    ("red apple", "green apple"), ("red heart", "blue heart"), ("cat face", "tiger face"), ("rocket", "pencil"),
    ("mushroom", "umbrella"),
)  # fmt: skip
SIDE, GAP, SCALE, SEED = 64, 4, 2, 7
TURN, SMALLER = 30, 52  # degrees, pixels


def displaced(image: Image.Image) -> Image.Image:
    """Turned, smaller and off the middle, on white."""
    white = Image.new("RGB", (SIDE, SIDE), "white")
    white.paste(image.resize((SMALLER,) * 2, Image.Resampling.LANCZOS), (SIDE - SMALLER, SIDE - SMALLER))
    return white.rotate(TURN, Image.Resampling.BICUBIC, fillcolor="white")


def main() -> None:
    """Draw and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("controlnet", type=Path, help="the trained ControlNet")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "control.png", help="PNG to write")
    options = parser.parse_args()
    net = ControlNetModel.from_pretrained(options.controlnet)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(controlnet=net, backend="eager")
    call = {"num_inference_steps": 25, "guidance_scale": 4.0, "seed": SEED}
    rows: list[list[Image.Image]] = [[], [], [], []]
    for shape, prompt in COLUMNS:
        drawn = pipe(shape, Image.new("RGB", (SIDE, SIDE)), controlnet_conditioning_scale=0.0, **call).images[0]
        drawn = displaced(drawn)
        edges = canny(drawn)
        alone = pipe(prompt, edges, controlnet_conditioning_scale=0.0, **call).images[0]
        along = pipe(prompt, edges, **call).images[0]
        for row, image in zip(rows, (drawn, edges, alone, along), strict=True):
            row.append(image)
    place = SIDE * SCALE + GAP
    sheet = Image.new("RGB", (place * len(COLUMNS) - GAP, place * len(rows) - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image.resize((SIDE * SCALE,) * 2, Image.Resampling.NEAREST), (x * place, y * place))
    sheet.save(options.out)


if __name__ == "__main__":
    main()
