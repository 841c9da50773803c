"""Image to image and inpainting with the bundled model, on one sheet.

python examples/editing/draw.py [OUT]
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from anamorph import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from anamorph.sheet import Row, contact_sheet

CALL = {"num_inference_steps": 30, "guidance_scale": 4, "seed": 0}
STRENGTH = 0.7
REDRAWN = (("red apple", "green apple"), ("yellow heart", "red heart"), ("cat face", "lion"))
"""What the first picture shows, and what image to image makes of it."""
FILLED = (("smiling face with sunglasses", (4, 10, 60, 32)), ("face with tongue", (6, 30, 58, 58)),
          ("kissing face", (6, 28, 58, 60)))  # fmt: skip
"""What inpainting draws into a grinning face, and where (left, top, right, bottom; pixels)."""


def rectangle(box: tuple[int, int, int, int]) -> Image.Image:
    """A mask that is white inside of `box`."""
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def main(out: Path) -> None:
    """Draw all rows from one set of weights."""
    text = DiffusionPipeline.from_pretrained(backend="eager")
    redraw, fill = AutoPipelineForImage2Image.from_pipe(text), AutoPipelineForInpainting.from_pipe(text)
    rows = []
    for before, after in REDRAWN:
        given = text(before, **CALL).images[0]
        drawn = redraw(after, given, strength=STRENGTH, **CALL).images[0]
        rows.append(Row(after, f"image to image,\nstrength {STRENGTH}", [given, drawn]))
    face = text("grinning face", **CALL).images[0]
    for prompt, box in FILLED:
        mask = rectangle(box)
        drawn = fill(prompt, face, mask, **CALL).images[0]
        rows.append(Row(prompt.replace("smiling face with ", ""), "inpainting", [face, drawn, mask]))
    title, subtitle = "Drawing on", "The bundled model, its own pictures drawn anew"
    contact_sheet(title, subtitle, ("given", "drawn", "mask"), rows).save(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("editing.png"))
