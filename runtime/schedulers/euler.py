"""Euler's method in sigma, plain and ancestral, as in k-diffusion: x = x_0 + sigma noise."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from anamorph.errors import InputError
from anamorph.schedulers.base import CURVES, NOISE, SPACINGS, Scheduler
from anamorph.schedulers.grids import (
    Grid,
    custom_sigmas,
    custom_timesteps,
    family,
    family_sigmas,
    sigma_to_timestep,
    spaced,
)
from anamorph.schedulers.noise import F32, LOWEST, schedule_sigmas
from anamorph.schedulers.registry import register
from anamorph.schedulers.solvers import first_order, rows_of, single, to_clean
from anamorph.schedulers.table import Table


class SigmaLevels(Scheduler):
    """Schedulers whose steps lie on free noise levels sigma; the network sees x / sqrt(1 + sigma^2)."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.training_sigmas = finite_sigmas(self.alphas_cumprod)

    def idle(self) -> Grid:
        """All training timesteps, descending, then zero."""
        timesteps = np.arange(len(self), dtype=np.float32)[::-1]
        return self.grid_of(timesteps, np.append(self.training_sigmas[::-1], np.float32(0)))

    def grid_of(self, timesteps: npt.NDArray[Any], sigmas: F32) -> Grid:
        """The grid with alpha = 1 through these noise levels, of which there is one more than timesteps."""
        levels, ones = sigmas.astype(np.float64), np.ones(len(timesteps))
        highest = float(levels.max())
        spacing = self.config["timestep_spacing"]
        start = highest if spacing in ("linspace", "trailing") else (highest**2 + 1) ** 0.5
        return Grid(timesteps, ones, levels[:-1], ones, levels[1:], len(timesteps), sigmas, start)

    def euler(self, grid: Grid, eta: float) -> Table:
        """x' = (sigma_down / sigma) x + (1 - sigma_down / sigma) D + sigma_up noise; eta = 1 is ancestral, 0 plain."""
        a, b, c = first_order(grid, eta)
        estimate = to_clean(self.config["prediction_type"], grid.alpha, grid.sigma)
        scale = 1 / np.hypot(1.0, grid.sigma)
        rows = rows_of(grid, estimate, (a, single(b), c), scale=scale, draws=eta > 0)
        return Table(rows, grid.timesteps, grid.sigmas, grid.init_noise_sigma)


def finite_sigmas(bar: F32) -> F32:
    """sigma of every training timestep; a level without signal counts as alpha_bar = 2^-24."""
    return schedule_sigmas(np.where(bar > 0, bar, np.float32(LOWEST)))


@register
class EulerDiscreteScheduler(SigmaLevels):
    """Euler's method on the probability-flow equation in sigma (Karras et al. 2022, arXiv:2206.00364, alg. 1).

    Noise levels: the training schedule's, interpolated at the timesteps, or one family of `use_*_sigmas`.
    """

    DEFAULTS: ClassVar = {
        **NOISE,
        "prediction_type": "epsilon",
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "sigma_min": None,
        "sigma_max": None,
        "timestep_spacing": "linspace",
        "timestep_type": "discrete",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
        "final_sigmas_type": "zero",
    }
    ONLY: ClassVar = {
        "beta_schedule": CURVES,
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "interpolation_type": ("linear",),
        "timestep_spacing": SPACINGS,
        "timestep_type": ("discrete", "continuous"),
        "final_sigmas_type": ("zero", "sigma_min"),
    }
    TIMESTEPS: ClassVar = True
    SIGMAS: ClassVar = True

    def plan(self, steps: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> Grid:
        """Levels at the timesteps, or timesteps at the levels; InputError: own timesteps beside a sigma family."""
        log_schedule = np.log(self.training_sigmas)
        if sigmas is not None:
            levels = custom_sigmas(sigmas)
            return self._continuous(sigma_to_timestep(levels[:-1], log_schedule), levels)
        chosen = family(self.config)
        if timesteps is None:
            assert steps is not None
            places = spaced(self.config, steps).astype(np.float32)
        elif chosen or self._by_sigma:
            reason = f"{chosen}=True" if chosen else "timestep_type='continuous'"
            raise InputError(f"timesteps of your own cannot go with {reason}; turn that off or give sigmas")
        else:
            places = custom_timesteps(timesteps, len(self)).astype(np.float32)
        where: npt.NDArray[Any] = places
        values = np.interp(places, np.arange(len(self)), self.training_sigmas)
        if chosen:
            values = family_sigmas(chosen, self.config, values, len(places))
            where = sigma_to_timestep(values, log_schedule)
        final = self.training_sigmas[0] if self.config["final_sigmas_type"] == "sigma_min" else 0.0
        return self._continuous(where, np.append(values, final).astype(np.float32))

    @property
    def _by_sigma(self) -> bool:
        return bool(self.config["timestep_type"] == "continuous" and self.config["prediction_type"] == "v_prediction")

    def _continuous(self, timesteps: npt.NDArray[Any], sigmas: F32) -> Grid:
        """With continuous timesteps the network is told log(sigma) / 4 (arXiv:2206.00364, table 1)."""
        if self._by_sigma:
            timesteps = np.float32(0.25) * np.log(sigmas[:-1])
        return self.grid_of(timesteps.astype(np.float32), sigmas)

    def solve(self, grid: Grid, eta: float) -> Table:
        """Euler's step."""
        return self.euler(grid, eta)


@register
class EulerAncestralDiscreteScheduler(SigmaLevels):
    """Euler's method with ancestral noise: down to sigma_down, then up by sigma_up (k-diffusion)."""

    DEFAULTS: ClassVar = {
        **NOISE,
        "prediction_type": "epsilon",
        "timestep_spacing": "linspace",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    }
    ONLY: ClassVar = {
        "beta_schedule": CURVES,
        "prediction_type": ("epsilon", "v_prediction"),
        "timestep_spacing": SPACINGS,
    }

    def plan(self, steps: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> Grid:
        """The training schedule's levels, interpolated at the timesteps, then zero."""
        del timesteps, sigmas  # refused before
        assert steps is not None
        places = spaced(self.config, steps).astype(np.float32)
        values = np.interp(places, np.arange(len(self)), self.training_sigmas)
        return self.grid_of(places, np.append(values, 0.0).astype(np.float32))

    def solve(self, grid: Grid, eta: float) -> Table:
        """Euler's step with eta = 1."""
        del eta  # refused before
        return self.euler(grid, 1.0)
