"""Where a run of the stateful face stands: which call comes next, and what earlier calls left."""

from collections.abc import Mapping, Sequence
from typing import Any

from anamorph.errors import InputError
from anamorph.schedulers.grids import Grid
from anamorph.schedulers.table import History, Table


class Places:
    """Finds timesteps in a list of them."""

    def __init__(self, timesteps: Sequence[float]) -> None:
        self.found: dict[float, list[int]] = {}
        for place, timestep in enumerate(timesteps):
            self.found.setdefault(timestep, []).append(place)

    def find(self, timestep: float) -> int:
        """Place of a timestep; InputError: it is not there."""
        found = self.found.get(timestep)
        if found is None:
            raise InputError(f"timestep {timestep:g} is none of this run's; pass one of `scheduler.timesteps`")
        # Where a timestep occurs twice, image-to-image means its second call; a run from the start means its first.
        return found[1] if len(found) > 1 and found[0] else found[0]


class Position:
    """The state between two calls of `step`; `grid` is None before `set_timesteps`, `levels` never."""

    def __init__(self, grid: Grid | None) -> None:
        self.grid = grid
        self.begin: int | None = None
        self.step: int | None = None
        self.first = 0
        self.history: History = ()
        self.tables: dict[tuple[int, tuple[tuple[str, Any], ...]], Table] = {}
        self.table: Table | None = None  # the latest, and its options
        self.options: Mapping[str, Any] = {}
        self.timesteps: list[float] = [] if grid is None else grid.timesteps.tolist()
        self.places = Places(self.timesteps)

    def locate(self, timestep: float, stateless: bool) -> int:
        """Place of the call at hand; fixes where the run begins when this is its first.

        Raises InputError: the run is over, or another timestep is due.
        """
        if stateless:
            self.step = self.places.find(timestep)
            return self.step
        if self.step is None:
            self.step = self.places.find(timestep) if self.begin is None else self.begin
            self.first, self.history, self.table = self.step, (), None
        if self.step >= len(self.timesteps):
            raise InputError(f"all {len(self.timesteps)} steps are done; call set_timesteps before the next run")
        expected = self.timesteps[self.step]
        if timestep != expected:
            raise InputError(
                f"step {self.step} belongs to timestep {expected:g}, got {timestep:g}; go through "
                f"`scheduler.timesteps` in order, after set_begin_index when the run starts later"
            )
        return self.step
