"""A scheduler is a table: one row of numbers per model call, and one step rule for all of them."""

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from anamorph.errors import InputError
from anamorph.schedulers.arrays import Array, cast, combined, is_tensor, per_image_quantile, spread, weighted_sum

History = tuple[Array, ...]
"""What earlier calls left for later ones: estimates D, samples x and noise, as the rows' `keep` chose them."""

NOISE = -1
"""The place of this call's noise in the pool that `keep` picks from."""


class Row(NamedTuple):
    """The numbers of one model call.

        model input   scale x
        more noise    x  = x + churn noise
        estimate      D  = p x + q out
        correction    x  = f_x x + f_0 clip(D) + sum_j f_j history_j                        (where `fix` is not empty)
        step          x' = a x + b_0 clip(D) + sum_j b_j history_j + e out + c noise

    `timestep` is what the model receives; `alpha`, `sigma` are the noise level that the row expects,
    x = alpha x_0 + sigma noise. `e` is zero unless clipping tells two estimates apart. `draws` says that noise is
    drawn here, also where `c` is zero, so that the stream of random numbers stays diffusers' own.
    `keep` picks the next history out of (clip(D), x, *history, noise), by position.
    `clean` holds the weights of x and out in the estimate of the clean sample, where that is not D itself.
    `log_c` replaces c where the network also predicts the variance, see `Table.variance`.
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
    fix: tuple[float, ...] = ()
    clean: tuple[float, float] | None = None
    log_c: tuple[float, float] | None = None
    churn: float = 0.0


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
    one value more (the level reached at the end) and is None where the class has none. `variance` says that the
    output has twice the sample's channels, the second half being v: with "learned" it is the variance of a step,
    c = sqrt(v); with "learned_range" c = exp(log_c_0 + log_c_1 v) (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15);
    with "unused" it is dropped.
    """

    rows: tuple[Row, ...]
    timesteps: npt.NDArray[Any]
    sigmas: npt.NDArray[np.float32] | None = None
    init_noise_sigma: float = 1.0
    clip: Clip | Threshold | None = None
    variance: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def fused(self) -> list[list[tuple[int, float]] | None]:
        """Per row, x' as terms of (x, out, noise, *history); None where clipping or a correction needs D itself.

        D is written out there: where x and D nearly cancel, the sum of their weights is far more exact than their sum.
        """
        weights = (
            (row.a + row.b[0] * row.p, row.e + row.b[0] * row.q, 0.0 if row.log_c else row.c, *row.b[1:])
            for row in self.rows
        )
        terms = [[term for term in enumerate(found) if term[1]] for found in weights]
        return [None if self.clip or row.fix else found for row, found in zip(self.rows, terms, strict=True)]


def clean_estimate(table: Table, n: int, x: Array, out: Array, noise: Array | None = None) -> Array:
    """The estimate of the clean sample, clipped as the table says; arguments as for `advance`."""
    row = table.rows[n]
    p, q = (row.p, row.q) if row.clean is None else row.clean
    raw = weighted_sum((p, q, p * row.churn), (x, _mean(table, x, out), noise))
    return raw if table.clip is None else table.clip(raw)


class StepOutput:
    """The next sample, and the estimate of the clean one, which is computed when it is asked for."""

    def __init__(self, prev_sample: Array, *inputs: Any) -> None:
        self.prev_sample = prev_sample
        self.inputs = inputs  # of `clean_estimate`

    @cached_property
    def pred_original_sample(self) -> Array:
        """D as the solver's own last call sees it, clipped as the configuration says."""
        return cast(clean_estimate(*self.inputs), self.prev_sample)


def advance(
    table: Table, n: int, x: Array, out: Array, history: History = (), noise: Array | None = None
) -> tuple[Array, History]:
    """One step of the rule that `Row` states: the next sample, and the history to hand to the next call.

    Works alike on NumPy arrays and on tensors of any device; type and shape of `x` are kept.
    Raises InputError: the history is not the one that row n - 1 left, or noise or the predicted variance is missing.
    """
    row = table.rows[n]
    if len(history) != len(row.b) - 1:
        raise InputError(f"row {n} expects a history of {len(row.b) - 1}, got {len(history)}; start at row 0 with ()")
    if noise is None and (row.draws or row.c) and (row.c or row.churn or row.log_c or NOISE in row.keep):
        raise InputError(f"row {n} adds noise, but none was given; draw it wherever `row.draws` is true")
    deviation, clean, fused = None, None, table.fused[n]
    if table.variance is not None:
        deviation = None if row.log_c is None else _deviation(table, row.log_c, x, out)
        out = _mean(table, x, out)
    if row.churn:
        x = weighted_sum((1.0, row.churn), (x, noise))
    if fused is None or 0 in row.keep:
        clean = weighted_sum((row.p, row.q), (x, out))
    if fused is not None:
        result = combined(fused, (x, out, noise, *history))
    else:
        if table.clip is not None:
            clean = table.clip(clean)
        if row.fix:
            x = weighted_sum(row.fix, (x, clean, *history))
        c = row.c if deviation is None else 0.0
        result = weighted_sum((row.a, row.b[0], row.e, c, *row.b[1:]), (x, clean, out, noise, *history))
    if deviation is not None:
        result = result + deviation * noise
    if not row.keep:
        return result, ()
    pool = (clean, x, *history, noise)
    return result, tuple([pool[position] for position in row.keep])


def _mean(table: Table, x: Array, out: Array) -> Array:
    """The first half of an output that also predicts the variance."""
    if table.variance is None:
        return out
    channels = x.shape[1]
    if table.variance != "unused" and out.shape[1] != 2 * channels:
        raise InputError(
            f"the configuration has a learned variance, so the model must return {2 * channels} channels for "
            f"{channels} of the sample, got {out.shape[1]}; change variance_type"
        )
    return out[:, :channels]


def _deviation(table: Table, log_c: tuple[float, float], x: Array, out: Array) -> Array:
    """What the noise is multiplied by where the network predicts it."""
    predicted = out[:, x.shape[1] :]
    if table.variance == "learned":
        return predicted**0.5
    exponent = log_c[0] + log_c[1] * predicted
    return sys.modules["torch"].exp(exponent) if is_tensor(exponent) else np.exp(exponent)


def add_noise(table: Table, n: int, clean: Array, noise: Array) -> Array:
    """The sample that row n expects: alpha clean + sigma noise."""
    row = table.rows[n]
    return row.alpha * clean + row.sigma * noise
