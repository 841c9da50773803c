"""Solvers of k-diffusion beyond Euler's: Heun, LMS, and the two-stage DPM-Solver-2 in three forms.

All work in sigma with x = x_0 + sigma noise (Karras et al. 2022, arXiv:2206.00364).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from anamorph.errors import InputError
from anamorph.schedulers.configuration import CURVES, K_NOISE, LINSPACE, NO_SAMPLE, NOISE, SIGMAS
from anamorph.schedulers.euler import SigmaLevels
from anamorph.schedulers.exponential import lagrange, through_clean
from anamorph.schedulers.grids import F64, Grid, Request, sigma_to_timestep
from anamorph.schedulers.registry import register
from anamorph.schedulers.solvers import Columns, Terms, first_order, to_noise
from anamorph.schedulers.table import Table


def two_stage_grid(
    scheduler: SigmaLevels, places: npt.NDArray[Any], values: F64, middle: F64, between: npt.NDArray[Any]
) -> Grid:
    """Two calls per step, at `values` and then at `middle`; one in the last step, which ends at zero.

    `places` and `between` are their timesteps; of the middles, the last is never called.
    """
    count = len(places)
    calls = np.stack([places, between], 1).ravel()[: 2 * count - 1]
    levels = np.stack([values, middle], 1).ravel()[: 2 * count - 1].astype(np.float32).astype(np.float64)
    ones = np.ones(len(calls))
    # diffusers shows each level but the ends twice.
    shown = np.repeat(np.append(values, 0.0), 2)[1:-1].astype(np.float32) if count > 1 else np.append(values, 0.0)
    return Grid(
        calls, ones, levels, ones, np.append(levels[1:], 0.0), count, shown.astype(np.float32),
        scheduler.start(float(np.float32(values.max()))),
    )  # fmt: skip


def two_stage_steps(grid: Grid, second: Callable[[int, float, float], Terms]) -> list[Terms]:
    """Euler's step to each middle level, then `second(n, sigma, sigma')` from the sample of call n; D are slopes."""
    steps = Columns(X=1.0, D=grid.sigma_next - grid.sigma).terms(len(grid.sigma))
    for n in range(0, len(steps) - 1, 2):
        steps[n + 1] = {("X", n): 1.0} | second(n, float(grid.sigma[n]), float(grid.sigma_next[n + 1]))
    return steps


def slope_table(scheduler: SigmaLevels, grid: Grid, steps: list[Terms], draws: Any = False) -> Table:
    """A table of steps whose D are the slopes (x - D) / sigma; clipping acts on the clean sample all the same."""
    clean, clip = scheduler.estimate(grid), scheduler.clip
    slope = to_noise(scheduler.own["prediction_type"], grid.alpha, grid.sigma)
    if clip is not None:
        steps, slope = through_clean(steps, grid), clean
    return scheduler.table_of(grid, steps, draws=draws, estimate=slope, clean=clean)


@register
class HeunDiscreteScheduler(SigmaLevels):
    """Heun's method: an Euler step, then the mean of the slopes at both ends (arXiv:2206.00364, alg. 1)."""

    SUMMARY: ClassVar = "second order at two calls per step; the most faithful at 15 to 30 steps"
    DEFAULTS: ClassVar = {**K_NOISE, **SIGMAS, **LINSPACE, "clip_sample": False, "clip_sample_range": 1.0}
    ONLY: ClassVar = {"beta_schedule": (*CURVES, "exp")}
    TAKES: ClassVar = ("timesteps",)
    order: ClassVar = 2

    def plan(self, request: Request) -> Grid:
        """The second call of a step stands where the next step begins."""
        places, values = self.levels(request)
        places = places.astype(np.float32)
        return two_stage_grid(self, places, values, np.append(values[1:], 0.0), np.append(places[1:], np.float32(0)))

    def solve(self, grid: Grid) -> Table:
        """x' = x + (sigma' - sigma) (d + d') / 2 with the slopes d = (x - D) / sigma of both calls."""

        def second(n: int, sigma: float, after: float) -> Terms:
            return {("D", n): (after - sigma) / 2, ("D", n + 1): (after - sigma) / 2}

        return slope_table(self, grid, two_stage_steps(grid, second))


@register
class LMSDiscreteScheduler(SigmaLevels):
    """Linear multistep: slopes (x - D) / sigma, integrated as a polynomial in sigma (k-diffusion); 4 by `order`."""

    SUMMARY: ClassVar = "fourth-order multistep at one call per step; good from 30 steps on"
    DEFAULTS: ClassVar = {**NOISE, **SIGMAS, **LINSPACE}
    OPTIONS: ClassVar = {"order": 4}

    def plan(self, request: Request) -> Grid:
        """The training schedule's levels or a family's, then zero."""
        places, values = self.levels(request)
        return self.grid_of(places.astype(np.float32), np.append(values, 0.0).astype(np.float32))

    def solve(self, grid: Grid, order: int) -> Table:
        """x' = x + sum_i w_i S_n-i with the slopes S, w_i the integral of the Lagrange polynomial of level i."""
        if order < 1:
            raise InputError(f"order is {order}, expected 1 or more")
        steps: list[Terms] = []
        for n, (start, end) in enumerate(zip(grid.sigma.tolist(), grid.sigma_next.tolist(), strict=True)):
            calls = [n - i for i in range(min(n + 1, order))]
            w = lagrange([float(grid.sigma[k]) for k in calls], start, end)
            steps.append({("X", n): 1.0} | {("D", k): weight for k, weight in zip(calls, w, strict=True)})
        return slope_table(self, grid, steps)


class _MiddleLevels(SigmaLevels):
    """DPM-Solver-2's grid: a second call between the levels, at their geometric mean."""

    def plan(self, request: Request) -> Grid:
        """Timesteps of Karras' levels are rounded, those of the middles never."""
        places, values = self.levels(request)
        if self.own["use_karras_sigmas"]:
            places = places.round()
        levels = np.append(values, 0.0).astype(np.float32).astype(np.float64)
        middle = np.sqrt(levels[:-1] * self.target(levels))
        between = sigma_to_timestep(middle.astype(np.float32), np.log(self.training_sigmas))
        return two_stage_grid(self, places, values, middle, between.astype(places.dtype))

    def target(self, levels: F64) -> F64:
        """The level that the second call's step leads to."""
        return levels[1:]


@register
class KDPM2DiscreteScheduler(_MiddleLevels):
    """DPM-Solver-2: the slope at the geometric mean of both levels (arXiv:2206.00927, alg. 1; k-diffusion's form)."""

    SUMMARY: ClassVar = "midpoint method at two calls per step; like Heun, a little sharper"
    DEFAULTS: ClassVar = {**K_NOISE, **SIGMAS, **LINSPACE}
    ONLY: ClassVar = NO_SAMPLE
    order: ClassVar = 2

    def solve(self, grid: Grid) -> Table:
        """x' = x + (sigma' - sigma) d, d = (x_m - D_m) / sigma_m at the middle."""

        def second(n: int, sigma: float, after: float) -> Terms:
            return {("D", n + 1): after - sigma}

        return slope_table(self, grid, two_stage_steps(grid, second))


def ancestral(sigma: float, after: float) -> tuple[float, float]:
    """sigma_down and sigma_up with down^2 + up^2 = after^2: the posterior of a step (arXiv:2006.11239, eq. 7)."""
    up = min(after, after * (1 - (after / sigma) ** 2) ** 0.5)
    return (after**2 - up**2) ** 0.5, up


@register
class KDPM2AncestralDiscreteScheduler(_MiddleLevels):
    """DPM-Solver-2 down to sigma_down, then noise up by sigma_up (k-diffusion)."""

    SUMMARY: ClassVar = "the midpoint method with ancestral noise: detail and variety at two calls per step"
    DEFAULTS: ClassVar = {**K_NOISE, **SIGMAS, **LINSPACE}
    ONLY: ClassVar = NO_SAMPLE
    order: ClassVar = 2

    def target(self, levels: F64) -> F64:
        """sigma_down of each step."""
        pairs = zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True)
        return np.array([ancestral(sigma, after)[0] for sigma, after in pairs])

    def solve(self, grid: Grid) -> Table:
        """x' = x + (sigma_down - sigma) d + sigma_up noise; noise is drawn in the second call."""

        def second(n: int, sigma: float, after: float) -> Terms:
            down, up = ancestral(sigma, after)
            return {("D", n + 1): down - sigma, ("Z", n + 1): up}

        return slope_table(self, grid, two_stage_steps(grid, second), np.arange(len(grid.timesteps)) % 2 == 1)


@register
class DPMSolverSDEScheduler(_MiddleLevels):
    """DPM-Solver-2 for the stochastic equation (k-diffusion), driven by one Brownian path W over sigma.

    Both calls of a step add noise in proportion to increments of W that start at the same level, so that they share
    a part: with z_1 over sigma..sigma_m and z_2 over sigma_m..sigma', both standard normal and independent,

        W(sigma..sigma') / sqrt(sigma - sigma') = (sqrt(sigma - sigma_m) z_1 + sqrt(sigma_m - sigma') z_2)
                                                  / sqrt(sigma - sigma')

    which is an exact path of Brownian motion without a tree. Noise comes from the run's generator.
    """

    SUMMARY: ClassVar = "stochastic, two calls per step; rich texture, slow but steady from 20 steps"
    DEFAULTS: ClassVar = {**K_NOISE, **SIGMAS, **LINSPACE, "noise_sampler_seed": None}
    ONLY: ClassVar = NO_SAMPLE
    OPTIONS: ClassVar = {"s_noise": 1.0}
    order: ClassVar = 2

    def plan(self, request: Request) -> Grid:
        """As its parent's, but no timestep is rounded, and all are of double precision."""
        places, values = self.levels(request)
        middle = np.sqrt(values * np.append(values[1:], values[-1:]))
        between = sigma_to_timestep(middle, np.log(self.training_sigmas))
        return two_stage_grid(self, places.astype(np.float64), values, middle, between)

    def solve(self, grid: Grid, s_noise: float) -> Table:
        """x' = (down / sigma) x + (1 - down / sigma) D + s_noise up W, first to the middle, then with D found there."""
        a, b, _ = first_order(grid)
        steps = Columns(X=a, D=b).terms(len(a))
        for n in range(0, len(steps) - 1, 2):
            sigma, middle, after = float(grid.sigma[n]), float(grid.sigma[n + 1]), float(grid.sigma_next[n + 1])
            down, up = ancestral(sigma, middle)
            steps[n] = {("X", n): down / sigma, ("D", n): 1 - down / sigma, ("Z", n): s_noise * up}
            down, up = ancestral(sigma, after)
            shared = s_noise * up * ((sigma - middle) / (sigma - after)) ** 0.5
            own = s_noise * up * ((middle - after) / (sigma - after)) ** 0.5
            steps[n + 1] = {
                ("X", n): down / sigma, ("D", n + 1): 1 - down / sigma, ("Z", n): shared, ("Z", n + 1): own,
            }  # fmt: skip
        return self.table_of(grid, steps, draws=np.arange(len(steps)) < len(steps) - 1)
