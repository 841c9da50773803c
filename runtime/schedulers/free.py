"""Schedulers on free noise levels, x = x_0 + sigma noise: what they share."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from anamorph.schedulers.base import Scheduler
from anamorph.schedulers.grids import F64, Grid
from anamorph.schedulers.noise import F32
from anamorph.schedulers.solvers import Columns, churned, first_order
from anamorph.schedulers.table import Table


class FreeLevels(Scheduler):
    """The network sees c_in x with c_in = 1 / sqrt(sigma^2 + sigma_data^2); sigma_data is 1 where no key says."""

    SCALES: ClassVar = True

    def grid_of(self, timesteps: npt.NDArray[Any], sigmas: F32, start: float) -> Grid:
        """The grid with alpha = 1 through these levels, of which there is one more than timesteps.

        `start` is the standard deviation of the first sample.
        """
        levels, ones = sigmas.astype(np.float64), np.ones(len(timesteps))
        return Grid(timesteps, ones, levels[:-1], ones, levels[1:], len(timesteps), sigmas, start)

    def scale(self, grid: Grid) -> F64:
        """c_in of every call."""
        return np.asarray(1 / np.hypot(grid.sigma, self.own.get("sigma_data", 1.0)))

    def euler(self, grid: Grid, churn: Mapping[str, float], estimate: tuple[F64, F64] | None = None) -> Table:
        """x' = (sigma' / sigma) x + (1 - sigma' / sigma) D, from the levels that churning leads to.

        The output is read at those levels unless `estimate` says otherwise.
        """
        raised, added = churned(grid, **churn)
        a, b, _ = first_order(raised)
        return self.table_of(
            grid, Columns(X=a, D=b), estimate=estimate or self.estimate(raised), draws=added > 0, churn=added
        )
