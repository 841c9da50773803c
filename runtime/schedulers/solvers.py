"""From coefficients to rows: what the network predicts, and steps as sums over earlier estimates and samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from anamorph.errors import ConfigError
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


def columns(**weights: F64) -> list[Terms]:
    """Steps without history from columns of weights, one keyword per kind of symbol."""
    values = zip(*(column.tolist() for column in weights.values()), strict=True)
    return [{(kind, n): value for kind, value in zip(weights, row, strict=True)} for n, row in enumerate(values)]


def rows_of(
    grid: Grid,
    estimate: tuple[F64, F64],
    steps: Sequence[Terms],
    *,
    fixes: Sequence[Terms] | None = None,
    scale: F64 | None = None,
    draws: npt.NDArray[np.bool_] | bool = False,
    clean: tuple[F64, F64] | None = None,
    log_c: tuple[F64, F64] | None = None,
) -> tuple[Row, ...]:
    """Rows of a grid, all plain Python numbers.

    `estimate` is (p, q). `steps` says what x' is the sum of, `fixes` what x is replaced by once D is known (empty: it
    stays). Each history is made just long enough for the symbols that later calls ask for.
    `clean` are the weights of the clean estimate where D is none, `log_c` is for learned variances.
    """
    count = len(grid.timesteps)
    corrections = [{}] * count if fixes is None else fixes
    histories = _histories(steps, corrections)
    numbers: Any = np.stack([grid.alpha, grid.sigma, *estimate, np.ones(count) if scale is None else scale], 1).tolist()
    drawn = np.broadcast_to(draws, count).tolist()
    cleans, logs = _pairs(clean, count), _pairs(log_c, count)
    rows = []
    for n, (alpha, sigma, p, q, scaled) in enumerate(numbers):
        step, past = steps[n], histories[n]
        fix = tuple(corrections[n].get(symbol, 0.0) for symbol in (("X", n), ("D", n), *past))
        rows.append(Row(
            grid.timesteps[n].item(), alpha, sigma, p, q,
            a=step.get(("X", n), 0.0),
            b=(step.get(("D", n), 0.0), *(step.get(symbol, 0.0) for symbol in past)),
            c=step.get(("Z", n), 0.0),
            e=step.get(("O", n), 0.0),
            scale=scaled,
            draws=drawn[n],
            keep=tuple(_place(symbol, n, past) for symbol in histories[n + 1]),
            fix=fix if corrections[n] else (),
            clean=cleans[n],
            log_c=logs[n] if drawn[n] else None,
        ))  # fmt: skip
    return tuple(rows)


def _pairs(values: tuple[F64, F64] | None, count: int) -> list[tuple[float, float] | None]:
    if values is None:
        return [None] * count
    return list(zip(values[0].tolist(), values[1].tolist(), strict=True))


def _histories(steps: Sequence[Terms], fixes: Sequence[Terms]) -> list[list[Symbol]]:
    """The symbols of earlier calls that call n finds in its history, newest first; one entry more than steps."""
    needed: set[Symbol] = set()
    found: list[list[Symbol]] = [[]]
    for n in reversed(range(len(steps))):
        used = {symbol for terms in (steps[n], fixes[n]) for symbol, weight in terms.items() if weight}
        needed = {symbol for symbol in needed | used if symbol[1] < n}
        found.append(sorted(needed, key=lambda symbol: (symbol[0], -symbol[1])))
    return found[::-1]


def _place(symbol: Symbol, n: int, past: Sequence[Symbol]) -> int:
    """Where call n finds a symbol in its pool."""
    if symbol[1] < n:
        return 2 + past.index(symbol)
    return {"D": 0, "X": 1, "Z": NOISE}[symbol[0]]
