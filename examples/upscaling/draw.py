"""Upscaling by four, on one sheet: pictures of the bundled model, resized and drawn by the upscaler.

python examples/upscaling/draw.py [OUT]
"""

import sys
from pathlib import Path

from assemble import upscaler
from PIL import Image

from anamorph import DiffusionPipeline
from anamorph.sheet import Row, contact_sheet

HERE = Path(__file__).parent
PROMPTS = ("rocket", "cat face", "red apple", "smiling face with sunglasses")
CALL = {"num_inference_steps": 20, "seed": 0}
SIDE = 200  # pixels of a picture on the sheet


def main(out: Path) -> None:
    """Draw small, then large."""
    text, large = DiffusionPipeline.from_pretrained(backend="eager"), upscaler(HERE / "unet")
    rows = []
    for prompt in PROMPTS:
        small = text(prompt, guidance_scale=4, **CALL).images[0]
        drawn = large(prompt, small, guidance_scale=1, noise_level=0, **CALL).images[0]
        side = drawn.size
        rows.append(Row(prompt, "64 to 256 pixels", [small.resize(side, Image.Resampling.NEAREST),
                                                     small.resize(side, Image.Resampling.BICUBIC), drawn]))  # fmt: skip
    title, subtitle = "Upscaling", "Pictures of the bundled model, four times as large"
    contact_sheet(title, subtitle, ("given", "resized", "upscaled"), rows, SIDE).save(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "upscaling.png")
