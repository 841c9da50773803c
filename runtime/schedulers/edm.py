"""Schedulers of the EDM family: free noise levels without a training schedule, and preconditioned networks.

Karras et al. 2022, arXiv:2206.00364, table 1: with s the noise level and d = sigma_data,

    D = d^2 / (s^2 + d^2) x + s d / sqrt(s^2 + d^2) out,   the network sees x / sqrt(s^2 + d^2) and log(s) / 4
"""

from typing import Any, ClassVar

import numpy as np

from anamorph.errors import InputError
from anamorph.schedulers.arrays import Array, numbers
from anamorph.schedulers.configuration import NO_SAMPLE, THRESHOLD
from anamorph.schedulers.dpmsolver import SOLVER, multistep
from anamorph.schedulers.exponential import points_of
from anamorph.schedulers.free import FreeLevels
from anamorph.schedulers.grids import F64, Grid, Request, custom_timesteps
from anamorph.schedulers.levels import exponential, karras
from anamorph.schedulers.logsnr import OLD_SOLVERS
from anamorph.schedulers.registry import register
from anamorph.schedulers.solvers import CHURN, Columns
from anamorph.schedulers.table import Clip, StepOutput, Table

PRECONDITIONED = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "num_train_timesteps": 1000,
    "rho": 7.0,
}


class Karras(FreeLevels):
    """Noise levels between sigma_max and sigma_min."""

    def idle(self) -> Grid:
        """As many levels as the configuration counts training timesteps."""
        return self.plan(Request(len(self)))


class Preconditioned(Karras):
    """The grids of both EDM solvers."""

    def plan(self, request: Request) -> Grid:
        """Levels of Karras et al. or equidistant in log sigma; the network is told log(s) / 4.

        `sigmas` of one's own are places 0..1 among Karras' levels, as in diffusers.
        Raises InputError: they do not ascend within 0..1, or the levels are not Karras'.
        """
        high, low, steps = self.own["sigma_max"], self.own["sigma_min"], request.count
        places = np.linspace(0, 1, steps) if request.sigmas is None else np.array(numbers(request.sigmas))
        if self.own["sigma_schedule"] == "karras":
            if not places.size or (np.diff(places) <= 0).any() or places[0] < 0 or places[-1] > 1:
                raise InputError(f"sigmas are places among Karras' levels and must ascend within 0..1, got {places}")
            levels = karras(high, low, places, self.own["rho"])
        elif request.sigmas is not None:
            raise InputError("sigmas of your own are places among Karras' levels; use sigma_schedule='karras'")
        else:
            levels = exponential(low, high, steps)[::-1]  # a single one is the lowest
        timesteps = np.float32(0.25) * np.log(levels.astype(np.float32))
        final = 0.0 if self.own["final_sigmas_type"] == "zero" else self.last(levels)
        return self.grid_of(timesteps, np.append(levels, final).astype(np.float32), (high**2 + 1) ** 0.5)

    def last(self, levels: F64) -> float:
        """The final level where it is not zero."""
        return float(levels[-1])

    def estimate(self, grid: Grid) -> tuple[F64, F64]:
        """c_skip, c_out; a network of v has the opposite sign."""
        d, sign = self.own["sigma_data"], -1.0 if self.own["prediction_type"] == "v_prediction" else 1.0
        square = grid.sigma**2 + d**2
        return d**2 / square, sign * grid.sigma * d / np.sqrt(square)


KEYS = {**PRECONDITIONED, "sigma_schedule": "karras", "prediction_type": "epsilon", "final_sigmas_type": "zero"}


@register
class EDMEulerScheduler(Preconditioned):
    """Euler's method for preconditioned networks (arXiv:2206.00364, alg. 1, first half)."""

    SUMMARY: ClassVar = "Euler for models trained in the EDM way (Playground 2.5); 20 to 50 steps"
    DEFAULTS: ClassVar = KEYS
    ONLY: ClassVar = NO_SAMPLE
    TAKES: ClassVar = ("sigmas",)
    OPTIONS: ClassVar = {**CHURN, "told": False}

    def solve(self, grid: Grid, told: bool, **churn: float) -> Table:
        """Euler's step; `told` says that D is given."""
        return self.euler(grid, churn, (np.zeros_like(grid.sigma), np.ones_like(grid.sigma)) if told else None)

    def step_told(
        self, model_output: Array, timestep: Any, sample: Array, clean: Array | None, **options: Any
    ) -> StepOutput | tuple[Array, ...]:
        """A step for those who compute D, `pred_original_sample`, themselves."""
        return self.step(model_output if clean is None else clean, timestep, sample, told=clean is not None, **options)

    INPUTS: ClassVar = {"pred_original_sample": step_told}


@register
class EDMDPMSolverMultistepScheduler(Preconditioned):
    """DPM-Solver++ of order 1 to 3 for preconditioned networks (arXiv:2211.01095, alg. 2, with alpha = 1)."""

    SUMMARY: ClassVar = "DPM-Solver++ for models trained in the EDM way; good from 15 steps"
    DEFAULTS: ClassVar = {**KEYS, **THRESHOLD, **SOLVER, "lower_order_final": True, "euler_at_final": False}
    ONLY: ClassVar = {**NO_SAMPLE, "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")}
    CONFLICTS: ClassVar = ({"algorithm_type": ("sde-dpmsolver++",), "solver_order": (3,)},)
    TRANSLATE: ClassVar = {("algorithm_type", "deis"): "dpmsolver++", **OLD_SOLVERS}
    SECOND: ClassVar = None

    def last(self, levels: F64) -> float:
        """The configuration's lowest."""
        del levels
        return float(self.own["sigma_min"])

    def solve(self, grid: Grid) -> Table:
        """Rows with as many past estimates as the order of each step needs."""
        steps = multistep(self.own, grid, points_of(grid))
        return self.table_of(grid, steps, draws=self.own["algorithm_type"].startswith("sde-"))


@register
class CMStochasticIterativeScheduler(Karras):
    """Consistency models: a jump to the clean sample, then noise of the next level (arXiv:2303.01469, alg. 1).

    D = d^2 / ((s - s_min)^2 + d^2) x + (s - s_min) d / sqrt(s^2 + d^2) out (eq. 5), which is x itself at s_min.
    """

    SUMMARY: ClassVar = "only for consistency models: one to four steps"
    DEFAULTS: ClassVar = {**PRECONDITIONED, "num_train_timesteps": 40, "s_noise": 1.0, "clip_denoised": True}
    TAKES: ClassVar = ("timesteps",)
    SECOND: ClassVar = None

    def plan(self, request: Request) -> Grid:
        """Levels at whole places among num_train_timesteps of Karras'; the network is told 250 log(s)."""
        train = len(self)
        if request.timesteps is not None:
            places = custom_timesteps(request.timesteps, train)
        else:
            self.at_most(request.count, train, "num_train_timesteps")
            places = (np.arange(request.count) * (train // request.count))[::-1].astype(np.float64)
        high, low = self.own["sigma_max"], self.own["sigma_min"]
        levels = karras(high, low, places[::-1] / max(train - 1, 1), self.own["rho"])
        return self.grid_of(250 * np.log(levels), np.append(levels, low).astype(np.float32), high)

    def solve(self, grid: Grid) -> Table:
        """x' = clip(D) + s_noise sqrt(s'^2 - s_min^2) noise."""
        d, low = self.own["sigma_data"], self.own["sigma_min"]
        above = grid.sigma - low
        estimate = d**2 / (above**2 + d**2), above * d / np.hypot(grid.sigma, d)
        after = np.clip(grid.sigma_next, low, self.own["sigma_max"])
        noisy = grid.steps > 1  # a single step is the jump alone
        c = noisy * self.own["s_noise"] * np.sqrt(np.clip(after**2 - low**2, 0, None))
        return self.table_of(grid, Columns(D=1.0, Z=c), draws=noisy, estimate=estimate)

    @property
    def clip(self) -> Clip | None:
        """By `clip_denoised`."""
        return Clip(1.0) if self.own["clip_denoised"] else None
