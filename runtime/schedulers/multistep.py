"""DEIS, UniPC and SA-Solver: multistep methods in lambda, the last two with a corrector."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from anamorph.config import Config
from anamorph.errors import ConfigError, InputError
from anamorph.schedulers.dpmsolver import multistep_orders
from anamorph.schedulers.exponential import deis_step, points_of, sa_step, unipc_step
from anamorph.schedulers.grids import F64, Grid, Request
from anamorph.schedulers.levels import shifted, shifted_for_size, stretched
from anamorph.schedulers.logsnr import CALLS, FIXED, MULTISTEP, SERVED, SHIFTING, LogSnr
from anamorph.schedulers.registry import register
from anamorph.schedulers.solvers import Terms
from anamorph.schedulers.table import Table


@register
class DEISMultistepScheduler(LogSnr):
    """DEIS of order 1 to 3 with polynomials in log rho (Zhang & Chen 2023, arXiv:2204.13902, section 3)."""

    SUMMARY: ClassVar = "multistep in the noise estimate; close to DPM-Solver, good from 15 steps"
    DEFAULTS: ClassVar = {
        **MULTISTEP,
        **CALLS,
        **SHIFTING,
        "solver_order": 2,
        "algorithm_type": "deis",
        "solver_type": "logrho",
        "lower_order_final": True,
    }
    ONLY: ClassVar = {**SERVED, "algorithm_type": ("deis",), "solver_type": ("logrho",)}
    TRANSLATE: ClassVar = {
        **{("algorithm_type", name): "deis" for name in ("dpmsolver", "dpmsolver++")},
        **{("solver_type", name): "logrho" for name in ("midpoint", "heun", "bh1", "bh2")},
    }

    def is_clean(self) -> bool:
        """Never."""
        return False

    def solve(self, grid: Grid) -> Table:
        """Rows with as many past estimates as the order of each step needs."""
        self.check_descent(grid)
        points = points_of(grid)
        orders = multistep_orders(self.own, grid, points.lam[-1] - points.lam[-2])
        return self.multistep_table(grid, [deis_step(points, n, order) for n, order in enumerate(orders)])


@register
class UniPCMultistepScheduler(LogSnr):
    """UniPC of order 1 to 3: a predictor, and a corrector that uses the next estimate (arXiv:2302.04867, alg. 5).

    The corrector mends the sample that the previous step left, before the next predictor starts from it;
    `disable_corrector` lists the steps after which it does not.
    """

    SUMMARY: ClassVar = "predictor and corrector at one call per step: the best at 5 to 15 steps"
    DEFAULTS: ClassVar = {
        **MULTISTEP,
        **CALLS,
        **SHIFTING,
        "solver_order": 2,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "final_sigmas_type": "zero",
        "rescale_betas_zero_snr": False,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    }
    ONLY: ClassVar = {**SERVED, "solver_type": ("bh1", "bh2"), "time_shift_type": ("exponential", "linear")}
    CONFLICTS: ClassVar = (
        *LogSnr.CONFLICTS,
        {"predict_x0": (False,), "final_sigmas_type": ("zero",)},
        {"predict_x0": (False,), "thresholding": (True,)},
        {"lower_order_final": (False,), "final_sigmas_type": ("zero",), "solver_order": (2, 3)},
    )

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        """Also refuses a shift of the last level where it has no meaning."""
        full = super().complete(config)
        if full["shift_terminal"] is not None and not full["use_flow_sigmas"]:
            raise ConfigError(f"{cls.__name__}: shift_terminal needs use_flow_sigmas=True")
        return full

    TRANSLATE: ClassVar = {("solver_type", name): "bh2" for name in ("midpoint", "heun", "logrho")}
    TAKES: ClassVar = ("sigmas",)

    def is_clean(self) -> bool:
        """By `predict_x0`."""
        return bool(self.own["predict_x0"])

    def plan(self, request: Request) -> Grid:
        """As its parent's; a flow also takes levels of one's own."""
        if request.sigmas is not None and not self.own["use_flow_sigmas"]:
            raise InputError("UniPCMultistepScheduler takes sigmas of your own only with use_flow_sigmas=True")
        return super().plan(request)

    def flow(self, request: Request) -> F64:
        """1 down to 1/N, or the levels given, shifted; the first is kept off 1, where no signal is left."""
        if request.sigmas is not None:
            values = np.asarray(request.sigmas, np.float64)
        else:
            values = np.linspace(1, 1 / len(self), request.count + 1)[:-1]
        if request.mu is not None:
            values = shifted_for_size(values, request.mu, self.own["time_shift_type"])
        else:
            values = shifted(values, self.own["flow_shift"])
        if self.own["shift_terminal"]:
            values = stretched(values, self.own["shift_terminal"])
        if abs(values[0] - 1) < 1e-6:
            values[0] -= 1e-6
        return values

    def solve(self, grid: Grid) -> Table:
        """Rows that first correct and then predict; the order rises from 1 and falls to 1 at the end."""
        self.check_descent(grid)
        points, count = points_of(grid), len(grid.timesteps)
        clean, kind = self.own["predict_x0"], self.own["solver_type"]
        steps: list[Terms] = []
        fixes: list[Terms] = [{}]
        for n in range(count):
            order = min(self.own["solver_order"], n + 1)
            if self.own["lower_order_final"]:
                order = min(order, count - n)
            if order > 1 and points.lam[n + 1] == points.lam[n]:
                raise ConfigError(
                    "UniPCMultistepScheduler: the last step has no length under this family of levels with "
                    "final_sigmas_type='sigma_min'; set lower_order_final=True"
                )
            past = [n - i for i in range(1, order)]
            steps.append(unipc_step(points, n, past, clean, kind))
            if grid.first + n in self.own["disable_corrector"] or n + 1 == count:
                fixes.append({})
            else:
                fixes.append(unipc_step(points, n, [*past, n + 1], clean, kind))
        return self.multistep_table(grid, steps, fixes=fixes[:count])


def middle_half(timestep: float) -> float:
    """1 within timesteps 200..800, else 0: how much noise SA-Solver adds (arXiv:2309.05019, appendix E)."""
    return 1.0 if 200 <= timestep <= 800 else 0.0


@register
class SASolverScheduler(LogSnr):
    """SA-Solver: stochastic Adams, a predictor and a corrector of order 1 to 4 (Xue et al. 2023, arXiv:2309.05019).

    `tau_func(timestep)` says how much of the noise is renewed: 0 is deterministic, 1 the usual stochastic equation.
    """

    SUMMARY: ClassVar = "stochastic predictor and corrector; clean detail at 20 and more steps"
    DEFAULTS: ClassVar = {
        **MULTISTEP,
        **CALLS,
        "predictor_order": 2,
        "corrector_order": 2,
        "tau_func": None,
        "algorithm_type": "data_prediction",
        "lower_order_final": True,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    }
    ONLY: ClassVar = {
        **SERVED,
        "predictor_order": (1, 2, 3, 4),
        "corrector_order": (1, 2, 3, 4),
        "algorithm_type": ("data_prediction", "noise_prediction"),
    }
    CONFLICTS: ClassVar = (
        *LogSnr.CONFLICTS,
        {"algorithm_type": ("noise_prediction",), "thresholding": (True,)},
    )
    TRANSLATE: ClassVar = {
        **{("algorithm_type", name): "data_prediction" for name in ("dpmsolver++", "sde-dpmsolver++")},
        **{("algorithm_type", name): "noise_prediction" for name in ("dpmsolver", "sde-dpmsolver", "deis")},
        **FIXED,
    }

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        """Also refuses a tau_func that is no function."""
        full = super().complete(config)
        if full["tau_func"] is not None and not callable(full["tau_func"]):
            raise ConfigError(f"{cls.__name__}: tau_func={full['tau_func']!r}, expected a function or None")
        return full

    def is_clean(self) -> bool:
        """By `algorithm_type`."""
        return bool(self.own["algorithm_type"] == "data_prediction")

    def solve(self, grid: Grid) -> Table:
        """Rows that first correct, with the noise of the step before, and then predict with noise of their own."""
        self.check_descent(grid)
        points, count, clean = points_of(grid), len(grid.timesteps), self.is_clean()
        predictor, corrector = self.own["predictor_order"], self.own["corrector_order"]
        tau_of: Callable[[float], float] = self.own["tau_func"] or middle_half
        steps: list[Terms] = []
        fixes: list[Terms] = [{}]
        known = max(predictor, corrector - 1)  # estimates that diffusers remembers
        for n in range(count):
            tau = float(tau_of(grid.timesteps[n].item()))
            left = count - n if self.own["lower_order_final"] else count + known
            order = min(predictor, left, n + 1)
            steps.append(sa_step(points, n, [n - i for i in range(order)], tau, clean))
            if n + 1 == count:
                break
            order = min(corrector, left + 1, min(n, known) + 2)
            fixes.append(sa_step(points, n, [n + 1 - i for i in range(order)], tau, clean))
        return self.multistep_table(grid, steps, fixes=fixes, draws=True)
