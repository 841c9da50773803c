"""Euler's method in sigma, plain and ancestral, as in k-diffusion: x = x_0 + sigma noise."""

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from anamorph.errors import InputError
from anamorph.schedulers.arrays import Array
from anamorph.schedulers.configuration import LINSPACE, NO_SAMPLE, NOISE, SIGMAS
from anamorph.schedulers.free import FreeLevels
from anamorph.schedulers.grids import F64, Grid, Request, custom_sigmas, custom_timesteps, sigma_to_timestep, spaced
from anamorph.schedulers.levels import exponential, family, family_sigmas
from anamorph.schedulers.noise import F32
from anamorph.schedulers.registry import register
from anamorph.schedulers.solvers import CHURN, Columns, first_order
from anamorph.schedulers.table import Table
from anamorph.schedulers.training import velocity


class SigmaLevels(FreeLevels):
    """Schedulers whose steps lie on free noise levels sigma; the network sees x / sqrt(1 + sigma^2)."""

    def idle(self) -> Grid:
        """All training timesteps, descending, then zero."""
        timesteps = np.arange(len(self), dtype=np.float32)[::-1]
        return self.grid_of(timesteps, np.append(self.training_sigmas[::-1], np.float32(0)))

    def levels(self, request: Request) -> tuple[npt.NDArray[Any], F64]:
        """Timesteps and noise levels of a request, descending, without the final one.

        The schedule's levels, interpolated at the timesteps, or one family of `use_*_sigmas` and its timesteps.
        Raises InputError: timesteps of one's own beside a family.
        """
        chosen = family(self.own)
        if request.timesteps is None:
            places = spaced(self.own, request.count).astype(np.float32)
        elif chosen:
            raise InputError(f"timesteps of your own cannot go with {chosen}=True; turn that off or give sigmas")
        else:
            places = custom_timesteps(request.timesteps, len(self)).astype(np.float32)
        values = self.interpolated(places)
        if not chosen:
            return places, values
        values = family_sigmas(chosen, self.config, values, len(places))
        return sigma_to_timestep(values, np.log(self.training_sigmas)), values

    def interpolated(self, places: F32) -> F64:
        """The training schedule's noise levels between its timesteps."""
        return np.interp(places, np.arange(len(self)), self.training_sigmas)

    def grid_of(self, timesteps: npt.NDArray[Any], sigmas: F32, start: float | None = None) -> Grid:
        """The grid through these levels, by default started at the highest."""
        return super().grid_of(timesteps, sigmas, self.start(float(sigmas.max())) if start is None else start)

    def start(self, highest: float) -> float:
        """Standard deviation of the first sample; "leading" does not begin with pure noise."""
        return highest if self.own["timestep_spacing"] in ("linspace", "trailing") else (highest**2 + 1) ** 0.5


@register
class EulerDiscreteScheduler(SigmaLevels):
    """Euler's method on the probability-flow equation in sigma (Karras et al. 2022, arXiv:2206.00364, alg. 1).

    Noise levels: the training schedule's, interpolated at the timesteps, or one family of `use_*_sigmas`.
    """

    SUMMARY: ClassVar = "plain and predictable; 20 to 50 steps; the default of Stable Diffusion XL"
    DEFAULTS: ClassVar = {
        **NOISE,
        **SIGMAS,
        **LINSPACE,
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "rescale_betas_zero_snr": False,
        "final_sigmas_type": "zero",
    }
    TAKES: ClassVar = ("timesteps", "sigmas")
    OPTIONS: ClassVar = CHURN

    def plan(self, request: Request) -> Grid:
        """Levels at the timesteps, or timesteps at the levels; InputError: own timesteps beside a sigma family."""
        if request.sigmas is not None:
            levels = custom_sigmas(request.sigmas)
            return self._continuous(sigma_to_timestep(levels[:-1], np.log(self.training_sigmas)), levels)
        if self._by_sigma and request.timesteps is not None:
            raise InputError("timesteps of your own cannot go with timestep_type='continuous'; give sigmas")
        places, values = self.levels(request)
        if len(values) == len(places):
            final = self.training_sigmas[0] if self.own["final_sigmas_type"] == "sigma_min" else 0.0
            values = np.append(values, final)
        return self._continuous(places, values.astype(np.float32))

    def interpolated(self, places: F32) -> F64:
        """With "log_linear", the whole schedule equidistant in log sigma, the last level taking the final one's place.

        That is diffusers' reading, under which such a run ends at the schedule's lowest level.
        """
        if self.own["interpolation_type"] == "linear":
            return super().interpolated(places)
        return exponential(self.training_sigmas[-1].item(), self.training_sigmas[0].item(), len(places) + 1)

    @property
    def _by_sigma(self) -> bool:
        return bool(self.own["timestep_type"] == "continuous" and self.own["prediction_type"] == "v_prediction")

    def _continuous(self, timesteps: npt.NDArray[Any], sigmas: F32) -> Grid:
        """With continuous timesteps the network is told log(sigma) / 4 (arXiv:2206.00364, table 1)."""
        if self._by_sigma:
            timesteps = np.float32(0.25) * np.log(sigmas[:-1])
        return self.grid_of(timesteps.astype(np.float32), sigmas)

    def solve(self, grid: Grid, **churn: float) -> Table:
        """Euler's step; a network of v is read at the level before churning, as in diffusers."""
        return self.euler(grid, churn, self.estimate(grid) if self.own["prediction_type"] == "v_prediction" else None)

    def get_velocity(self, sample: Array, noise: Array, timesteps: Any) -> Array:
        """v = alpha noise - sigma sample at training timesteps, see `velocity`."""
        return velocity(self.alphas_cumprod, sample, noise, timesteps)


@register
class EulerAncestralDiscreteScheduler(SigmaLevels):
    """Euler's method with ancestral noise: down to sigma_down, then up by sigma_up (k-diffusion).

    x' = (sigma_down / sigma) x + (1 - sigma_down / sigma) D + sigma_up noise.
    """

    SUMMARY: ClassVar = "lively pictures that change with the number of steps; 20 to 40 steps"
    DEFAULTS: ClassVar = {
        **NOISE,
        **LINSPACE,
        "rescale_betas_zero_snr": False,
    }
    ONLY: ClassVar = NO_SAMPLE

    def plan(self, request: Request) -> Grid:
        """The training schedule's levels, interpolated at the timesteps, then zero."""
        places, values = self.levels(request)
        return self.grid_of(places.astype(np.float32), np.append(values, 0.0).astype(np.float32))

    def solve(self, grid: Grid) -> Table:
        """Euler's step with eta = 1."""
        a, b, c = first_order(grid, 1.0)
        return self.table_of(grid, Columns(X=a, D=b, Z=c), draws=True)
