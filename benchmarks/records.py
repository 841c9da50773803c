"""Results as they are kept: one JSON object per line, appended and flushed, so that a stopped run can go on.

Every line has `schema` and `kind`:

    run      scenario, its digest and plan, environment, peak rates (see `peak`)
    cell     key and the cell, hashes of its model, `flops` and `exponentials` of each stage as the reference counted
             them
    burst    one process of one arm: cache, phases, placement, precision, versions, samples with their energy and the
             sentinel's seconds before and after, memory, the share of the cores that others took, why it is void, and
             the seconds that the harness took beside the work
    parity   how far each stage is from eager in float32: relative L2, the picture in decibels; `passed`, `note`
    failed   a cell that could not be measured, and its reason
    done     a cell that is finished, and why: interval, budget, processes
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anamorph.benchmarks.environment import drifted
from anamorph.benchmarks.scenarios import Cell
from anamorph.errors import InputError, OutputError

SCHEMA = 1
Row = Mapping[str, Any]


class Journal:
    """The file of a run, which grows line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(path)
            self.file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}; name another file") from None

    def add(self, kind: str, /, **values: Any) -> None:
        """Append a line and hand it to the system."""
        print(json.dumps({"schema": SCHEMA, "kind": kind, **values}), file=self.file, flush=True)


def _drop_torn_line(path: Path) -> None:
    """A run that was killed may have left half a line."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


@dataclass
class Measured:
    """All rows of one cell."""

    cell: Cell
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """flops and exponentials -> stage -> how many the reference counted in one call."""
    bursts: list[Row] = field(default_factory=list)
    parity: Row | None = None
    failed: str | None = None
    done: str | None = None

    usual: float = math.nan
    """The sentinel's usual seconds beside this work, see `Result.weigh`; as long as they are not known, all count."""
    drift: float = 0.0
    """Share by which they may be missed."""

    @property
    def valid(self) -> list[Row]:
        """The bursts that count, each with the samples during which the machine ran at its usual speed."""

        def steady(sample: Row) -> bool:
            return not drifted(sample["sentinel"], self.usual, self.drift)

        counting = (burst for burst in self.bursts if burst["void"] is None)
        kept = [{**burst, "samples": list(filter(steady, burst["samples"]))} for burst in counting]
        return [burst for burst in kept if burst["samples"]]

    @property
    def taken(self) -> int:
        """All samples, also those that do not count."""
        return sum(len(burst["samples"]) for burst in self.bursts)

    def samples(self, phase: str = "total") -> list[list[float]]:
        """Seconds of the work, warm-up left out, by process; of `steps`, each one."""
        return [_phase(burst["samples"], phase) for burst in self.valid]


def _phase(samples: list[Row], phase: str) -> list[float]:
    values = (sample[phase] for sample in samples if sample.get(phase) is not None)
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


@dataclass
class Result:
    """A run as it was read."""

    run: Row
    cells: dict[str, Measured]

    @property
    def environment(self) -> Row:
        """Where it was measured."""
        found: Row = self.run["environment"]
        return found

    def weigh(self, work: Cell) -> None:
        """Take the median of all readings of the sentinel beside this work as the usual one."""
        same = [measured for measured in self.cells.values() if measured.cell.work == work]
        samples = (sample for measured in same for burst in measured.bursts for sample in burst["samples"])
        readings = [reading for sample in samples for reading in sample["sentinel"]]
        for measured in same:
            measured.usual = statistics.median(readings) if readings else math.nan
            measured.drift = self.run["plan"]["drift"]


def read(path: Path) -> Result:
    """Read a result; raises InputError: no such file, not a result, or of a newer schema."""
    rows = list(_rows(path))
    if not rows or rows[0]["kind"] != "run":
        raise InputError(f"{path} does not begin with a run; name a file that `anamorph bench run` wrote")
    result = Result(rows[0], {})
    for row in rows[1:]:
        if row["kind"] == "cell":
            result.cells.setdefault(row["key"], Measured(Cell(**row["cell"])))
            counts = {kind: row[kind] for kind in ("flops", "exponentials") if kind in row}
            result.cells[row["key"]].counts = counts
            continue
        measured = result.cells[row["key"]]
        match row["kind"]:
            case "burst":
                measured.bursts.append(row)
            case "parity":
                measured.parity = row
            case "failed":
                measured.failed = row["reason"]
            case "done":
                measured.done = row["why"]
    for work in {measured.cell.work for measured in result.cells.values()}:
        result.weigh(work)
    return result


def _rows(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            schema = row["schema"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                return  # torn by a kill; the run adds it again
            raise InputError(f"{path}, line {number}, is no line of a result") from None
        if schema != SCHEMA:
            raise InputError(f"{path} has schema {schema!r}, this version reads {SCHEMA}; update anamorph")
        yield row
