"""A scheduler is a table: one row of numbers per model call, and one step rule for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from anamorph.errors import InputError
from anamorph.schedulers.arrays import Array, per_image_quantile, spread

History = tuple[Array, ...]
"""What earlier calls left for later ones: estimates D and samples x, as the rows' `keep` chose them."""


@dataclass(frozen=True)
class Row:
    """The numbers of one model call.

        model input   scale x
        estimate      D  = p x + q out
        step          x' = a x + b_0 clip(D) + sum_j b_j history_j + e D + c noise

    `timestep` is what the model receives; `alpha`, `sigma` are the noise level that the row expects,
    x = alpha x_0 + sigma noise. `e` is zero unless clipping tells two estimates apart. `draws` says that noise is
    drawn here, also where `c` is zero, so that the stream of random numbers stays diffusers' own.
    `keep` picks the next history out of (clip(D), x, *history), by position.
    """

    timestep: float
    alpha: float
    sigma: float
    p: float
    q: float
    a: float
    b: tuple[float, ...]
    c: float = 0.0
    e: float = 0.0
    scale: float = 1.0
    draws: bool = False
    keep: tuple[int, ...] = ()


@dataclass(frozen=True)
class Clip:
    """Clamp the estimate to -limit..limit."""

    limit: float

    def __call__(self, estimate: Array) -> Array:
        return estimate.clip(-self.limit, self.limit)


@dataclass(frozen=True)
class Threshold:
    """Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3), image by image.

    s = quantile(|D|, ratio) within 1..maximum; D is clamped to -s..s and divided by s.
    """

    ratio: float
    maximum: float

    def __call__(self, estimate: Array) -> Array:
        s = spread(per_image_quantile(abs(estimate), self.ratio).clip(1.0, self.maximum), estimate)
        return (estimate / s).clip(-1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Table:
    """All rows of one sampling run.

    `timesteps` has one value per row, of the kind (int64 or float32) that diffusers gives the model; `sigmas` has
    one value more (the level reached at the end) and is None where the class has none. `estimates_clean` says that
    D is the clean sample; otherwise it is the raw output, which some solvers combine.
    """

    rows: tuple[Row, ...]
    timesteps: npt.NDArray[Any]
    sigmas: npt.NDArray[np.float32] | None = None
    init_noise_sigma: float = 1.0
    clip: Clip | Threshold | None = None
    estimates_clean: bool = True

    def __len__(self) -> int:
        return len(self.rows)


def estimate(table: Table, n: int, x: Array, out: Array) -> Array:
    """D = p x + q out, before clipping; `x` and `out` have the same shape."""
    row = table.rows[n]
    return row.p * x + row.q * out


def advance(
    table: Table, n: int, x: Array, out: Array, history: History = (), noise: Array | None = None
) -> tuple[Array, History]:
    """One step of the rule that `Row` states: the next sample, and the history to hand to the next call.

    Works alike on NumPy arrays and on tensors of any device; type and shape of `x` are kept.
    Raises InputError: the history is not the one that row n - 1 left, or noise is missing.
    """
    row = table.rows[n]
    if len(history) != len(row.b) - 1:
        raise InputError(f"row {n} expects a history of {len(row.b) - 1}, got {len(history)}; start at row 0 with ()")
    raw = row.p * x + row.q * out
    clean = raw if table.clip is None else table.clip(raw)
    result = row.a * x + row.b[0] * clean
    for weight, past in zip(row.b[1:], history, strict=True):
        if weight:
            result = result + weight * past
    if row.e:
        result = result + row.e * raw
    if row.c:
        if noise is None:
            raise InputError(f"row {n} adds noise, but none was given; draw it wherever `row.draws` is true")
        result = result + row.c * noise
    pool = (clean, x, *history)
    return result, tuple(pool[position] for position in row.keep)


def add_noise(table: Table, n: int, clean: Array, noise: Array) -> Array:
    """The sample that row n expects: alpha clean + sigma noise."""
    row = table.rows[n]
    return row.alpha * clean + row.sigma * noise


def chain(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Complete the `keep` of rows whose history is the plain series D_n-1, D_n-2, ...: no more than the next needs."""
    needs = [len(row.b) - 1 for row in rows[1:]] + [0]
    return tuple(replace(row, keep=(0, *range(2, need + 1))[:need]) for row, need in zip(rows, needs, strict=True))
