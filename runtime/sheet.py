"""Contact sheets: rows of labelled pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFont

INK, SOFT, PAPER, CARD, EDGE = "#1d2129", "#7a828e", "#f6f7f9", "#ffffff", "#e3e6ea"
MARGIN, GAP, PAD, RADIUS = 48, 18, 10, 16  # pixels
LABEL_WIDTH = 190


@dataclass(frozen=True)
class Row:
    """One row: a label, small lines below it, and its pictures."""

    label: str
    note: str
    pictures: Sequence[Image.Image]


def contact_sheet(
    title: str, subtitle: str, captions: Sequence[str], rows: Sequence[Row], picture_size: int = 112
) -> Image.Image:
    """Draw `rows` below each other, a caption above each column, a title on top; sizes in pixels."""
    cell = picture_size + 2 * PAD
    top, caption_height = MARGIN + 96, 44
    width = 2 * MARGIN + LABEL_WIDTH + len(captions) * (cell + GAP) - GAP
    height = top + caption_height + len(rows) * (cell + GAP) - GAP + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), title, INK, font(38))
    draw.text((MARGIN, MARGIN + 46), subtitle, SOFT, font(18))
    left = MARGIN + LABEL_WIDTH
    for column, caption in enumerate(captions):
        centre = left + column * (cell + GAP) + cell // 2
        draw.text((centre, top + caption_height - 12), caption, INK, fitting(caption, cell + GAP - 6), anchor="ms")
    for index, row in enumerate(rows):
        y = top + caption_height + index * (cell + GAP)
        _label(draw, row, y + cell // 2)
        for column, picture in enumerate(row.pictures):
            _card(sheet, picture, (left + column * (cell + GAP), y), cell)
    return sheet


def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own scalable font, which is there on every machine."""
    return ImageFont.load_default(size)


def fitting(text: str, width: int, largest: int = 17, smallest: int = 9) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font in which `text` is at most `width` pixels wide."""
    sizes = range(largest, smallest, -1)
    return next((font(size) for size in sizes if font(size).getlength(text) <= width), font(smallest))


def _label(draw: ImageDraw.ImageDraw, row: Row, middle: int) -> None:
    lines = row.note.splitlines()
    y = middle - (26 + 20 * len(lines)) // 2
    draw.text((MARGIN, y), row.label, INK, fitting(row.label, LABEL_WIDTH - GAP, largest=22))
    for index, line in enumerate(lines):
        draw.text((MARGIN, y + 30 + 20 * index), line, SOFT, fitting(line, LABEL_WIDTH - GAP, largest=15))


def _card(sheet: Image.Image, picture: Image.Image, corner: tuple[int, int], cell: int) -> None:
    """A white card with rounded corners and the picture on it."""
    x, y = corner
    draw = ImageDraw.Draw(sheet)
    draw.rounded_rectangle((x, y, x + cell - 1, y + cell - 1), RADIUS, fill=CARD, outline=EDGE, width=1)
    side = cell - 2 * PAD
    scaled = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    mask = Image.new("L", (side * 4, side * 4), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, side * 4 - 1, side * 4 - 1), 4 * (RADIUS - PAD + 2), fill=255)
    smooth = mask.resize((side, side), Image.Resampling.LANCZOS)
    sheet.paste(ImageChops.darker(scaled, Image.new("RGB", scaled.size, CARD)), (x + PAD, y + PAD), smooth)
