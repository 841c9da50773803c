"""What adds to the states of a denoiser: ControlNets, called at each step, and adapters, called once per picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from anamorph.arrays import Array, Arrays
from anamorph.conditions import HINT
from anamorph.guessing import guess_scales
from anamorph.pipelines.denoiser import NOTHING, Call, Opened

Added = Callable[[int, Array], Mapping[str, Array]]
"""From the number of a step and its scaled samples [N, C, h, w] to optional inputs of the denoiser, [branches N, ...].

Empty where nothing is added at that step.
"""


class Control(Protocol):
    """One net or adapter with its picture, and how strongly it counts at each step."""

    def prepare(
        self, timesteps: Sequence[float], conditions: Mapping[str, Array], branches: int, arrays: Arrays
    ) -> Added:
        """What it adds under the denoiser's conditions [branches N, ...]; samples and results are `arrays`."""


def total(every: Sequence[Mapping[str, Array]]) -> Mapping[str, Array]:
    """The sum of what several add to each input."""
    sums: dict[str, Array] = {}
    for added in every:
        for name, value in added.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def moved(value: Array, source: Arrays, target: Arrays) -> Array:
    """An array of one engine's kind and place as another's."""
    return value if source.key == target.key else target.put(source.get(value))


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet and what its encoder made of its pictures, `hints` [N, C_0, h, w] for each row of the table.

    `scales` are its weights in each row; where one is 0, the net is not called. `alone`: it sees the most conditioned
    branch only, and adds to no other. `gradual`: it adds little to early states. `told` [1, ...]: what else it is told.
    """

    opened: Opened
    hints: tuple[Array, ...]
    scales: tuple[float, ...]
    alone: bool = False
    gradual: bool = False
    told: Mapping[str, Array] = field(default_factory=dict)

    def prepare(
        self, timesteps: Sequence[float], conditions: Mapping[str, Array], branches: int, arrays: Arrays
    ) -> Added:
        """See `Control.prepare`."""
        own, count = self.opened.arrays, len(self.hints[0])
        asked = 1 if self.alone else branches
        shared = asked if self.opened.shares else 1
        names = [port.name for port in self.opened.interface.outputs]
        weights = dict(zip(names, guess_scales(len(names)) if self.gradual else (1.0,) * len(names), strict=True))

        @cache
        def call() -> Call:  # prepared when it is first in force
            told = {
                name: moved(value[-asked * count :], arrays, own)
                for name, value in conditions.items()
                if name in self.opened.takes
            }
            told |= {name: own.concat([value] * (asked * count)) for name, value in self.told.items()}
            return self.opened.calls(timesteps, told, shared)

        def added(n: int, sample: Array) -> Mapping[str, Array]:
            if not self.scales[n]:
                return NOTHING
            seen, hint = (
                own.concat([one] * (asked // shared)) if asked > shared else one
                for one in (moved(sample, arrays, own), self.hints[n])
            )
            residuals = call()(n, seen, {HINT: hint})
            result = {}
            for name, value in residuals.items():
                weight = self.scales[n] * weights[name]
                weighed = value if weight == 1.0 else weight * value
                if branches > asked:
                    weighed = own.concat([0.0 * weighed] * (branches - asked) + [weighed])
                result[name] = moved(weighed, own, arrays)
            return result

        return added


@dataclass(frozen=True)
class Features:
    """What adapters made of their pictures, weighed and summed, [N, ...]; `own` arrays, added in the first `rows`."""

    values: Mapping[str, Array]
    own: Arrays
    rows: int

    def prepare(
        self, timesteps: Sequence[float], conditions: Mapping[str, Array], branches: int, arrays: Arrays
    ) -> Added:
        """See `Control.prepare`."""
        del timesteps, conditions

        @cache
        def every() -> Mapping[str, Array]:
            moved_once = {name: moved(value, self.own, arrays) for name, value in self.values.items()}
            return {name: arrays.concat([value] * branches) for name, value in moved_once.items()}

        return lambda n, _: every() if n < self.rows else NOTHING
