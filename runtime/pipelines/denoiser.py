"""What predicts in the loop: told once what a picture is of, and called at each step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Protocol

import numpy as np

from anamorph.arrays import Array, Arrays
from anamorph.engine import Program, Session
from anamorph.errors import InputError
from anamorph.interface import Interface
from anamorph.native import CACHING, DEEP, in_steps, is_branched, takes_branches
from anamorph.stepping import WEIGHTS

WINDOW = 64
"""Steps whose time projections are held at a time; SDXL's take 3.5 MB for each picture and branch."""

NOTHING: Mapping[str, Array] = MappingProxyType({})


class Predict(Protocol):
    """What predicts at each step."""

    def __call__(self, n: int, sample: Array, added: Mapping[str, Array] = NOTHING) -> Array:
        """From the number of a step and its scaled samples [M, C, ...] to predictions [branches M, C_out, ...].

        `added` are optional inputs, [branches M, ...].
        """


class Call(Protocol):
    """What computes every output at each step."""

    def __call__(
        self, n: int, sample: Array, added: Mapping[str, Array] = NOTHING, own: Mapping[str, Array] = NOTHING
    ) -> dict[str, Array]:
        """The same as `Predict`, with all outputs, [branches M, ...]; `own` are inputs that no branch has apart."""


Refresh = int | float
"""When a call is computed in full where steps are cached: every so many steps, or, below 1, whenever the samples have
changed by that part since (sums of absolute values)."""


class Denoiser(Protocol):
    """One or several models behind the loop."""

    @property
    def arrays(self) -> Arrays:
        """The kind of array that it takes and returns."""

    @property
    def engine(self) -> str:
        """The engine that runs it, or several, for errors."""

    @property
    def shares(self) -> bool:
        """Whether branches that see the same sample may share it."""

    def prepare(
        self, timesteps: Sequence[float], conditions: Mapping[str, Array], branches: int, refresh: Refresh | None = None
    ) -> Predict:
        """What predicts under these conditions, [branches M, ...], at these steps.

        More than one branch shares each sample only where it `shares`. With `refresh`, steps between take what lies
        deep in the model from the last full one.
        Raises InputError: it cannot do so.
        """


@dataclass(frozen=True)
class _Kept:
    """What a full step leaves for those after it: its number, its samples, and the state deep in the model."""

    step: int
    sample: Array
    deep: Array

    def is_stale(self, n: int, sample: Array, refresh: Refresh) -> bool:
        """Whether step n is to be computed in full."""
        if refresh >= 1:
            return n - self.step >= refresh
        changed, norm = (float(abs(each).sum()) for each in (sample - self.sample, self.sample))
        return changed > refresh * norm


@dataclass(frozen=True)
class Opened:
    """A denoiser that an engine opened: the part that steps, and perhaps one that prepares what it takes, and one that
    computes its last layer alone."""

    step: Session
    interface: Interface
    arrays: Arrays
    engine: str
    once: Session | None = None
    prepares: Interface | None = None
    last: Session | None = None
    ends: Interface | None = None

    @classmethod
    def of(cls, step: Program, once: Program | None = None, last: Program | None = None) -> "Opened":
        """Sessions of its programs for one thread."""
        beside = [(None, None) if one is None else (one.session(), one.interface) for one in (once, last)]
        return cls(step.session(), step.interface, step.arrays, step.placement.engine, *beside[0], *beside[1])

    @property
    def shares(self) -> bool:
        """See `Denoiser.shares`."""
        return takes_branches(self.interface)

    @property
    def goes_on(self) -> bool:
        """Whether its graph computes the next samples from the scheduler's row; see `anamorph.stepping`."""
        return any(port.name == WEIGHTS for port in self.interface.inputs)

    @property
    def takes(self) -> frozenset[str]:
        """Names of all inputs of the part that steps, and of the one that prepares."""
        ports = (*self.interface.inputs, *(() if self.prepares is None else self.prepares.inputs))
        return frozenset(port.name for port in ports)

    def prepare(
        self, timesteps: Sequence[float], conditions: Mapping[str, Array], branches: int, refresh: Refresh | None = None
    ) -> Predict:
        """See `Denoiser.prepare`."""
        if self.goes_on:
            raise InputError(
                f"{self.interface.component} computes the next samples itself; draw whole pictures with it"
            )
        call = self.calls(timesteps, conditions, branches, refresh)
        return lambda n, sample, added=NOTHING: call(n, sample, added)["out_sample"]

    def calls(
        self, timesteps: Sequence[float], conditions: Mapping[str, Array], branches: int, refresh: Refresh | None = None
    ) -> Call:
        """The same with all outputs; long schedules are prepared in windows, so that memory does not grow with them."""
        takes = {port.name: is_branched(port) for port in self.interface.inputs}
        rows = () if self.prepares is None else {port.name for port in self.prepares.outputs if in_steps(port)}

        def dealt(name: str, value: Array) -> Array:
            return value.reshape(branches, -1, *value.shape[1:]) if takes.get(name) else value

        @lru_cache(maxsize=1)
        def told(window: int) -> dict[str, Array]:
            part = timesteps[window * WINDOW : (window + 1) * WINDOW]
            given = self._told(part, conditions)
            return {name: value if name in rows else dealt(name, value) for name, value in given.items()}

        def inputs(n: int, sample: Array, added: Mapping[str, Array]) -> dict[str, Array]:
            window, index = divmod(n, WINDOW)
            every = told(window).items()
            given = {name: dealt(name, value[index]) if name in rows else value for name, value in every}
            if "timestep" in takes:
                given["timestep"] = self.arrays.put(np.array(timesteps[n], np.float32))
            # What is the same for every branch enters as often as the samples do.
            more = {name: dealt(name, value) if takes[name] else value[: len(sample)] for name, value in added.items()}
            return {"sample": sample, **given, **more}

        step = self._cached(refresh) if refresh is not None else lambda _, given: self.step(given)

        apart = {port.name for port in self.interface.outputs if is_branched(port)}

        def call(
            n: int, sample: Array, added: Mapping[str, Array] = NOTHING, own: Mapping[str, Array] = NOTHING
        ) -> dict[str, Array]:
            outputs = step(n, {**inputs(n, sample, added), **own})
            return {name: out.reshape(-1, *out.shape[2:]) if name in apart else out for name, out in outputs.items()}

        return call

    def _cached(self, refresh: Refresh) -> Callable[[int, Mapping[str, Array]], dict[str, Array]]:
        """A step that computes the last layer alone, with what lay deep in the last full one, until `refresh`."""
        step, last = self.step, self.last
        if last is None or self.ends is None:
            raise InputError(
                f"{self.interface.component} cannot cache steps: it was exported or opened without the rewrite "
                f"{CACHING}; name it among the rewrites"
            )
        taken = {port.name for port in self.ends.inputs}
        kept: list[_Kept] = []

        def call(n: int, inputs: Mapping[str, Array]) -> dict[str, Array]:
            sample = inputs["sample"]
            if not kept or kept[0].is_stale(n, sample, refresh):
                out = step(inputs)
                kept[:] = [_Kept(n, sample, out[DEEP])]
                return out
            return last({**{name: value for name, value in inputs.items() if name in taken}, DEEP: kept[0].deep})

        return call

    def _told(self, timesteps: Sequence[float], conditions: Mapping[str, Array]) -> dict[str, Array]:
        """What no step changes: what is prepared, and those conditions that the other part takes."""
        if self.once is None or self.prepares is None:
            return dict(conditions)
        taken = {port.name for port in self.interface.inputs}
        asked = {port.name for port in self.prepares.inputs}
        left = {name: value for name, value in conditions.items() if name in taken or name not in asked}
        every = {"timesteps": self.arrays.put(np.array(timesteps, np.float32)), **conditions}
        return {**left, **self.once({name: value for name, value in every.items() if name in asked})}


def branch_by_branch(
    denoiser: Denoiser,
    timesteps: Sequence[float],
    conditions: Mapping[str, Array],
    branches: int,
    refresh: Refresh | None = None,
) -> Predict:
    """What predicts like `Denoiser.prepare`, from samples for every branch, by a call of the denoiser for each."""

    def dealt(values: Mapping[str, Array]) -> list[dict[str, Array]]:
        parts = {name: len(value) // branches for name, value in values.items()}
        return [
            {name: value[index * parts[name] : (index + 1) * parts[name]] for name, value in values.items()}
            for index in range(branches)
        ]

    every = [denoiser.prepare(timesteps, told, 1, refresh) for told in dealt(conditions)]

    def predict(n: int, sample: Array, added: Mapping[str, Array] = NOTHING) -> Array:
        samples = [one["sample"] for one in dealt({"sample": sample})]
        calls = zip(every, samples, dealt(added), strict=True)
        return denoiser.arrays.concat([one(n, seen, more) for one, seen, more in calls])

    return predict
