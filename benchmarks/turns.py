"""Arms of equal work take turns (A B A B ...), each in a fresh process, until all are settled."""

import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anamorph.backends.cores import physical_cores
from anamorph.benchmarks import parity
from anamorph.benchmarks.arms import PEERS, command, form_of
from anamorph.benchmarks.bursts import Begun, burst
from anamorph.benchmarks.environment import disturbed
from anamorph.benchmarks.process import Process
from anamorph.benchmarks.scenarios import Cell
from anamorph.benchmarks.statistics import settled
from anamorph.cache import CACHE
from anamorph.components import CHECKPOINT
from anamorph.errors import AnamorphError, BackendError, InputError
from anamorph.plugins import get_backend

if TYPE_CHECKING:
    from anamorph.benchmarks.runner import Run

UNCOUNTED: dict[str, dict[str, int]] = {"flops": {}, "exponentials": {}}
"""What a cell without a reference has to say of its operations."""
PATIENCE = 2
"""Void bursts for each that counts before a cell is given up."""


class Group:
    """Arms of equal work."""

    def __init__(self, run: "Run", work: Cell, cells: Sequence[Cell]) -> None:
        self.run, self.plan, self.work, self.cells = run, run.scenario.plan, work, list(cells)
        self.spent = dict.fromkeys(self.cells, 0.0)
        self.turns = dict.fromkeys(self.cells, 0)
        self.place = run.work / _digest(work)
        self.checkpoint = parity.checkpoint_of(work.model)
        self.hashes = parity.hashes(work.model)
        self.scheduler = parity.scheduler_config(work, self.checkpoint)
        self.size = parity.sized(work, self.checkpoint)
        for name, steps in (("inputs", work.steps), ("parity", min(work.steps, self.plan.parity_steps))):
            parity.write_inputs(work, self.checkpoint, self.place / name, steps)

    def measure(self) -> None:
        """Turn by turn, until every arm is settled, has failed or has spent its time."""
        self.cells = [cell for cell in self.cells if not self._too_large(cell)]
        counts = self._reference()
        for cell in self.cells:
            self.run.measured(cell).counts = counts
            self.run.add("cell", cell, cell=asdict(cell), **counts, model=self.hashes)
        last = [cell for cell in self.cells if cell.engine in self.plan.last.split(",")]
        first = [cell for cell in self.cells if cell not in last]
        if self.plan.prepare:
            self._prepare(first)
        self._settle(first)
        self._settle(last)

    def _settle(self, cells: Sequence[Cell]) -> None:
        active = [cell for cell in cells if not self._ended(cell)]
        while active:
            for turn in [active] if self.plan.together else [[cell] for cell in active]:
                if (started := time.monotonic()) > self.run.ends:
                    continue
                self._turn(turn)
                for cell in turn:
                    self.turns[cell] += 1
                    self.spent[cell] += (time.monotonic() - started) / len(turn)
            active = [cell for cell in active if not self._ended(cell)]

    def _prepare(self, cells: Sequence[Cell]) -> None:
        """Make the exports that engines need, one on each core; what fails here fails again in its turn."""
        own = [cell for cell in cells if cell.engine not in PEERS]
        exporting = [cell for cell in own if CHECKPOINT not in get_backend(cell.engine).formats]
        firsts = {(cell.engine, cell.static, cell.rewrites, cell.quantize): cell for cell in reversed(exporting)}

        def fill(cell: Cell) -> None:
            with suppress(AnamorphError), self._opened(cell, self._cache(cell)) as (process, _):
                process.ask("run", inputs=str(self.place / "inputs"))

        with ThreadPoolExecutor(physical_cores()) as pool:
            for _ in pool.map(fill, firsts.values()):
                continue

    def _cache(self, cell: Cell) -> Path:
        return self.place / _digest(cell)

    def _too_large(self, cell: Cell) -> bool:
        """Whether a smaller batch of the same arm failed already; that is a row too."""
        for key, other in self.run.result.cells.items():
            if other.failed and replace(other.cell, batch=cell.batch) == cell and other.cell.batch < cell.batch:
                self.run.add("cell", cell, cell=asdict(cell), **UNCOUNTED, model=self.hashes)
                self.run.fail(cell, f"not run: batch {other.cell.batch} failed before ({key})")
                return True
        return False

    def _ended(self, cell: Cell) -> bool:
        measured, plan = self.run.measured(cell), self.plan
        if measured.failed is not None:
            return True
        if time.monotonic() > self.run.ends and not measured.bursts:
            self.run.fail(cell, f"not run: the {plan.total_s:g} s of the scenario were spent")
            return True
        samples = measured.samples()
        if len(samples) >= plan.processes and settled(samples, plan.within):
            why = "interval"
        elif len(samples) >= plan.most or self.turns[cell] >= PATIENCE * plan.most:
            why = "processes"
        elif self.spent[cell] >= plan.seconds or time.monotonic() > self.run.ends:
            why = "budget"
        else:
            return False
        self.run.finish(cell, why)
        return True

    def _reference(self) -> dict[str, dict[str, int]]:
        """What PyTorch eager makes of the inputs in float32, and what it counts; nothing where that cannot run.

        Without rewrites, so that work is that of the published model, whatever an arm saves of it.
        """
        if not self.cells:
            return UNCOUNTED
        out = self.place / "reference"
        cell = replace(self.work, engine="eager", precision="float32", rewrites="none")
        out.mkdir(exist_ok=True)
        try:
            with self._opened(cell, self.place / "reference-cache") as (process, _):
                answer = process.ask("stages", inputs=str(self.place / "parity"), out=str(out))
        except AnamorphError as error:
            self.run.say(f"no reference: {error}")
            shutil.rmtree(out)
            return UNCOUNTED
        counts: dict[str, dict[str, int]] = answer["counts"]
        return {
            kind: {name: count for name, count in stages.items() if name != "picture"}
            for kind, stages in counts.items()
        }

    @contextmanager
    def _opened(self, cell: Cell, cache: Path) -> Iterator[tuple[Process, dict[str, Any]]]:
        """A fresh process that has loaded the cell's model."""
        cache.mkdir(parents=True, exist_ok=True)
        exports = self.run.work / "exports" if self.plan.shared_exports else cache
        threads = physical_cores()
        variables = {
            CACHE: str(exports), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "XDG_CACHE_HOME": str(cache),
            "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        }  # fmt: skip
        folder, export_s = self._folder(cell, exports)
        left = max(1.0, self.run.ends - time.monotonic())
        with Process(command(cell), variables, min(self.plan.timeout_s, left)) as process:
            sized = replace(cell, height=self.size[0], width=self.size[1])
            answer = process.ask("open", cell=asdict(sized), folder=str(folder), threads=threads, cache=str(exports),
                                 scheduler=self.scheduler)  # fmt: skip
            answer["phases"]["import_s"] = process.import_s
            answer["phases"]["export_s"] += export_s
            if answer["precision"] not in (None, cell.precision):
                raise BackendError(f"it runs in {answer['precision']} where {cell.precision} was asked for")
            yield process, answer

    def _folder(self, cell: Cell, exports: Path) -> tuple[Path, float]:
        """What the arm opens, and the seconds that we took to export it for a peer that cannot."""
        if (form := form_of(cell.engine)) is None:
            return self.checkpoint.folder, 0.0
        name = f"portable-{form}-{self.work.scheduler}{self.work.spacing}"
        folder, started = exports / name, time.perf_counter()
        if folder.exists():
            return folder, 0.0
        exporting = [sys.executable, "-P", "-m", "anamorph", "export", str(self.checkpoint.folder), str(folder)]
        done = subprocess.run([*exporting, "--to", form], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendError(f"exporting to {form} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        if self.scheduler:
            # openvino-genai reads no number that JSON does not have, such as -Infinity.
            config = {key: value for key, value in self.scheduler.items() if value not in (None, math.inf, -math.inf)}
            (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder, time.perf_counter() - started

    def _turn(self, cells: Sequence[Cell]) -> None:
        """One process each: load, first picture, warm up, samples; the first turn also compares the stages."""
        with ExitStack() as stack:
            begun: dict[Cell, Begun] = {}
            for cell in cells:
                with self._failing(cell):
                    begun[cell] = self._begin(cell, stack)
            started = time.monotonic()
            foreign, failed = burst(begun, self.plan, self._inputs, self.run.sentinel)
            idle = time.monotonic() - started - sum(one.measured_s for one in begun.values())
            for cell, reason in failed.items():
                self.run.fail(cell, reason)
            for cell in begun.keys() - failed.keys():
                begun[cell].overhead_s += idle / len(begun)
                with self._failing(cell):
                    self._end(cell, begun[cell], foreign)

    @contextmanager
    def _failing(self, cell: Cell) -> Iterator[None]:
        try:
            yield
        except (BackendError, InputError) as error:
            self.run.fail(cell, str(error))

    def _begin(self, cell: Cell, stack: ExitStack) -> Begun:
        warm = (cache := self._cache(cell)).exists()
        if not warm:
            self.run.say(f"{cell.key}: starts for the first time, which may export and compile for minutes")
        elif self.plan.second:
            with self._opened(cell, cache) as (process, _):
                process.ask("run", inputs=self._inputs)
        started = time.monotonic()
        process, opened = stack.enter_context(self._opened(cell, cache))
        answer = process.ask("run", inputs=self._inputs)
        begun = Begun(process, {"cache": "warm" if warm else "cold", **opened, "first": answer["seconds"]}, answer)
        warming = 0.0
        for _ in range(self.plan.warmup):
            begun.answer = process.ask("run", inputs=self._inputs)
            warming += begun.answer["seconds"]["total"]
        worked = sum(opened["phases"].values()) + answer["seconds"]["total"] + warming
        begun.overhead_s = time.monotonic() - started - worked
        return begun

    @property
    def _inputs(self) -> str:
        return str(self.place / "inputs")

    def _end(self, cell: Cell, one: Begun, foreign: float | None) -> None:
        started = time.monotonic()
        if self.run.measured(cell).parity is None:
            self._compare(cell, one.process)
        row = {
            "turn": self.turns[cell], **one.row, "versions": one.process.versions, "samples": one.samples,
            "memory": {key: one.answer[key] for key in ("rss_mib", "pss_mib", "gpu_mib") if key in one.answer},
            "foreign": foreign, "void": disturbed(foreign), "time": now(),
            "overhead_s": one.overhead_s + time.monotonic() - started,
        }  # fmt: skip
        self.run.measured(cell).bursts.append(row)
        self.run.result.weigh(self.work)
        self.run.add("burst", cell, **row)
        self.run.say(_line(cell, row))

    def _compare(self, cell: Cell, process: Process) -> None:
        reference, out = self.place / "reference", self.place / f"stages-{_digest(cell)}"
        if not reference.exists():
            found: dict[str, Any] = {"passed": False, "note": "there is no reference: PyTorch eager could not run"}
        else:
            out.mkdir(exist_ok=True)
            process.ask("stages", inputs=str(self.place / "parity"), out=str(out))
            found = parity.compared(reference, out, cell.precision, cell.near)
            shutil.rmtree(out)
        self.run.measured(cell).parity = found
        self.run.add("parity", cell, **found)


def _line(cell: Cell, row: dict[str, Any]) -> str:
    best = min(sample["total"] for sample in row["samples"])
    note = f"  (void: {row['void']})" if row["void"] else ""
    return f"{cell.key}: {row['cache']}, load {row['phases']['load_s']:.1f} s, fastest {best:.4g} s{note}"


def _digest(cell: Cell) -> str:
    return hashlib.sha256(cell.key.encode()).hexdigest()[:16]


def now() -> str:
    """The time of a record, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
