"""The bundled model along the edges of other pictures, beside the prompt alone, on one sheet.

    python examples/control/draw.py CONTROLNET [--out FILE]

What the edges are of is displaced first, so that it stands where the model would not put it by itself.
"""

import argparse
from pathlib import Path

from PIL import Image

from anamorph import ControlNetModel, StableDiffusionControlNetPipeline
from anamorph.control_images import canny
from anamorph.sheet import Row, contact_sheet

SHAPES = {
    "green apple": "red apple", "blue heart": "red heart", "tiger face": "cat face", "pencil": "rocket",
    "umbrella": "mushroom",
}  # fmt: skip
"""Prompt -> what it shall be drawn along."""
SIDE, SEED = 64, 7
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
    nothing = Image.new("RGB", (SIDE, SIDE))
    rows = []
    for prompt, shape in SHAPES.items():
        drawn = displaced(pipe(shape, nothing, controlnet_conditioning_scale=0.0, **call).images[0])
        edges = canny(drawn)
        alone = pipe(prompt, nothing, controlnet_conditioning_scale=0.0, **call).images[0]
        rows.append(Row(prompt, "", [drawn, edges.convert("RGB"), alone, pipe(prompt, edges, **call).images[0]]))
    title, subtitle = "Following edges", "The bundled model, and what a ControlNet makes of its pictures"
    contact_sheet(title, subtitle, ("picture", "edges", "prompt alone", "along the edges"), rows).save(options.out)


if __name__ == "__main__":
    main()
