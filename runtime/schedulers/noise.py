"""Noise schedules: the training-time levels alpha_bar_t that a configuration describes."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from anamorph.config import Config
from anamorph.errors import ConfigError

F32 = npt.NDArray[np.float32]
LOWEST = 2.0**-24
"""alpha_bar that replaces zero where a sigma must stay finite (the smallest subnormal of float16)."""


def alphas_bar(config: Config) -> F32:
    """alpha_bar_t = prod_(s <= t) (1 - beta_s), float32 as stored with the model, shape (num_train_timesteps,).

    Raises ConfigError: `trained_betas` has another length than num_train_timesteps.
    """
    betas = _betas(config)
    if config.get("rescale_betas_zero_snr", False):
        betas = zero_terminal_snr(betas)
    return _cumulative(betas)


def _cumulative(betas: F32) -> F32:
    # The factors are rounded to float32 (that is the schedule the model was trained with), their product is not.
    alphas = np.float32(1) - betas
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _betas(config: Config) -> F32:
    steps, kind = config["num_train_timesteps"], config["beta_schedule"]
    start, end = config["beta_start"], config["beta_end"]
    if config["trained_betas"] is not None:
        trained = np.asarray(config["trained_betas"], np.float32)
        if trained.shape != (steps,):
            raise ConfigError(
                f"trained_betas has {trained.size} values, expected num_train_timesteps={steps}; make them agree"
            )
        return trained
    if kind == "linear":
        return ramp(start, end, steps)
    if kind == "scaled_linear":
        return ramp(start**0.5, end**0.5, steps) ** 2
    if kind == "sigmoid":
        return _sigmoid(ramp(-6.0, 6.0, steps)) * np.float32(end - start) + np.float32(start)
    return _from_alpha_bar(CURVES[kind], steps)


def ramp(start: float, end: float, steps: int) -> F32:
    """Equidistant float32 numbers, rounded as PyTorch rounds them.

    Each is reckoned from the nearer end with one fused multiply-add, so that alpha_bar comes out equal to the last bit.
    """
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(steps - 1, 1)))
    index = np.arange(steps)
    ramp64 = np.where(index < steps // 2, first + step * index, last - step * (steps - 1 - index))
    return ramp64.astype(np.float32)


def _sigmoid(x: F32) -> F32:
    return np.float32(1) / (np.float32(1) + np.exp(-x))


def _cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    half_log_snr = -0.5 * math.copysign(1.0, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return 1 / math.sqrt(1 + math.exp(-half_log_snr))


def _exponential(t: float) -> float:
    return math.exp(-12.0 * t)


CURVES: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": _cosine,
    "laplace": _laplace,
    "exp": _exponential,
}
"""alpha_bar as a function of time 0..1 (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17; arXiv:2407.03297)."""


def _from_alpha_bar(curve: Callable[[float], float], steps: int) -> F32:
    level = [curve(i / steps) for i in range(steps + 1)]
    return np.array([min(1 - level[i + 1] / level[i], 0.999) for i in range(steps)], np.float32)


def zero_terminal_snr(betas: F32) -> F32:
    """Shift and scale sqrt(alpha_bar) so that the last level is pure noise (Lin et al. 2023, arXiv:2305.08891, alg. 1).

    In float32 throughout: the last levels are differences of nearly equal numbers, and models were trained with these.
    """
    root = np.sqrt(_cumulative(betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bar = root**2
    alphas: F32 = np.concatenate([bar[:1], bar[1:] / bar[:-1]])
    return np.float32(1) - alphas


def finite_sigmas(bar: F32) -> F32:
    """sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t), the noise level of x / alpha; no signal counts as 2^-24."""
    bar = np.where(bar > 0, bar, np.float32(LOWEST))
    sigmas: F32 = np.sqrt((np.float32(1) - bar) / bar)
    return sigmas
