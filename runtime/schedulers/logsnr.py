"""Schedulers that step in lambda = log(alpha / sigma): their grids, and the choices that their configurations share."""

from typing import Any, ClassVar

import numpy as np

from anamorph.errors import InputError
from anamorph.schedulers.base import Scheduler
from anamorph.schedulers.configuration import NOISE, PREDICTIONS, SIGMAS, THRESHOLD, Conflict
from anamorph.schedulers.exponential import through_clean
from anamorph.schedulers.grids import (
    F64,
    I64,
    Grid,
    Request,
    custom_timesteps,
    leading,
    sigma_to_timestep,
    trailing,
)
from anamorph.schedulers.levels import family, family_sigmas, shifted
from anamorph.schedulers.noise import F32
from anamorph.schedulers.solvers import Terms, to_noise
from anamorph.schedulers.table import Table

FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0}
SHIFTING = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
MULTISTEP = {**NOISE, **SIGMAS, **THRESHOLD, **FLOW, "prediction_type": "epsilon"}
CALLS = {"timestep_spacing": "linspace", "steps_offset": 0}
SERVED = {"prediction_type": (*PREDICTIONS, "flow_prediction"), "time_shift_type": ("exponential",)}
FIXED = {("variance_type", name): None for name in ("fixed_small", "fixed_small_log", "fixed_large")}
"""DDPM's variances, which other solvers have no use for."""
OLD_SOLVERS = {("solver_type", name): "midpoint" for name in ("logrho", "bh1", "bh2")}


class LogSnr(Scheduler):
    """Levels at whole timesteps, a family of levels, or those of a flow (alpha = 1 - sigma)."""

    ROUNDED: ClassVar[tuple[str, ...]] = ("use_karras_sigmas",)
    """Families whose timesteps are rounded; those of the others are cut off."""
    SECOND: ClassVar = None
    REPEATS: ClassVar[bool] = True
    """A run that does not end at zero ends at its family's last level, which so comes twice."""

    CONFLICTS: ClassVar[tuple[Conflict, ...]] = (
        {"prediction_type": ("v_prediction",), "use_flow_sigmas": (True,)},
        {"prediction_type": ("flow_prediction",), "use_flow_sigmas": (False,)},
        {"use_dynamic_shifting": (True,), "use_flow_sigmas": (False,)},
    )

    def is_clean(self) -> bool:
        """Whether the solver works on estimates of the clean sample; otherwise, of the noise."""
        raise NotImplementedError

    def idle(self) -> Grid:
        """All training timesteps, descending, then zero."""
        timesteps = np.arange(len(self))[::-1]
        return self.grid_of(timesteps, np.append(self.training_sigmas[::-1], np.float32(0)))

    def plan(self, request: Request) -> Grid:
        """Levels at whole timesteps, one family of levels, or a flow's; InputError: own timesteps beside a family."""
        chosen = family(self.own)
        if request.timesteps is not None:
            if chosen:
                raise InputError(f"timesteps of your own cannot go with {chosen}=True; turn that off")
            places = custom_timesteps(request.timesteps, len(self)).astype(np.int64)
        elif chosen == "use_flow_sigmas":
            values = self.flow(request)
            return self.grid_of((values * len(self)).astype(np.int64), self.closed(values))
        else:
            places = self.spaced(request.count)
        if chosen:
            values = family_sigmas(chosen, self.config, self.source, request.count)
            places = self.whole(chosen, sigma_to_timestep(values, np.log(self.training_sigmas)))
        else:
            values = np.interp(places, np.arange(len(self)), self.training_sigmas)
        return self.grid_of(places, self.closed(values))

    @property
    def source(self) -> F32:
        """The training schedule in the order of the run, whose ends are those of a family."""
        return self.training_sigmas[::-1]

    def closed(self, values: F64) -> F32:
        """The levels with the final one, by `final_sigmas_type`; classes without that key end at the lowest."""
        if self.own.get("final_sigmas_type") == "zero":
            final = 0.0
        else:
            final = values[-1] if self.REPEATS and family(self.own) else self.training_sigmas[0]
        return np.append(values, final).astype(np.float32)

    def whole(self, chosen: str, found: F64) -> I64:
        """A family's timesteps as whole numbers."""
        return (found.round() if chosen in self.ROUNDED else found).astype(np.int64)

    def flow(self, request: Request) -> F64:
        """1 - 1/N down to nearly zero, shifted by `flow_shift`, or by e^mu."""
        steps = request.count
        rising = 1 - np.linspace(1, 1 / len(self), steps + 1)
        shift = self.own["flow_shift"] if request.mu is None else float(np.exp(request.mu))
        return shifted(rising, shift)[::-1][:-1]

    def last_timestep(self) -> int:
        """One more than the noisiest timestep whose lambda is above `lambda_min_clipped`."""
        clipped = self.own.get("lambda_min_clipped", -np.inf)
        return len(self) - int(np.searchsorted(-np.log(self.training_sigmas)[::-1], clipped))

    def spaced(self, steps: int) -> I64:
        """Descending whole timesteps: N + 1 points, less the last."""
        last, kind = self.last_timestep(), self.own.get("timestep_spacing")
        if kind == "leading":
            points = leading(last, steps + 1)[::-1][:-1] + self.own["steps_offset"]
        elif kind == "trailing":
            points = trailing(last, len(self) / steps, steps)
        else:
            points = np.linspace(0, last - 1, steps + 1)[::-1][:-1]
        return np.asarray(points.round(), np.int64)

    def grid_of(self, timesteps: I64, sigmas: F32) -> Grid:
        """The grid through these levels, of which there is one more than timesteps."""
        levels = sigmas.astype(np.float64)
        flow = self.own["use_flow_sigmas"]
        alpha = 1 - levels if flow else 1 / np.hypot(1.0, levels)
        sigma = levels if flow else levels * alpha
        return Grid(timesteps, alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], len(timesteps), sigmas)

    def multistep_table(self, grid: Grid, steps: list[Terms], **columns: Any) -> Table:
        """A table of steps in the estimate that the solver works on."""
        if not self.is_clean():
            columns["clean"] = self.estimate(grid)
            if self.clip is None:
                columns["estimate"] = to_noise(self.own["prediction_type"], grid.alpha, grid.sigma)
            else:
                steps = through_clean(steps, grid)
        unused = "unused" if self.own.get("variance_type") is not None else None
        return self.table_of(grid, steps, variance=unused, **columns)

    def check_descent(self, grid: Grid) -> None:
        """Raises InputError: two calls share a noise level, so that a step between them has no length."""
        if (np.diff(grid.sigma / grid.alpha) == 0).any():
            raise InputError(f"two of the {grid.steps} steps share a noise level; ask for fewer steps")
