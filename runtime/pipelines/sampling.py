"""What the denoising loop is told, and what it tells: plans, guidance, steps, checks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from anamorph.arrays import Array, Arrays
from anamorph.engine import Program
from anamorph.errors import InputError, NumericalError
from anamorph.memory import APART
from anamorph.native import takes_branches
from anamorph.noise import NoiseSource
from anamorph.pipelines.controls import Control
from anamorph.pipelines.denoiser import Refresh
from anamorph.schedulers import Table


@dataclass(frozen=True)
class Guidance:
    """How the branches of a batch, from the least conditioned to the most, become one output.

        out = o_0 + sum_k scales_k (o_k+1 - o_k)

    One scale is classifier-free guidance, u + s (c - u) (Ho & Salimans 2022, eq. 6); two are InstructPix2Pix's,
    u + s_i (i - u) + s_t (c - i) (Brooks et al. 2023, eq. 3); without any, the only branch passes unchanged.
    `rescale` in 0..1 mixes in the same output with the deviation of the most conditioned branch,
    r out std(c) / std(out) + (1 - r) out, against overexposure (Lin et al. 2023, arXiv:2305.08891, section 3.4).
    `span` are the first guided row of a table and the first after it that is not; None: all are. `apart`: each branch
    has a call of its own.
    """

    scales: tuple[float, ...] = ()
    rescale: float = 0.0
    span: tuple[int, int] | None = None
    apart: bool = False

    @property
    def branches(self) -> int:
        """How many times each picture is in the denoiser's batch."""
        return len(self.scales) + 1

    @property
    def counts(self) -> tuple[int, ...]:
        """Every number of branches that some call computes."""
        if self.apart:
            return (1,)
        return (self.branches,) if self.span is None else (self.branches, 1)

    def within(self, interval: tuple[float, float] | None, rows: int) -> "Guidance":
        """The same from `start` to `end` of a table alone, 0..1: rows floor(start rows) to floor(end rows) - 1.

        Source: Kynkaanniemi et al. 2024 (arXiv:2404.07724), section 3, with parts of the way instead of noise levels.
        Raises InputError: there is no guidance at all, or none in that interval.
        """
        if interval is None:
            return self
        if not self.scales:
            raise InputError("guidance_interval says when to guide, but this call is not guided; leave it out")
        begin, end = (int(part * rows) for part in interval)
        if begin == end:
            raise InputError(f"guidance_interval {list(interval)} holds none of {rows} steps; widen it")
        return replace(self, span=(begin, end))

    def dealt(self, batch: str) -> "Guidance":
        """The same with all branches in one call (JOINT), or each in its own (APART)."""
        return replace(self, apart=batch == APART and bool(self.scales))

    def at(self, row: int) -> "Guidance":
        """What counts for a row: the same, or the most conditioned branch alone."""
        return self if self.span is None or self.span[0] <= row < self.span[1] else Guidance()

    def combine(self, out: Array) -> Array:
        """[branches * N, ...] -> [N, ...], the least conditioned branch first."""
        if not self.scales:
            return out
        count = out.shape[0] // self.branches
        parts = [out[index * count : (index + 1) * count] for index in range(self.branches)]
        total = parts[0]
        for scale, less, more in zip(self.scales, parts, parts[1:], strict=False):
            total = total + scale * (more - less)
        if not self.rescale:
            return total
        return self.rescale * (total * (_deviation(parts[-1]) / _deviation(total))) + (1 - self.rescale) * total


def _deviation(x: Array) -> Array:
    """Standard deviation of each image, [N, 1, 1, 1], up to a constant factor."""
    axes = tuple(range(1, x.ndim))
    return ((x - x.mean(axes, keepdims=True)) ** 2).mean(axes, keepdims=True) ** 0.5


AfterStep = Callable[[int, Array, Mapping[str, Array]], Array]
"""From the number of the step, the latents that it led to and a plan's `beside` to the latents of the next one."""


@dataclass(frozen=True)
class Plan:
    """Everything that the loop needs, ready before it starts; nothing here changes while it runs.

    Conditions, and the arrays `beside` them, are there for every branch, [branches * N, ...]. Those that are named in
    `joined` are further channels of the latents that the denoiser sees; `after` has the last word on the latents of a
    step, and looks at others. `alike` says whether all branches see the same samples. `controls` add to the denoiser's
    states. `refresh`, where it is given, says when steps are computed in full; `scale` is how
    much adapters (LoRA) count.
    """

    table: Table
    latents: Array
    conditions: Mapping[str, Array]
    guidance: Guidance
    noise: NoiseSource
    beside: Mapping[str, Array] = field(default_factory=dict)
    joined: tuple[str, ...] = ()
    after: AfterStep | None = None
    alike: bool = True
    controls: tuple[Control, ...] = ()
    refresh: Refresh | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Step:
    """What the loop hands out after each call of the denoiser; `conditions` are also the arrays beside them."""

    index: int
    total: int
    timestep: float
    latents: Array
    conditions: Mapping[str, Array]


@dataclass(frozen=True)
class Changes:
    """What a caller may put in place before the next step."""

    latents: Array | None = None
    conditions: Mapping[str, Array] = field(default_factory=dict)


class FiniteCheck:
    """Finds the first component and step that returned NaN or infinity.

    On a host the answer is there at once; on a device asking would stop the queue, so that answers are collected
    and read when the loop ends.
    """

    def __init__(self, arrays: Arrays, part: str, engine: str) -> None:
        self.arrays, self.part, self.engine = arrays, part, engine
        self.pending: list[tuple[str, Any]] = []

    @classmethod
    def of(cls, program: Program) -> "FiniteCheck":
        """For the results of one opened part."""
        return cls(program.arrays, program.placement.part, program.placement.engine)

    def add(self, value: Array, where: str) -> None:
        """Look at a result; raises NumericalError."""
        self.pending.append((where, self.arrays.finite(value)))
        if not self.arrays.asynchronous:
            self.settle()

    def add_now(self, value: Array, where: str) -> None:
        """Look at a result and wait for the answer; raises NumericalError."""
        self.add(value, where)
        self.settle()

    def settle(self) -> None:
        """Read all answers that are still open; raises NumericalError."""
        for where, finite in self.pending:
            if not finite:
                raise NumericalError(
                    f"{self.part} returned NaN or infinity at {where} on engine {self.engine}; try precision float32, "
                    "or check the checkpoint's weights"
                )
        self.pending.clear()


def check_axes(
    program: Program, branches: int, images: int, sides: Mapping[str, int], what: str, alike: bool = True
) -> None:
    """Raise InputError before anything runs where a denoiser was exported for other sizes than those of a call."""
    axes = program.interface.axes
    shared = alike and takes_branches(program.interface)
    batch = {"batch": images, "branches": branches} if shared else {"batch": branches * images, "branches": 1}
    sizes = {**batch, **sides}
    for name in (name for name in sizes if name in axes):
        if (refusal := axes[name].refusal(sizes[name])) is not None:
            raise InputError(f"the opened {program.interface.component} cannot draw {what}: {refusal}")
