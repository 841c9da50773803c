"""Schedulers on free noise levels, x = x_0 + sigma noise: what they share."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from anamorph.schedulers.base import Scheduler
from anamorph.schedulers.configuration import clip_of
from anamorph.schedulers.grids import F64, Grid
from anamorph.schedulers.noise import F32
from anamorph.schedulers.solvers import Columns, Terms, churned, first_order, rows_of
from anamorph.schedulers.table import Clip, Table, Threshold


class FreeLevels(Scheduler):
    """The network sees c_in x with c_in = 1 / sqrt(sigma^2 + sigma_data^2); sigma_data is 1 where no key says."""

    SCALES: ClassVar = True

    def grid_of(self, timesteps: npt.NDArray[Any], sigmas: F32, start: float) -> Grid:
        """The grid with alpha = 1 through these levels, of which there is one more than timesteps.

        `start` is the standard deviation of the first sample.
        """
        levels, ones = sigmas.astype(np.float64), np.ones(len(timesteps))
        return Grid(timesteps, ones, levels[:-1], ones, levels[1:], len(timesteps), sigmas, start)

    def estimate(self, grid: Grid) -> tuple[F64, F64]:
        """p, q of the clean estimate."""
        raise NotImplementedError

    def scale(self, grid: Grid) -> F64:
        """c_in of every call."""
        return np.asarray(1 / np.hypot(grid.sigma, self.own.get("sigma_data", 1.0)))

    @property
    def clip(self) -> Clip | Threshold | None:
        """What the configuration does to the clean estimate."""
        return clip_of(self.own)

    def table_of(
        self, grid: Grid, steps: Columns | list[Terms], draws: npt.NDArray[np.bool_] | bool = False, **columns: Any
    ) -> Table:
        """A table of steps in the clean estimate; for `columns` see `rows_of`."""
        estimate = columns.pop("estimate", None) or self.estimate(grid)
        rows = rows_of(grid, estimate, steps, scale=self.scale(grid), draws=draws, **columns)
        return Table(rows, grid.timesteps, grid.sigmas, grid.init_noise_sigma, self.clip)

    def euler(self, grid: Grid, churn: Mapping[str, float], estimate: tuple[F64, F64] | None = None) -> Table:
        """x' = (sigma' / sigma) x + (1 - sigma' / sigma) D, from the levels that churning leads to.

        The output is read at those levels unless `estimate` says otherwise.
        """
        raised, added = churned(grid, **churn)
        a, b, _ = first_order(raised)
        estimate = estimate or self.estimate(raised)
        return self.table_of(grid, Columns(X=a, D=b), added > 0, estimate=estimate, churn=added)
