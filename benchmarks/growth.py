"""How the time of an arm grows with its work, over the sizes and batches that it was measured with."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anamorph.benchmarks.summary import Line

FEWEST = 4
"""Figures without which no line is fitted."""


@dataclass(frozen=True)
class Growth:
    """Seconds ~ operations ** exponent, by least squares of the logarithms of `count` figures.

    `worst` is the most that a figure takes beyond its share of the smallest work's: 1.1 is a tenth more.
    """

    exponent: float
    worst: float
    count: int
    least: float
    most: float
    """Operations."""


def growth(done: Sequence[Line]) -> dict[tuple[str, str], Growth]:
    """What arms show, by arm and task, where they were measured with several sizes or batches."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for one in done:
        if one.median is not None and one.work:
            found.setdefault((one.cell.arm, one.cell.task), {})[one.work] = one.median
    return {key: _fitted(seconds) for key, seconds in found.items() if len(seconds) >= FEWEST}


def _fitted(seconds: dict[float, float]) -> Growth:
    work = np.array(sorted(seconds))
    time = np.array([seconds[value] for value in work])
    exponent = float(np.polyfit(np.log(work), np.log(time), 1)[0])
    shares = time / time[0] / (work / work[0])
    return Growth(exponent, float(shares.max()), len(work), float(work[0]), float(work[-1]))


def growing(done: Sequence[Line]) -> list[str]:
    """The same in sentences."""
    return [
        f"{arm}, {task}: time grows with the work to the power {one.exponent:.2f} ({one.count} sizes and batches, "
        f"{one.least / 1e12:.3g} to {one.most / 1e12:.3g} TFLOP; at worst {one.worst:.2f} times the smallest's share)."
        for (arm, task), one in growth(done).items()
    ]
