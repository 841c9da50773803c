"""Running a scenario: one result file, begun or continued, group by group of arms."""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anamorph.benchmarks.environment import Sentinel, environment, fingerprint
from anamorph.benchmarks.process import run_python
from anamorph.benchmarks.records import Journal, Measured, Result, read
from anamorph.benchmarks.scenarios import Cell, Scenario
from anamorph.benchmarks.turns import Group, now
from anamorph.errors import InputError

Say = Callable[[str], None]


class Run:
    """One result file, begun or continued.

    Raises InputError: the file belongs to another scenario, or to another machine or set of packages.
    """

    def __init__(self, scenario: Scenario, out: Path, say: Say) -> None:
        self.scenario, self.say = scenario, say
        self.work = out.with_name(f"{out.name}.work").absolute()
        self.ends = time.monotonic() + scenario.plan.total_s
        known = out.exists() and out.stat().st_size > 0
        values = environment()
        if known:
            _same(read(out), scenario, values, out)
        self.journal = Journal(out)
        if not known:
            found = run_python("anamorph.benchmarks.peak")
            self.journal.add(
                "run", scenario=scenario.name, digest=scenario.digest, plan=asdict(scenario.plan),
                environment={**values, "torch_build": found["torch_build"]}, peak=found["peak"], time=now(),
            )  # fmt: skip
        self.result = read(out)
        self.sentinel = Sentinel()

    def all(self) -> Result:
        """Measure what is not measured yet, and remove the caches at the end."""
        for work in dict.fromkeys(cell.work for cell in self.scenario.cells):
            cells = [cell for cell in self.scenario.cells if cell.work == work]
            todo = [cell for cell in cells if not self._finished(cell)]
            if todo:
                Group(self, work, todo).measure()
        shutil.rmtree(self.work, ignore_errors=True)
        return self.result

    def measured(self, cell: Cell) -> Measured:
        """The rows of a cell so far."""
        return self.result.cells.setdefault(cell.key, Measured(cell))

    def add(self, kind: str, cell: Cell, /, **values: Any) -> None:
        """Keep a row of a cell."""
        self.journal.add(kind, key=cell.key, **values)

    def fail(self, cell: Cell, reason: str) -> None:
        """A failure is a row."""
        self.measured(cell).failed = reason
        self.add("failed", cell, reason=reason)
        self.say(f"{cell.key}: failed: {reason}")

    def finish(self, cell: Cell, why: str) -> None:
        """Nothing more is measured of this cell."""
        self.measured(cell).done = why
        self.add("done", cell, why=why)

    def _finished(self, cell: Cell) -> bool:
        known = self.result.cells.get(cell.key)
        return known is not None and (known.done or known.failed) is not None


def _same(known: Result, scenario: Scenario, values: dict[str, Any], out: Path) -> None:
    if known.run["digest"] != scenario.digest:
        raise InputError(f"{out} holds another scenario ({known.run['scenario']}); name another file with --out")
    before, now = fingerprint(known.environment), fingerprint(values)
    if changed := [key for key in now if before[key] != now[key]]:
        raise InputError(f"{out} was begun with other {', '.join(changed)}; name another file with --out")
