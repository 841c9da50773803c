"""Families of noise levels that a configuration may choose, and the shifts of flow matching."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from anamorph.config import Config
from anamorph.errors import InputError
from anamorph.schedulers.grids import F64, FAMILIES


def family(config: Config) -> str | None:
    """Which of FAMILIES is on, or None."""
    return next((name for name in FAMILIES if config.get(name)), None)


def family_sigmas(name: str, config: Config, source: npt.NDArray[Any], steps: int) -> F64:
    """Noise levels, descending, between the ends of `source` (or sigma_max and sigma_min of the configuration).

    karras       see `karras`, rho = 7                                        (arXiv:2206.00364, eq. 5)
    exponential  equidistant in log sigma; "lu" is the same on the whole schedule (arXiv:2206.00927)
    beta         quantiles of Beta(0.6, 0.6)                                  (arXiv:2407.12173)
    """
    u = np.linspace(0, 1, steps)
    if name == "use_lu_lambdas":
        first, last = np.log(source[[0, -1]]).tolist()  # in the type of the schedule, as its timesteps are found
        return np.asarray(np.exp(first + u * (last - first)))
    given_low, given_high = config.get("sigma_min"), config.get("sigma_max")
    low = source[-1].item() if given_low is None else given_low
    high = source[0].item() if given_high is None else given_high
    if name == "use_karras_sigmas":
        return karras(high, low, u, 7.0)
    if name == "use_beta_sigmas":
        return np.asarray(low + beta_quantiles(1 - u) * (high - low))
    return exponential(high, low, steps)


def karras(high: float, low: float, u: F64, rho: float) -> F64:
    """(high^(1/rho) + u (low^(1/rho) - high^(1/rho)))^rho for u in 0..1 (arXiv:2206.00364, eq. 5)."""
    inverse = 1 / rho
    sigmas: F64 = (high**inverse + u * (low**inverse - high**inverse)) ** rho
    return sigmas


def exponential(high: float, low: float, steps: int) -> F64:
    """Levels equidistant in their logarithm, descending."""
    sigmas: F64 = np.exp(np.linspace(math.log(high), math.log(low), steps))
    return sigmas


SHAPE = 0.6
"""Both parameters of the beta distribution."""


def beta_quantiles(u: F64) -> F64:
    """The inverse of I_x(a, a), the distribution function of Beta(a, a) with a = 0.6, for u in 0..1.

    On 0..1/2, I_x = x^a / (a B) sum_k (1-a)_k a / (k! (a+k)) x^k (DLMF 8.17.8) is nearly linear in y = x^a, so that
    Newton's method in y converges within a few steps; the other half follows by symmetry.
    """
    a = SHAPE
    scale = a * math.gamma(a) ** 2 / math.gamma(2 * a)
    k = np.arange(60)
    rising = np.concatenate([[1.0], np.cumprod((k[1:] - a) / k[1:])])
    mirrored = u > 0.5
    target = np.where(mirrored, 1 - u, u) * scale
    y = target.copy()
    for _ in range(20):
        powers = y[:, None] ** (k / a)
        value, slope = y * (powers @ (rising * a / (a + k))), powers @ rising
        y = np.clip(y - (value - target) / slope, 0, 0.5**a)
    x = y ** (1 / a)
    return np.where(mirrored, 1 - x, x)


def shifted(sigmas: F64, shift: float) -> F64:
    """shift s / (1 + (shift - 1) s): more steps at high noise for large pictures (arXiv:2403.03206, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def shifted_for_size(sigmas: F64, mu: float, kind: str) -> F64:
    """m / (m + 1/s - 1) with m = e^mu ("exponential") or mu ("linear"); mu grows with the size of the picture."""
    factor = math.exp(mu) if kind == "exponential" else mu
    return factor / (factor + (1 / sigmas - 1))


def stretched(sigmas: F64, terminal: float) -> F64:
    """Scale 1 - s so that the last level becomes `terminal`; InputError: the last level is 1, which cannot move."""
    rest = 1 - sigmas
    if rest[-1] == 0:
        raise InputError("shift_terminal cannot move a single level of 1; ask for two steps or more")
    return np.asarray(1 - rest * (1 - terminal) / rest[-1])
