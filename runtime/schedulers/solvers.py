"""From coefficients to rows: what the network predicts, and steps as sums over earlier estimates and samples."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from anamorph.errors import ConfigError, InputError
from anamorph.schedulers.grids import F64, Grid
from anamorph.schedulers.table import NOISE, Row

Symbol = tuple[str, int]
"""What a step may combine: ("D", n) the estimate of call n, clipped; ("X", n) the sample that it got, corrected;
("Z", n) the noise drawn there; ("O", n) the raw output, only in step n itself."""

Terms = dict[Symbol, float]
"""A weighted sum of symbols."""


def to_clean(kind: str, alpha: F64, sigma: F64) -> tuple[F64, F64]:
    """p, q of D = p x + q out, the estimate of the clean sample, for x = alpha x_0 + sigma noise.

    The network sees x / r with r = hypot(alpha, sigma), and predicts noise ("epsilon"), the clean sample ("sample"),
    v = (alpha noise - sigma x_0) / r ("v_prediction", Salimans & Ho 2022, arXiv:2202.00512),
    or noise - x_0 ("flow_prediction", Lipman et al. 2023, arXiv:2210.02747, where alpha + sigma = 1).
    Raises ConfigError: epsilon at a level without signal, where nothing tells the clean sample.
    """
    if kind == "epsilon":
        if not alpha.all():
            raise ConfigError(
                "prediction_type='epsilon' has no clean sample at the first timestep, whose signal "
                "rescale_betas_zero_snr=True removes; use 'v_prediction' or 'sample', or another timestep_spacing"
            )
        return 1 / alpha, -sigma / alpha
    if kind == "sample":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if kind == "flow_prediction":
        return np.ones_like(alpha), -sigma
    r = np.hypot(alpha, sigma)
    return alpha / r**2, -sigma / r


def to_noise(kind: str, alpha: F64, sigma: F64) -> tuple[F64, F64]:
    """p, q of D = p x + q out, the estimate of the noise; see `to_clean`.

    Raises ConfigError: "sample" at a level without noise, where nothing tells the noise.
    """
    if kind == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if kind == "sample":
        if not sigma.all():
            raise ConfigError(
                "prediction_type='sample' has no noise at a level of zero; use 'epsilon' or 'v_prediction', "
                "or set_alpha_to_one=False"
            )
        return 1 / sigma, -alpha / sigma
    if kind == "flow_prediction":
        return np.ones_like(alpha), alpha
    r = np.hypot(alpha, sigma)
    return sigma / r**2, alpha / r


def first_order(grid: Grid, eta: float = 0.0) -> tuple[F64, F64, F64]:
    """a, b, c of x' = a x + b D + c noise, exact for a constant D (DDIM, arXiv:2010.02502, eq. 12 and 16).

        c = eta sigma' sqrt(1 - (sigma' alpha / (alpha' sigma))^2)
        a = sqrt(sigma'^2 - c^2) / sigma,   b = alpha' - alpha a

    With alpha = 1 it is Euler's method in sigma (eta = 1: ancestral); with eta = 1 and alpha^2 + sigma^2 = 1, DDPM.
    """
    ratio = grid.sigma_next * grid.alpha / (grid.alpha_next * grid.sigma)
    c = eta * grid.sigma_next * np.sqrt(np.clip(1 - ratio**2, 0, None))
    a = np.sqrt(np.clip(grid.sigma_next**2 - c**2, 0, None)) / grid.sigma
    return a, grid.alpha_next - grid.alpha * a, c


CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
"""Options of the steps that may add noise before a call."""


def churned(grid: Grid, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> tuple[Grid, F64]:
    """The grid with the levels that noise before each call leads to, and the weights of that noise.

    sigma_hat = (1 + gamma) sigma with gamma = min(s_churn / calls, sqrt(2) - 1) where s_tmin <= sigma <= s_tmax,
    weight s_noise sqrt(sigma_hat^2 - sigma^2) (Karras et al. 2022, arXiv:2206.00364, alg. 2).
    Raises InputError: s_churn is negative.
    """
    if s_churn < 0:
        raise InputError(f"s_churn is {s_churn}, expected 0 or more")
    if s_churn == 0:
        return grid, np.zeros_like(grid.sigma)
    gamma = min(s_churn / (grid.first + len(grid.timesteps)), math.sqrt(2) - 1)
    hat = grid.sigma * np.where((s_tmin <= grid.sigma) & (grid.sigma <= s_tmax), 1 + gamma, 1.0)
    return replace(grid, sigma=hat), s_noise * np.sqrt(hat**2 - grid.sigma**2)


class Columns(NamedTuple):
    """Steps without history: a weight of each kind of symbol per call."""

    X: F64 | float = 0.0
    D: F64 | float = 0.0
    Z: F64 | float = 0.0
    O: F64 | float = 0.0  # noqa: E741  (the symbol's name)

    def terms(self, count: int) -> list[Terms]:
        """The same as sums, which calls of a history may replace."""
        columns = [_listed(column, count) for column in self]
        return [
            {(kind, n): weight for kind, weight in zip(self._fields, row, strict=True)}
            for n, row in enumerate(zip(*columns, strict=True))
        ]


def rows_of(
    grid: Grid,
    estimate: tuple[F64, F64],
    steps: Columns | Sequence[Terms],
    *,
    fixes: Sequence[Terms] | None = None,
    scale: F64 | float = 1.0,
    draws: npt.NDArray[np.bool_] | bool = False,
    clean: tuple[F64, F64] | None = None,
    log_c: tuple[F64, F64] | None = None,
    churn: F64 | float = 0.0,
) -> tuple[Row, ...]:
    """Rows of a grid, all plain Python numbers.

    `estimate` is (p, q). `steps` says what x' is the sum of, `fixes` what x is replaced by once D is known (empty: it
    stays). Each history is made just long enough for the symbols that later calls ask for.
    `clean` are the weights of the clean estimate where D is none, `log_c` is for learned variances,
    `churn` the weight of noise before a call.
    """
    count = len(grid.timesteps)
    drawn = _listed(draws, count)
    if isinstance(steps, Columns):
        a, d, c, e = (_listed(column, count) for column in steps)
        b: list[tuple[float, ...]] = list(zip(d, strict=True))
        keep: list[tuple[int, ...]] = [()] * count
        fix: list[tuple[float, ...]] = [()] * count
    else:
        corrections = [{}] * count if fixes is None else fixes
        past = _histories(steps, corrections)
        a, c, e = ([step.get((kind, n), 0.0) for n, step in enumerate(steps)] for kind in "XZO")
        b = [_weights(step, [("D", n), *past[n]]) for n, step in enumerate(steps)]
        keep = [tuple([_place(symbol, n, past[n]) for symbol in past[n + 1]]) for n in range(count)]
        fix = [_weights(step, [("X", n), ("D", n), *past[n]]) if step else () for n, step in enumerate(corrections)]
    return tuple(map(Row, *(column.tolist() for column in (grid.timesteps, grid.alpha, grid.sigma, *estimate)),
        a, b, c, e, _listed(scale, count), drawn, keep, fix, _pairs(clean, count),
        [pair if draw else None for pair, draw in zip(_pairs(log_c, count), drawn, strict=True)],
        _listed(churn, count),
    ))  # fmt: skip


def _listed(column: Any, count: int) -> list[Any]:
    """A column as plain Python values; a single value stands for all."""
    return column.tolist() if isinstance(column, np.ndarray) else [column] * count


def _weights(terms: Terms, symbols: Sequence[Symbol]) -> tuple[float, ...]:
    return tuple([terms.get(symbol, 0.0) for symbol in symbols])


def _pairs(values: tuple[F64, F64] | None, count: int) -> Sequence[tuple[float, float] | None]:
    return [None] * count if values is None else list(zip(values[0].tolist(), values[1].tolist(), strict=True))


def _histories(steps: Sequence[Terms], fixes: Sequence[Terms]) -> list[list[Symbol]]:
    """The symbols of earlier calls that call n finds in its history, newest first; one entry more than steps."""
    needed: set[Symbol] = set()
    found: list[list[Symbol]] = [[]]
    for n in reversed(range(len(steps))):
        for terms in (steps[n], fixes[n]):
            needed.update([symbol for symbol, weight in terms.items() if weight])
        needed = {symbol for symbol in needed if symbol[1] < n}
        found.append(sorted(needed, key=lambda symbol: (symbol[0], -symbol[1])))
    return found[::-1]


def _place(symbol: Symbol, n: int, past: Sequence[Symbol]) -> int:
    """Where call n finds a symbol in its pool."""
    if symbol[1] < n:
        return 2 + past.index(symbol)
    return {"D": 0, "X": 1, "Z": NOISE}[symbol[0]]
