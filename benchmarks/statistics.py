"""What repeated timings say: medians with intervals, outliers, percentiles, and whether two arms differ.

Samples come in bursts, one for each process: timings of one process resemble one another more than those of two, so
that the number of processes, and not that of samples, decides what may be claimed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_ind

Bursts = Sequence[Sequence[float]]
F64 = NDArray[np.float64]

NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
FAR = 3.5
"""Robust deviations from which a sample is flagged (Iglewicz & Hoaglin 1993)."""
CONFIDENCE = 0.95
BLOCK = 1_000_000
"""Samples that a bootstrap draws at once."""
Z_BOTH = 1.959964 + 1.281552
"""Quantiles of the normal distribution at 97.5 % (sure) and 90 % (found)."""
ENOUGH = 6
"""Values without which no interval between two of them holds the median at 95 %: 1 - 2 / 2^n >= 0.95."""
FEWEST = 3
"""Processes a side without which two arms are not compared."""


def pooled(bursts: Bursts) -> F64:
    """All samples in one array."""
    return np.concatenate([np.asarray(burst, np.float64) for burst in bursts]) if bursts else np.empty(0)


def mad(samples: Sequence[float] | F64) -> float:
    """Median absolute deviation from the median."""
    values = np.asarray(samples, np.float64)
    return float(np.median(np.abs(values - np.median(values))))


def outliers(samples: Sequence[float] | F64) -> NDArray[np.bool_]:
    """Which samples are far from the median; they are flagged and kept."""
    values = np.asarray(samples, np.float64)
    return np.asarray(np.abs(values - np.median(values)) > FAR * NORMAL_MAD * mad(values))


def percentile(samples: Sequence[float] | F64, share: float) -> float | None:
    """The quantile, or None with fewer samples than bound it from above: 1 - share^n >= 0.95 (Wilks 1941)."""
    values = np.asarray(samples, np.float64)
    if 1 - share ** len(values) < CONFIDENCE:
        return None
    return float(np.quantile(values, share))


def interval(bursts: Bursts, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the median at 95 %: processes are drawn anew, then samples within each (Davison &
    Hinkley 1997, section 3.8)."""
    random = np.random.default_rng(seed)
    lengths = np.array([len(burst) for burst in bursts])
    padded = np.full((len(bursts), lengths.max()), np.nan)
    for row, burst in zip(padded, bursts, strict=True):
        row[: len(burst)] = burst
    at_once = max(1, BLOCK // padded.size)
    medians = np.concatenate([
        _medians(padded, lengths, min(at_once, resamples - start), random) for start in range(0, resamples, at_once)
    ])  # fmt: skip
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _medians(padded: F64, lengths: NDArray[np.int64], resamples: int, random: np.random.Generator) -> F64:
    rows = random.integers(0, len(padded), (resamples, len(padded)))
    kept = lengths[rows][:, :, None]
    columns = (random.random((resamples, *padded.shape)) * kept).astype(np.int64)
    drawn = np.where(np.arange(padded.shape[1]) < kept, padded[rows[:, :, None], columns], np.nan)
    return np.asarray(np.nanmedian(drawn.reshape(resamples, -1), axis=1), np.float64)


def settled(bursts: Bursts, within: float) -> bool:
    """Whether both ends of the median's interval are within that share of it."""
    middle = float(np.median(pooled(bursts)))
    low, high = interval(bursts)
    return max(high - middle, middle - low) <= within * middle


@dataclass(frozen=True)
class Contrast:
    """New over old: the ratio of typical times, its interval at 95 %, and the chance of such a one among equals."""

    ratio: float
    low: float
    high: float
    p: float


def contrast(old: Bursts, new: Bursts) -> Contrast | None:
    """Welch's test on the logarithms of the processes' medians; None with fewer than three processes a side."""
    if min(len(old), len(new)) < FEWEST:
        return None
    sides = [np.log([np.median(burst) for burst in side]) for side in (old, new)]
    if all(np.ptp(side) == 0 for side in sides):
        ratio = math.exp(float(sides[1][0] - sides[0][0]))
        return Contrast(ratio, ratio, ratio, 1.0 if ratio == 1 else 0.0)
    found = ttest_ind(sides[1], sides[0], equal_var=False)
    low, high = found.confidence_interval(CONFIDENCE)
    return Contrast(math.exp(float(np.mean(sides[1]) - np.mean(sides[0]))), math.exp(low), math.exp(high), found.pvalue)


@dataclass(frozen=True)
class Pairs:
    """New over old for calls that followed each other: the median ratio, its interval at 95 %, and their number.

    There is no interval of fewer than `ENOUGH` pairs.
    """

    ratio: float
    interval: tuple[float, float] | None
    count: int


def paired(old: Bursts, new: Bursts) -> Pairs | None:
    """The median of the ratios of calls in turn, which a machine whose speed changes slowly leaves as it is.

    The interval is that of these processes: others of the same arms may differ. None without a pair.
    """
    ratios = [np.asarray(after) / np.asarray(before) for before, after in zip(old, new, strict=True) if len(before)]
    if not ratios:
        return None
    count = sum(map(len, ratios))
    return Pairs(float(np.median(pooled(ratios))), interval(ratios) if count >= ENOUGH else None, count)


def needed(old: Bursts, new: Bursts, ratio: float) -> int:
    """Processes a side that would show a change by `ratio` nine times in ten, from how much these ones differ.

    n = 2 (z_0.975 + z_0.9)^2 s^2 / log(ratio)^2, s^2 the mean variance of the logarithms of processes' medians.
    """
    variance = np.mean([np.var(np.log([np.median(burst) for burst in side]), ddof=1) for side in (old, new)])
    return max(FEWEST, math.ceil(2 * Z_BOTH**2 * float(variance) / math.log(ratio) ** 2))


def holm(chances: Sequence[float]) -> list[float]:
    """Chances of several tests, adjusted so that one false alarm among all of them keeps its rate (Holm 1979)."""
    order = sorted(range(len(chances)), key=chances.__getitem__)
    adjusted, largest = [0.0] * len(chances), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(chances) - rank) * chances[index]))
        adjusted[index] = largest
    return adjusted
