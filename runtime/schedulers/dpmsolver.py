"""DPM-Solver and DPM-Solver++ in all their forms: multistep, inverse, single-step."""

from typing import ClassVar

import numpy as np

from anamorph.config import Config
from anamorph.schedulers.exponential import Points, dpm_step, points_of
from anamorph.schedulers.grids import F64, I64, Grid, leading, trailing
from anamorph.schedulers.levels import family
from anamorph.schedulers.logsnr import CALLS, FIXED, MULTISTEP, OLD_SOLVERS, SERVED, SHIFTING, LogSnr
from anamorph.schedulers.noise import F32
from anamorph.schedulers.registry import register
from anamorph.schedulers.solvers import Terms
from anamorph.schedulers.table import Table

FEW_STEPS = 15
"""Below this number of steps, `lower_order_final` takes effect."""

NO_STEP = 1e-5
"""A last step this short in lambda is of order 1: some families of levels already end at sigma_min."""

SOLVER = {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}


def multistep_orders(config: Config, grid: Grid, h_last: float) -> list[int]:
    """The order of each step: it rises from 1 as the history fills, and falls at the end where the keys say so."""
    few = config["lower_order_final"] and grid.steps < FEW_STEPS
    orders = [min(n + 1, config["solver_order"]) for n in range(len(grid.timesteps))]
    if few and len(orders) > 1:
        orders[-2] = min(orders[-2], 2)
    if few or config.get("euler_at_final") or config.get("final_sigmas_type") == "zero" or abs(h_last) < NO_STEP:
        orders[-1] = 1
    return orders


def multistep(config: Config, grid: Grid, points: Points) -> list[Terms]:
    """Steps of the multistep method (arXiv:2211.01095, alg. 2), of the orders above.

    The third order takes the second divided difference for D'', which is half of it: so do the authors' code and
    diffusers, and pictures made with them.
    """
    algorithm, halved = config["algorithm_type"], config["solver_type"] == "midpoint"
    orders = multistep_orders(config, grid, points.lam[-1] - points.lam[-2])
    return [
        dpm_step(
            algorithm, points, n, n + 1, range(n - 1, n - order, -1), halved=halved and order == 2, bend=1.0
        )
        for n, order in enumerate(orders)
    ]  # fmt: skip


@register
class DPMSolverMultistepScheduler(LogSnr):
    """DPM-Solver++ of order 1 to 3 (Lu et al. 2022, arXiv:2211.01095, alg. 2), and its relatives by `algorithm_type`.

    The order rises from 1 as the history fills. It falls again at the end: to 1 in the last step with
    `euler_at_final`, `final_sigmas_type="zero"`, or below 15 steps `lower_order_final`, which also caps the step
    before at 2.
    """

    SUMMARY: ClassVar = "the usual choice for speed: good from 15 steps; algorithm_type='sde-dpmsolver++' adds texture"
    DEFAULTS: ClassVar = {
        **MULTISTEP,
        **SOLVER,
        **CALLS,
        **SHIFTING,
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
        "rescale_betas_zero_snr": False,
    }
    ONLY: ClassVar = {
        **SERVED,
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
    }
    CONFLICTS: ClassVar = (
        *LogSnr.CONFLICTS,
        {"algorithm_type": ("dpmsolver", "sde-dpmsolver"), "final_sigmas_type": ("zero",)},
        {"algorithm_type": ("sde-dpmsolver",), "solver_order": (3,)},
    )
    TRANSLATE: ClassVar = {("algorithm_type", "deis"): "dpmsolver++", **OLD_SOLVERS, **FIXED}
    TAKES: ClassVar[tuple[str, ...]] = ("timesteps",)
    WIDE_NOISE: ClassVar = True
    REPEATS: ClassVar = False
    ROUNDED: ClassVar[tuple[str, ...]] = ("use_karras_sigmas", "use_lu_lambdas")

    def is_clean(self) -> bool:
        """The "++" algorithms work on the clean sample, the others on the noise."""
        return bool(self.own["algorithm_type"].endswith("++"))

    def whole(self, chosen: str, found: F64) -> I64:
        """As its parent's; with the cosine schedule, timesteps are never rounded."""
        if self.own["beta_schedule"] == "squaredcos_cap_v2":
            return found.astype(np.int64)
        return super().whole(chosen, found)

    def solve(self, grid: Grid) -> Table:
        """Rows with as many past estimates as the order of each step needs."""
        self.check_descent(grid)
        steps = multistep(self.own, grid, points_of(grid))
        return self.multistep_table(grid, steps, draws=self.own["algorithm_type"].startswith("sde-"))


@register
class DPMSolverMultistepInverseScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver backwards: from a picture to the noise that gives it, levels ascending (arXiv:2211.01095, alg. 2)."""

    SUMMARY: ClassVar = "runs DPM-Solver backwards: finds the noise behind a given picture in few steps"
    DEFAULTS: ClassVar = {
        **MULTISTEP,
        **SOLVER,
        **CALLS,
        "lower_order_final": True,
        "euler_at_final": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    }
    ONLY: ClassVar = {
        **SERVED,
        "algorithm_type": ("dpmsolver++", "dpmsolver"),  # no noise is added on the way to more of it
        "use_flow_sigmas": (False,),
    }
    TAKES: ClassVar = ()
    WIDE_NOISE: ClassVar = False
    ROUNDED: ClassVar = ("use_karras_sigmas",)

    def idle(self) -> Grid:
        """All training timesteps, ascending."""
        return self.grid_of(np.arange(len(self)), np.append(self.training_sigmas, self.training_sigmas[-1]))

    @property
    def source(self) -> F32:
        """Ascending."""
        return self.training_sigmas

    def whole(self, chosen: str, found: F64) -> I64:
        """Rounded for Karras' levels, also with the cosine schedule."""
        return LogSnr.whole(self, chosen, found)

    def closed(self, values: F64) -> F32:
        """The levels and then the noisiest one, which a family of levels has reached already."""
        final = values[-1] if family(self.own) else self.training_sigmas[self.last_timestep() - 1]
        return np.append(values, final).astype(np.float32)

    def spaced(self, steps: int) -> I64:
        """Ascending whole timesteps: N + 1 points, less the last."""
        last, kind = self.last_timestep(), self.own["timestep_spacing"]
        if kind == "leading":
            points = leading(last, steps + 1)[:-1] + self.own["steps_offset"]
        elif kind == "trailing":
            points = trailing(last, len(self) / steps, steps)[::-1]
        else:
            points = np.linspace(0, last - 1, steps + 1)[:-1]
        return np.asarray(points.round(), np.int64)


def singlestep_orders(config: Config, steps: int) -> list[int]:
    """The order of each call: 1, 2, .. up to `solver_order`, again and again, cut short at the end.

    The end is also cut short where the number of steps is no multiple, or where it ends without noise.
    """
    order = config["solver_order"]
    zero = config["final_sigmas_type"] == "zero"
    orders = [1 + n % order for n in range(steps)]
    if config["lower_order_final"] or steps % order or zero:
        orders[-1] = 1 if order == 3 and steps % 3 == 0 else orders[-1]
        if order == 2 and steps % 2 == 0:
            orders[-1] = 1
    if zero:
        orders[-1] = 1
    return orders


@register
class DPMSolverSinglestepScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver++ in groups of calls: those after the first of a group start again from the group's own sample.

    (arXiv:2206.00927, alg. 1 and 2; arXiv:2211.01095, alg. 1.) Each call leads on by itself, too, as in diffusers.
    """

    SUMMARY: ClassVar = "DPM-Solver without long memory: for strong guidance where multistep is unsteady"
    DEFAULTS: ClassVar = {
        **MULTISTEP,
        **SOLVER,
        **SHIFTING,
        "lower_order_final": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    }
    ONLY: ClassVar = {**SERVED, "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver")}
    WIDE_NOISE: ClassVar = False
    ROUNDED: ClassVar = ("use_karras_sigmas",)

    def whole(self, chosen: str, found: F64) -> I64:
        """Rounded for Karras' levels, also with the cosine schedule."""
        return LogSnr.whole(self, chosen, found)

    def solve(self, grid: Grid) -> Table:
        """Rows whose step starts from the first sample of the group."""
        self.check_descent(grid)
        points, algorithm = points_of(grid), self.own["algorithm_type"]
        halved = self.own["solver_type"] == "midpoint"
        steps: list[Terms] = []
        for n, wanted in enumerate(singlestep_orders(self.own, grid.steps)[grid.first :]):
            order = min(wanted, n + 1)  # a run that starts late has fewer estimates
            base, bend = n - order + 1, 0.0 if halved else 2.0
            others = range(base + 1, n + 1)
            steps.append(dpm_step(algorithm, points, base, n + 1, others, halved=halved and order == 2, bend=bend))
        return self.multistep_table(grid, steps, draws=algorithm.startswith("sde-"))
