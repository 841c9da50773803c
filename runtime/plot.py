"""A line plot on logarithmic axes, drawn with Pillow in the style of the contact sheets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from anamorph.sheet import CARD, EDGE, INK, MARGIN, PAPER, RADIUS, SOFT, fitting, font

COLOURS = ("#2f6fde", "#e4572e", "#1f9d6b", "#a04fd0", "#d39b00", "#0fa3b1", "#c2377a", "#5a6472")
FINE = 3
"""Lines are drawn this many times as large and scaled down, because Pillow draws hard edges."""
LEFT, RIGHT, TOP, BOTTOM = 30, 210, 124, 70  # room around the axes, in pixels

Series = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Axes:
    """From numbers to pixels, both axes logarithmic."""

    low: tuple[float, float]
    high: tuple[float, float]
    box: tuple[float, float, float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point; y grows upwards."""
        left, top, right, bottom = self.box
        u, v = (
            (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
            for value, low, high in zip((x, y), self.low, self.high, strict=True)
        )
        return left + u * (right - left), bottom - v * (bottom - top)


def log_plot(title: str, subtitle: str, labels: tuple[str, str], series: Series, size: tuple[int, int]) -> Image.Image:
    """Each series of positive points as a line with dots, named beside it; `labels` are those of the axes."""
    points = [point for values in series.values() for point in values]
    xs, ys = sorted({x for x, _ in points}), [y for _, y in points]
    marks = _steps(min(ys), max(ys))
    bottom, top = max(mark for mark in marks if mark <= min(ys)), min(mark for mark in marks if mark >= max(ys))
    low, high = (xs[0] / 1.15, bottom / 1.1), (xs[-1] * 1.15, top * 1.1)
    width, height = size
    axes = Axes(low, high, (MARGIN + LEFT, TOP, width - MARGIN - RIGHT, height - BOTTOM))
    plot = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(plot)
    draw.text((MARGIN, 8), title, INK, fitting(title, width - 2 * MARGIN, largest=26))
    draw.text((MARGIN, 48), subtitle, SOFT, fitting(subtitle, width - 2 * MARGIN, largest=17))
    doubling = [2.0**n for n in range(20) if low[0] <= 2**n <= high[0]]
    _frame(draw, axes, labels, doubling or xs, ticks(low[1], high[1]))
    _lines(plot, axes, series)
    _names(plot, axes, series)
    return plot


def ticks(low: float, high: float) -> list[float]:
    """Round numbers 1, 2, 5 times a power of ten within a range; powers alone where that would be many."""
    many = math.log10(high / low) > 2.5
    return [value for value in _steps(low, high, (1,) if many else (1, 2, 5)) if low <= value <= high]


def _steps(low: float, high: float, within: Sequence[int] = (1, 2, 5)) -> list[float]:
    """The round numbers of all powers of ten that a range touches."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**exponent for exponent in exponents for step in within]


def _frame(
    draw: ImageDraw.ImageDraw, axes: Axes, labels: tuple[str, str], xs: Sequence[float], ys: Sequence[float]
) -> None:
    left, top, right, bottom = axes.box
    draw.rounded_rectangle((left - 8, top - 8, right + 8, bottom + 8), RADIUS, fill=CARD, outline=EDGE)
    for x in xs:
        at = axes.place(x, axes.low[1])[0]
        draw.line((at, top, at, bottom), EDGE)
        draw.text((at, bottom + 16), f"{x:g}", SOFT, font(14), anchor="mt")
    for y in ys:
        at = axes.place(axes.low[0], y)[1]
        draw.line((left, at, right, at), EDGE)
        draw.text((left - 16, at), f"{y:g}", SOFT, font(14), anchor="rm")
    draw.text(((left + right) / 2, bottom + 40), labels[0], INK, font(15), anchor="mt")
    draw.text((left - 8, top - 18), labels[1], INK, font(15), anchor="ls")


def _lines(plot: Image.Image, axes: Axes, series: Series) -> None:
    fine = plot.resize((plot.width * FINE, plot.height * FINE), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(fine)
    for index, values in enumerate(series.values()):
        colour = COLOURS[index % len(COLOURS)]
        spots = [tuple(FINE * value for value in axes.place(*point)) for point in values]
        draw.line(spots, colour, width=round(2.2 * FINE), joint="curve")
        for x, y in spots:
            r = 4.5 * FINE
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=CARD, width=FINE)
    area = tuple(round(value) for value in axes.box)
    inner = (area[0] - 7, area[1] - 7, area[2] + 7, area[3] + 7)
    smooth = fine.resize(plot.size, Image.Resampling.LANCZOS).crop(inner)
    plot.paste(smooth, inner[:2])


def _names(plot: Image.Image, axes: Axes, series: Series) -> None:
    """The names at the ends of their lines, pushed apart where they would overlap."""
    ends = sorted((axes.place(*values[-1])[1], index, name) for index, (name, values) in enumerate(series.items()))
    step, right = 22.0, axes.box[2] + 24
    places = [at for at, _, _ in ends]
    for n in range(1, len(places)):
        places[n] = max(places[n], places[n - 1] + step)
    for n in range(len(places)):  # and back up from the lower edge
        places[-1 - n] = min(places[-1 - n], axes.box[3] - n * step)
    draw, disc = ImageDraw.Draw(plot), Image.new("L", (12 * FINE, 12 * FINE))
    ImageDraw.Draw(disc).ellipse((FINE, FINE, 11 * FINE, 11 * FINE), fill=255)
    mask = disc.resize((12, 12), Image.Resampling.LANCZOS)
    for at, (_, index, name) in zip(places, ends, strict=True):
        plot.paste(COLOURS[index % len(COLOURS)], (round(right) - 1, round(at) - 6), mask)
        draw.text((right + 18, at), name, INK, fitting(name, RIGHT - 10, largest=16), anchor="lm")
