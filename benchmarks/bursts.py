"""Samples of processes that have warmed up, one alone or several call by call."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anamorph.backends.cores import physical_cores
from anamorph.benchmarks.environment import Sentinel, busy_s, energy_uj
from anamorph.benchmarks.process import Process
from anamorph.benchmarks.scenarios import Cell, Plan
from anamorph.errors import BackendError


@dataclass
class Begun:
    """A process that has warmed up: what is known of it, its last answer and its samples."""

    process: Process
    row: dict[str, Any]
    answer: dict[str, Any]
    samples: list[dict[str, Any]] = field(default_factory=list)
    overhead_s: float = 0.0

    @property
    def measured_s(self) -> float:
        """Seconds that its samples took."""
        return float(sum(sample["total"] for sample in self.samples))


def burst(
    begun: Mapping[Cell, Begun], plan: Plan, inputs: str, sentinel: Sentinel
) -> tuple[float | None, dict[Cell, str]]:
    """Call the arms in turn until each has its samples, with the sentinel between the calls.

    Returns the share of the processor that others took, and why arms failed meanwhile.
    """
    active, failed = dict(begun), dict[Cell, str]()
    busy, own, started = busy_s(), time.process_time(), time.monotonic()
    before = sum(one.answer["cpu_s"] for one in active.values())
    reading, length_s = sentinel.measure(), plan.burst_s * len(active)

    def lacking() -> bool:
        few = any(len(one.samples) < plan.fewest for one in active.values())
        return bool(active) and (few or time.monotonic() - started < length_s)

    while lacking():
        for cell, one in list(active.items()):
            energy = energy_uj()
            try:
                one.answer = one.process.ask("run", inputs=inputs)
            except BackendError as error:
                failed[cell] = str(error)
                del active[cell]
                continue
            joules = None if energy is None or (end := energy_uj()) is None else (end - energy) / 1e6
            last, reading = reading, sentinel.measure()
            one.samples.append({**one.answer["seconds"], "energy_j": joules, "sentinel": [last, reading]})
    if busy is None or (now := busy_s()) is None:
        return None, failed
    ours = sum(one.answer["cpu_s"] for one in begun.values()) - before + time.process_time() - own
    return max(0.0, (now - busy - ours) / (time.monotonic() - started) / physical_cores()), failed
