"""`anamorph bench`: what the command line's arguments ask for."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anamorph.benchmarks import scenarios
from anamorph.benchmarks.parity import checkpoint_of
from anamorph.benchmarks.process import run_python
from anamorph.benchmarks.records import Result, read
from anamorph.checkpoint import BUNDLED_NAME, Checkpoint
from anamorph.cli import DIFFERENT, OK


def run(options: argparse.Namespace) -> int:
    """One of the actions."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "run": _run, "quick": _run, "report": _report, "compare": _compare, "gains": _gains, "best": _best,
        "tune": _tune,
    }  # fmt: skip
    return actions[options.action](options)


def engines_here() -> dict[str, list[str]]:
    """Every engine that runs here, with its precisions on its first device; asked in a process of its own.

    Those that are slow to start (they take no part in `backend="auto"`) come last.
    """
    rows = run_python("anamorph", "backends", "--json")["backends"]
    real = [row for row in rows if row["available"] and not row["test_double"]]
    real.sort(key=lambda row: row["rank"] is None)
    return {row["name"]: next(iter(row["devices"].values())) for row in real}


def _opened(argument: str | None) -> tuple[Checkpoint, str]:
    """A model, and what it is called in results: the bundled one by its name, every other by its folder."""
    name = argument or BUNDLED_NAME
    checkpoint = checkpoint_of(name)
    return checkpoint, name if name == BUNDLED_NAME else str(checkpoint.folder)


def _run(options: argparse.Namespace) -> int:
    from anamorph.benchmarks.runner import Run

    changes: dict[str, Any] = {}
    if options.model is not None:
        changes["model"] = _opened(options.model)[1]
    name = "quick" if options.action == "quick" else options.scenario
    scenario = scenarios.filtered(scenarios.read(name, engines_here(), changes), options.filter)
    if options.list:
        print("\n".join(cell.key for cell in scenario.cells))
        return OK
    out = Path(options.out or f"out/bench-{scenario.name}.jsonl")
    _write(Run(scenario, out, say).all(), out)
    return OK


def _report(options: argparse.Namespace) -> int:
    _write(read(Path(options.result)), Path(options.result))
    return OK


def _write(result: Result, out: Path) -> None:
    from anamorph.benchmarks.report import summary, write_all
    from anamorph.benchmarks.summary import lines

    written = write_all(result, out)
    print(summary(lines(result)))
    print(", ".join(map(str, [out, *written])))


def _compare(options: argparse.Namespace) -> int:
    from anamorph.benchmarks.comparing import broken, changes, told

    old, new = read(Path(options.old)), read(Path(options.new))
    found, lost = changes(old, new, options.threshold / 100), broken(old, new)
    if options.json:
        print(json.dumps({"changes": [asdict(one) for one in found], "broken": lost}, indent=2))
    else:
        print(told(found))
        for text in lost:
            print(f"no longer: {text}")
    return DIFFERENT if lost or any(one.verdict == "slower" for one in found) else OK


def _gains(options: argparse.Namespace) -> int:
    from anamorph.benchmarks.gains import page

    fidelity = None if options.fidelity is None else Path(options.fidelity)
    print(page([read(Path(name)) for name in options.results], fidelity), end="")
    return OK


def _best(options: argparse.Namespace) -> int:
    from anamorph.benchmarks import best
    from anamorph.pipelines.wishes import precision_name

    checkpoint, model = _opened(options.model)
    out = None if options.out is None else Path(options.out)
    result = best.measured(model, precision_name(options.dtype), engines_here(), out, say)
    print(best.answer(result, checkpoint))
    return OK


def _tune(options: argparse.Namespace) -> int:
    from anamorph.benchmarks import tune

    checkpoint, model = _opened(options.model)
    out = Path(options.out or f"out/tune-{options.quality}.jsonl")
    print(
        tune.answer(tune.measured(model, options.quality, engines_here(), out, say), options.quality, checkpoint, say)
    )
    return OK


def say(message: str) -> None:
    """Progress goes to the error stream."""
    print(f"anamorph: {message}", file=sys.stderr, flush=True)
