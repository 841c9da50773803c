"""Contact sheets: rows of labelled pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

INK, SOFT, PAPER, CARD, EDGE = "#1d2129", "#7a828e", "#f6f7f9", "#ffffff", "#e3e6ea"
MARGIN, GAP, PAD, RADIUS = 48, 18, 10, 16  # pixels
LABEL_WIDTH = 190
LINE, LINES = 20, 3  # height of a caption's line in pixels; how many it may have

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Row:
    """One row: a label, small lines below it, and its pictures."""

    label: str
    note: str
    pictures: Sequence[Image.Image]


def contact_sheet(
    title: str, subtitle: str, captions: Sequence[str], rows: Sequence[Row], picture_size: int = 112
) -> Image.Image:
    """Draw `rows` below each other, a caption above each column, a title on top; sizes in pixels.

    Pictures keep their proportions; captions are wrapped, made smaller, and as a last resort cut, to fit their column.
    """
    cell = picture_size + 2 * PAD
    texts = [wrapped(caption, cell) for caption in captions]
    top, caption_height = MARGIN + 96, 24 + LINE * max((len(lines) for lines, _ in texts), default=0)
    width = 2 * MARGIN + LABEL_WIDTH + len(captions) * (cell + GAP) - GAP
    height = top + caption_height + len(rows) * (cell + GAP) - GAP + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), title, INK, fitting(title, width - 2 * MARGIN, largest=38))
    draw.text((MARGIN, MARGIN + 46), subtitle, SOFT, fitting(subtitle, width - 2 * MARGIN, largest=18))
    left = MARGIN + LABEL_WIDTH
    for column, (lines, face) in enumerate(texts):
        centre = left + column * (cell + GAP) + cell // 2
        for above, line in enumerate(reversed(lines)):
            draw.text((centre, top + caption_height - 14 - above * LINE), line, INK, face, anchor="ms")
    face = fitting(max((row.label for row in rows), key=font(22).getlength, default=""), LABEL_WIDTH - GAP, largest=22)
    for index, row in enumerate(rows):
        y = top + caption_height + index * (cell + GAP)
        _label(draw, row, y + cell // 2, face)
        for column, picture in enumerate(row.pictures):
            _card(sheet, picture, (left + column * (cell + GAP), y), cell)
    return sheet


def font(size: float) -> Font:
    """Pillow's own scalable font, which is there on every machine."""
    return ImageFont.load_default(size)


def fitting(text: str, width: int, largest: int = 17, smallest: int = 9) -> Font:
    """The largest font in which `text` is at most `width` pixels wide."""
    sizes = range(largest, smallest, -1)
    return next((font(size) for size in sizes if font(size).getlength(text) <= width), font(smallest))


def wrapped(text: str, width: int, largest: int = 17, smallest: int = 12) -> tuple[list[str], Font]:
    """`text` in at most `LINES` lines of `width` pixels, and the largest font that allows it; cut if none does."""
    for size in range(largest, smallest - 1, -1):
        lines = _lines(text.split(), width, face := font(size))
        if len(lines) <= LINES and all(face.getlength(line) <= width for line in lines):
            return lines, face
    shown = [_shortened(line, width, face) for line in lines[:LINES]]
    if len(lines) > LINES:
        shown[-1] = _shortened(f"{lines[LINES - 1]} {lines[LINES]}", width, face)
    return shown, face


def _lines(words: Sequence[str], width: int, face: Font) -> list[str]:
    """Break between words; a word that is wider than `width` stands alone."""
    lines: list[str] = []
    for word in words:
        if lines and face.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _shortened(line: str, width: int, face: Font) -> str:
    """The beginning of `line` that fits, with an ellipsis if something is missing."""
    if face.getlength(line) <= width:
        return line
    ends = range(len(line), 0, -1)
    return next((f"{line[:end]}…" for end in ends if face.getlength(f"{line[:end]}…") <= width), "…")


def _label(draw: ImageDraw.ImageDraw, row: Row, middle: int, face: Font) -> None:
    lines = row.note.splitlines()
    y = middle - (26 + 20 * len(lines)) // 2
    draw.text((MARGIN, y + 22), row.label, INK, face, anchor="ls")
    for index, line in enumerate(lines):
        draw.text((MARGIN, y + 30 + 20 * index), line, SOFT, fitting(line, LABEL_WIDTH - GAP, largest=15))


def _card(sheet: Image.Image, picture: Image.Image, corner: tuple[int, int], cell: int) -> None:
    """A white card with rounded corners and the picture on it."""
    x, y = corner
    draw = ImageDraw.Draw(sheet)
    draw.rounded_rectangle((x, y, x + cell - 1, y + cell - 1), RADIUS, fill=CARD, outline=EDGE, width=1)
    side = cell - 2 * PAD
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    scaled = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    # Drawn four times as large and scaled down, because Pillow draws hard edges.
    mask = Image.new("L", (size[0] * 4, size[1] * 4), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), 4 * (RADIUS - PAD + 2), fill=255)
    place = (x + PAD + (side - size[0]) // 2, y + PAD + (side - size[1]) // 2)
    sheet.paste(scaled, place, mask.resize(size, Image.Resampling.LANCZOS))
