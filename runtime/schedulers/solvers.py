"""Solvers: from the noise levels of a grid to the coefficients of the step rule."""

import numpy as np

from anamorph.errors import ConfigError
from anamorph.schedulers.grids import F64, Grid
from anamorph.schedulers.table import Row, chain


def to_clean(kind: str, alpha: F64, sigma: F64) -> tuple[F64, F64]:
    """p, q of D = p x + q out, the estimate of the clean sample, for x = alpha x_0 + sigma noise.

    The network sees x / r with r = hypot(alpha, sigma), and predicts noise ("epsilon"), the clean sample ("sample"),
    or v = (alpha noise - sigma x_0) / r ("v_prediction", Salimans & Ho 2022, arXiv:2202.00512).
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
    r = np.hypot(alpha, sigma)
    return alpha / r**2, -sigma / r


def to_noise(kind: str, alpha: F64, sigma: F64) -> tuple[F64, F64]:
    """p, q of D = p x + q out, the estimate of the noise (levels with hypot(alpha, sigma) = 1)."""
    if kind == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if kind == "sample":
        return 1 / sigma, -alpha / sigma
    return sigma, alpha


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


def rows_of(
    grid: Grid,
    estimate: tuple[F64, F64],
    step: tuple[F64, list[tuple[float, ...]], F64],
    *,
    e: F64 | None = None,
    scale: F64 | None = None,
    draws: np.typing.NDArray[np.bool_] | bool = False,
) -> tuple[Row, ...]:
    """Rows from columns: `estimate` is (p, q), `step` is (a, b of D_n, D_n-1, ..., c). All become Python numbers."""
    count = len(grid.timesteps)
    zeros, ones = np.zeros(count), np.ones(count)
    a, b, c = step
    numbers = np.stack([grid.alpha, grid.sigma, *estimate, a, c, zeros if e is None else e,
                        ones if scale is None else scale], 1).tolist()  # fmt: skip
    drawn = np.broadcast_to(draws, count).tolist()
    return chain([
        Row(timestep, alpha, sigma, p, q, a_n, b_n, c_n, e_n, scale_n, draws_n)
        for timestep, (alpha, sigma, p, q, a_n, c_n, e_n, scale_n), b_n, draws_n in zip(
            grid.timesteps.tolist(), numbers, b, drawn, strict=True
        )
    ])  # fmt: skip


def single(b: F64) -> list[tuple[float, ...]]:
    """A column b_0 as the `b` of a solver without history."""
    return [(value,) for value in b.tolist()]
