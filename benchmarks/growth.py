"""How the time of an arm grows with its work, over the sizes and batches that it was measured with.

Work is counted twice: the operations of products alone, and the seconds that these and the exponentials of attention's
scores, whose number grows with the square of the pixels, would take at the machine's measured peaks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from anamorph.benchmarks.summary import Line

FEWEST = 4
"""Figures without which no line is fitted."""
Work = Callable[[Line], float | None]


@dataclass(frozen=True)
class Growth:
    """Seconds ~ work ** exponent, by least squares of the logarithms of `count` figures.

    `worst` is the most that a figure takes beyond its share of the smallest work's: 1.1 is a tenth more.
    """

    exponent: float
    worst: float
    count: int
    least: float
    most: float
    """In the unit of the work."""


def growth(done: Sequence[Line], work: Work = lambda one: one.work) -> dict[tuple[str, str], Growth]:
    """What arms show, by arm and task, where they were measured with several sizes or batches."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for one in done:
        if one.median is not None and (amount := work(one)):
            found.setdefault((one.cell.arm, one.cell.task), {})[amount] = one.median
    return {key: _fitted(seconds) for key, seconds in found.items() if len(seconds) >= FEWEST}


def _fitted(seconds: dict[float, float]) -> Growth:
    work = np.array(sorted(seconds))
    time = np.array([seconds[value] for value in work])
    exponent = float(np.polyfit(np.log(work), np.log(time), 1)[0])
    shares = time / time[0] / (work / work[0])
    return Growth(exponent, float(shares.max()), len(work), float(work[0]), float(work[-1]))


def growing(done: Sequence[Line]) -> list[str]:
    """The same in sentences."""
    kinds: tuple[tuple[str, Work, float, str], ...] = (
        ("the operations of its products", lambda one: one.work, 1e12, "TFLOP"),
        ("the time that products and exponentials take at the measured peaks", lambda one: one.least, 1.0, "s"),
    )
    return [
        f"{arm}, {task}: time grows with {what} to the power {one.exponent:.2f} ({one.count} sizes and batches, "
        f"{one.least / unit:.3g} to {one.most / unit:.3g} {name}; at worst {one.worst:.2f} times the smallest's share)."
        for what, work, unit, name in kinds
        for (arm, task), one in growth(done, work).items()
    ]
