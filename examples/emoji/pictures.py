"""Render the training set: every emoji of Debian's fonts-noto-color-emoji with its English names.

The font is licensed under the SIL Open Font License 1.1; the names come from the `emoji` package (BSD).
"""

from pathlib import Path

import emoji
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the only bitmap size inside the font, pixels
SIDE = 136  # width of one glyph at that size, pixels


def words(name: str) -> str:
    """`:Red_apple:` -> `red apple`."""
    return " ".join(name.strip(":").replace("_", " ").replace("-", " ").lower().split())


def glyph(character: str, font: ImageFont.FreeTypeFont, size: int) -> np.ndarray | None:
    """One emoji on white, uint8 [size, size, 3]; None where the font has no single glyph for it."""
    left, _, right, _ = font.getbbox(character)
    if right - left > SIDE + 14:  # a sequence that the font draws as several glyphs side by side
        return None
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(canvas).text((0, 4), character, font=font, embedded_color=True)
    pixels = np.asarray(canvas.resize((size, size), Image.Resampling.LANCZOS))
    return pixels if pixels.std() >= 5 else None  # blank: missing from the font


def render(path: Path, size: int = 64) -> None:
    """Write `images` uint8 [N, size, size, 3] and `captions` and `ages`.

    A caption is an emoji's names joined by `|`, the main one first; its age is the version of the standard that
    introduced it: the old ones are those that people know.
    """
    font = ImageFont.truetype(str(FONT), STRIKE)
    images, captions, ages = [], [], []
    for character, entry in sorted(emoji.EMOJI_DATA.items(), key=lambda item: item[1]["en"]):
        names = [words(entry["en"]), *(words(alias) for alias in entry.get("alias", []))]
        if entry["status"] != emoji.STATUS["fully_qualified"] or "skin tone" in names[0]:
            continue
        if names[0].startswith("flag "):
            continue
        if (pixels := glyph(character, font, size)) is not None:
            images.append(pixels)
            captions.append("|".join(dict.fromkeys(names)))
            ages.append(entry["E"])
    np.savez_compressed(path, images=np.stack(images), captions=np.array(captions), ages=np.array(ages))
    print(f"{len(images)} pictures -> {path}")
