"""Euler's method in sigma, plain and ancestral, as in k-diffusion: x = x_0 + sigma noise."""

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from anamorph.errors import InputError
from anamorph.schedulers.arrays import Array
from anamorph.schedulers.base import Scheduler
from anamorph.schedulers.configuration import CURVES, FINAL, NOISE, PREDICTIONS, SIGMAS, SPACINGS, clip_of
from anamorph.schedulers.grids import F64, Grid, Request, custom_sigmas, custom_timesteps, sigma_to_timestep, spaced
from anamorph.schedulers.levels import exponential, family, family_sigmas, finite_sigmas
from anamorph.schedulers.noise import F32
from anamorph.schedulers.registry import register
from anamorph.schedulers.solvers import CHURN, Columns, Terms, churned, first_order, rows_of, to_clean
from anamorph.schedulers.table import Clip, Table, Threshold
from anamorph.schedulers.training import velocity


class SigmaLevels(Scheduler):
    """Schedulers whose steps lie on free noise levels sigma; the network sees x / sqrt(1 + sigma^2)."""

    SCALES: ClassVar = True

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.training_sigmas = finite_sigmas(self.alphas_cumprod)

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

    def grid_of(self, timesteps: npt.NDArray[Any], sigmas: F32) -> Grid:
        """The grid with alpha = 1 through these noise levels, of which there is one more than timesteps."""
        levels, ones = sigmas.astype(np.float64), np.ones(len(timesteps))
        return Grid(
            timesteps, ones, levels[:-1], ones, levels[1:], len(timesteps), sigmas, self.start(float(levels.max()))
        )

    def start(self, highest: float) -> float:
        """Standard deviation of the first sample; "leading" does not begin with pure noise."""
        return highest if self.own["timestep_spacing"] in ("linspace", "trailing") else (highest**2 + 1) ** 0.5

    def estimate(self, grid: Grid) -> tuple[F64, F64]:
        """p, q of the clean estimate."""
        return to_clean(self.own["prediction_type"], grid.alpha, grid.sigma)

    @property
    def clip(self) -> Clip | Threshold | None:
        """What the configuration does to the clean estimate."""
        return clip_of(self.own)

    def table_of(
        self,
        grid: Grid,
        steps: Columns | list[Terms],
        draws: npt.NDArray[np.bool_] | bool = False,
        *,
        estimate: tuple[F64, F64] | None = None,
        churn: F64 | float = 0.0,
    ) -> Table:
        """A table of steps in the clean estimate, clipped where the class has such a key."""
        scale = 1 / np.hypot(1.0, grid.sigma)
        rows = rows_of(grid, estimate or self.estimate(grid), steps, scale=scale, draws=draws, churn=churn)
        return Table(rows, grid.timesteps, grid.sigmas, grid.init_noise_sigma, self.clip)


@register
class EulerDiscreteScheduler(SigmaLevels):
    """Euler's method on the probability-flow equation in sigma (Karras et al. 2022, arXiv:2206.00364, alg. 1).

    Noise levels: the training schedule's, interpolated at the timesteps, or one family of `use_*_sigmas`.
    """

    SUMMARY: ClassVar = "plain and predictable; 20 to 50 steps; the default of Stable Diffusion XL"
    DEFAULTS: ClassVar = {
        **NOISE,
        **SIGMAS,
        "prediction_type": "epsilon",
        "interpolation_type": "linear",
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
        "prediction_type": PREDICTIONS,
        "interpolation_type": ("linear", "log_linear"),
        "timestep_spacing": SPACINGS,
        "timestep_type": ("discrete", "continuous"),
        "final_sigmas_type": FINAL,
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

    def solve(self, grid: Grid, **options: float) -> Table:
        """x' = (sigma' / sigma) x + (1 - sigma' / sigma) D, from the level that churning leads to.

        A network of v is read at the level before it, as in diffusers.
        """
        raised, churn = churned(grid, **options)
        a, b, _ = first_order(raised)
        estimate = self.estimate(grid if self.own["prediction_type"] == "v_prediction" else raised)
        return self.table_of(grid, Columns(X=a, D=b), churn > 0, estimate=estimate, churn=churn)

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

    def plan(self, request: Request) -> Grid:
        """The training schedule's levels, interpolated at the timesteps, then zero."""
        places, values = self.levels(request)
        return self.grid_of(places.astype(np.float32), np.append(values, 0.0).astype(np.float32))

    def solve(self, grid: Grid) -> Table:
        """Euler's step with eta = 1."""
        a, b, c = first_order(grid, 1.0)
        return self.table_of(grid, Columns(X=a, D=b, Z=c), draws=True)
