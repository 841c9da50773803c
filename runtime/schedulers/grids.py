"""Grids: the timesteps and noise levels that a run passes through."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from anamorph.config import Config
from anamorph.errors import InputError
from anamorph.schedulers.noise import F32

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Request:
    """What a run was asked for: exactly one of `steps`, `timesteps` and `sigmas` is not None.

    A run of a distilled model starts at `strength` 0..1 of the schedule of `original_inference_steps` steps.
    """

    steps: int | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    mu: float | None = None
    strength: float = 1.0
    original_inference_steps: int | None = None

    @property
    def count(self) -> int:
        """The number of steps, which is the length of the other two."""
        given = self.timesteps if self.sigmas is None else self.sigmas
        if self.steps is not None:
            return self.steps
        assert given is not None
        return len(given)


@dataclass(frozen=True, eq=False)
class Grid:
    """One entry per model call: it happens at x = alpha x_0 + sigma noise and leads to the `_next` level.

    `steps` is the number of steps that was asked for and `first` how many entries were sliced off;
    `sigmas` as diffusers shows them, float32.
    """

    timesteps: npt.NDArray[Any]
    alpha: F64
    sigma: F64
    alpha_next: F64
    sigma_next: F64
    steps: int
    sigmas: F32 | None = None
    init_noise_sigma: float = 1.0
    first: int = 0

    def begin(self, index: int) -> "Grid":
        """The grid from entry `index` on, as image-to-image needs it."""
        return replace(
            self,
            timesteps=self.timesteps[index:],
            alpha=self.alpha[index:],
            sigma=self.sigma[index:],
            alpha_next=self.alpha_next[index:],
            sigma_next=self.sigma_next[index:],
            sigmas=None if self.sigmas is None else self.sigmas[index:],
            first=self.first + index,
        )


def spaced(config: Config, steps: int) -> F64:
    """Descending timesteps by `timestep_spacing` (Lin et al. 2023, arXiv:2305.08891, table 2).

    Linspace is not rounded here: some classes do that, others do not. There are always `steps` of them.
    Raises InputError: "leading" with more steps than num_train_timesteps.
    """
    train, kind = config["num_train_timesteps"], config["timestep_spacing"]
    if kind == "linspace":
        points: F64 = np.linspace(0, train - 1, steps)
        return points[::-1]
    if kind == "leading":
        return leading(train, steps)[::-1] + float(config["steps_offset"])
    return trailing(train, train / steps, steps)


def leading(train: int, points: int) -> F64:
    """Ascending multiples of train // points."""
    if points > train:
        raise InputError(f"timestep_spacing='leading' cannot place {points} points on {train} timesteps; ask for fewer")
    return np.arange(points, dtype=np.float64) * (train // points)


FAMILIES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
"""Switches that each replace the noise levels; at most one may be on."""


def trailing(start: int, stride: float, points: int) -> F64:
    """Descending timesteps from start - 1, at most `points`, rounded."""
    # The range's length suffers from rounding: for 61, 103, 121 ... of 1000 it would add a timestep of -1.
    values: F64 = np.arange(start, 0, -stride)[:points]
    return values.round() - 1


def as_indices(timesteps: F64, train: int) -> I64:
    """Timesteps as indices of the training schedule.

    Raises InputError: one lies outside 0..train - 1.
    """
    indices = np.round(timesteps).astype(np.int64)
    if indices.min() < 0 or indices.max() >= train:
        raise InputError(
            f"timestep {indices.min() if indices.min() < 0 else indices.max()} lies outside 0..{train - 1}; "
            f"change the number of steps, or steps_offset or timestep_spacing in the configuration"
        )
    return indices


def variance_preserving(timesteps: I64, following: I64, bar: F32, final: float, steps: int) -> Grid:
    """The grid of DDPM, DDIM: levels alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar).

    `following` is the timestep that each call leads to; negative means the end, of level `final`.
    """
    here = bar[timesteps].astype(np.float64)
    there = np.where(following >= 0, bar[np.maximum(following, 0)].astype(np.float64), final)
    return Grid(timesteps, np.sqrt(here), np.sqrt(1 - here), np.sqrt(there), np.sqrt(1 - there), steps)


def sigma_to_timestep(sigmas: npt.NDArray[Any], log_schedule: F32) -> F64:
    """The fractional timestep of a noise level, linear in log sigma between neighbours, clamped to the schedule."""
    # The types are kept as they come (float32 schedule, sigmas of either width): diffusers' very numbers follow.
    log_sigma = np.log(np.maximum(sigmas, sigmas.dtype.type(1e-10)))
    low = np.clip(np.searchsorted(log_schedule, log_sigma, side="right") - 1, 0, len(log_schedule) - 2)
    weight = np.clip((log_schedule[low] - log_sigma) / (log_schedule[low] - log_schedule[low + 1]), 0, 1)
    timesteps: F64 = (1 - weight) * low + weight * (low + 1)
    return timesteps


def custom_timesteps(values: Sequence[float], train: int) -> F64:
    """Timesteps of the caller's own choice, checked.

    Raises InputError: none are given, they do not descend, or they leave 0..train - 1.
    """
    timesteps = np.asarray(values, np.float64).ravel()
    if not timesteps.size or (np.diff(timesteps) >= 0).any() or timesteps[0] > train - 1 or timesteps[-1] < 0:
        raise InputError(f"timesteps must descend within {train - 1}..0, got {list(values)!r}")
    return timesteps


def custom_sigmas(values: Sequence[float]) -> F32:
    """Noise levels of the caller's own choice, the final one included, checked.

    Raises InputError: fewer than two, not descending, or negative.
    """
    sigmas = np.asarray(values, np.float32).ravel()
    if sigmas.size < 2 or (np.diff(sigmas) >= 0).any() or sigmas[-1] < 0:
        raise InputError(f"sigmas must be two or more, descend and end at zero or above, got {list(values)!r}")
    return sigmas
