"""`anamorph bench`: its arguments; what they do lies with the measurements, which this package must not import."""

import argparse
from typing import Any

from anamorph.errors import BackendUnavailable

GROUP = "anamorph.commands"
"""Entry points of commands that are found only when they run."""

DESCRIPTION = """\
Compare engines (and other tools, see `make peers`) on this machine and model. Each cell of a scenario runs in fresh
processes that take turns; a figure is shown with its interval, and only where the pictures agree with eager's.
"""


def arguments(command: argparse.ArgumentParser) -> None:
    """Add the actions and their options."""
    actions = command.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    run = actions.add_parser("run", help="measure a scenario; a stopped run goes on where it was")
    run.add_argument(
        "scenario",
        help="approximations, attention, cold-start, control, lora, memory, quick, rewrites, seeds, sizes, "
        "stable-diffusion, stable-diffusion-cpp, stable-diffusion-xl, or a TOML file",
    )
    _measuring(run)
    quick = actions.add_parser("quick", help="the bundled model on all engines here, in three minutes")
    _measuring(quick)
    report = actions.add_parser("report", help="write the report of a result again")
    report.add_argument("result", help="JSONL file that `run` wrote")
    compare = actions.add_parser("compare", help="what got slower from one result to another (exit code 3)")
    compare.add_argument("old", help="JSONL file of the state before")
    compare.add_argument("new", help="JSONL file of the state after")
    compare.add_argument(
        "--threshold", type=float, default=2.0, metavar="PERCENT", help="smaller changes do not count (default: 2)"
    )
    compare.add_argument("--json", action="store_true", help="print the comparison as JSON")
    gains = actions.add_parser("gains", help="one table of what rewrites and options gain and cost")
    gains.add_argument("results", nargs="+", metavar="RESULT", help="JSONL file of a scenario whose arms took turns")
    gains.add_argument("--fidelity", metavar="FILE", help="what `python -m anamorph.benchmarks.fidelity` printed")
    best = actions.add_parser("best", help="which engine is fastest for a model; backend=auto takes it from then on")
    best.add_argument("model", nargs="?", help="checkpoint folder or hub id (default: the bundled model)")
    best.add_argument("--dtype", default="fp32", help="execution precision: fp32, bf16 or fp16 (default: fp32)")
    best.add_argument("--out", help="JSONL file to write (default: in the cache, removed)")


def _measuring(action: argparse.ArgumentParser) -> None:
    action.add_argument("--model", help="checkpoint folder (default: the scenario's)")
    action.add_argument(
        "--filter", action="append", default=[], metavar="KEY=VALUE", help="only these cells, as engine=eager,compile"
    )
    action.add_argument("--out", help="JSONL file to write or to go on with (default: out/bench-SCENARIO.jsonl)")
    action.add_argument("--list", action="store_true", help="print the cells and leave")


def run(options: argparse.Namespace) -> int:
    """Hand over to the measurements."""
    from importlib.metadata import entry_points  # a tenth of a second that other commands need not spend

    found = entry_points(group=GROUP, name="bench")
    if not found:
        raise BackendUnavailable("this installation has no benchmarks; install anamorph again: pip install -e .")
    action: Any = next(iter(found)).load()
    code: int = action(options)
    return code
