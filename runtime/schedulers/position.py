"""Where a run of the stateful face stands: which call comes next, and what earlier calls left."""

import numpy as np

from anamorph.errors import InputError
from anamorph.schedulers.grids import Grid
from anamorph.schedulers.table import History, Table


class Position:
    """The state between two calls of `step`; `grid` is None before `set_timesteps`."""

    def __init__(self, grid: Grid | None) -> None:
        self.grid = grid
        self.begin: int | None = None
        self.step: int | None = None
        self.first = 0
        self.history: History = ()
        self.tables: dict[float, Table] = {}

    def find(self, grid: Grid, timestep: float) -> int:
        """Place of a timestep in the grid; InputError: it is not there."""
        found = np.flatnonzero(grid.timesteps == timestep)
        if not found.size:
            raise InputError(f"timestep {timestep:g} is none of this run's; pass one of `scheduler.timesteps`")
        # Where a timestep occurs twice, image-to-image means its second call; a run from the start means its first.
        return int(found[1] if found.size > 1 and found[0] else found[0])

    def locate(self, grid: Grid, timestep: float, stateless: bool) -> int:
        """Place of the call at hand; fixes where the run begins when this is its first.

        Raises InputError: the run is over, or another timestep is due.
        """
        if stateless:
            self.step = self.find(grid, timestep)
            return self.step
        if self.step is None:
            self.step = self.find(grid, timestep) if self.begin is None else self.begin
            self.first, self.history, self.tables = self.step, (), {}
        if self.step >= len(grid.timesteps):
            raise InputError(f"all {len(grid.timesteps)} steps are done; call set_timesteps before the next run")
        expected = grid.timesteps[self.step]
        if timestep != expected:
            raise InputError(
                f"step {self.step} belongs to timestep {expected:g}, got {timestep:g}; go through "
                f"`scheduler.timesteps` in order, after set_begin_index when the run starts later"
            )
        return self.step

    def levels(self, grid: Grid, timesteps: list[float]) -> tuple[list[float], list[float]]:
        """alpha and sigma of each timestep, looked up in the grid."""
        if self.begin is None:
            where = [self.find(grid, timestep) for timestep in timesteps]
        else:
            where = [self.begin if self.step is None else self.step] * len(timesteps)
        return grid.alpha[where].tolist(), grid.sigma[where].tolist()
