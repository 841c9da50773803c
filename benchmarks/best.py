"""The fastest engine for a model on this machine, kept for `backend="auto"`."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from anamorph.benchmarks.records import Result
from anamorph.benchmarks.report import ranked, seconds
from anamorph.benchmarks.runner import Run
from anamorph.benchmarks.scenarios import Cell, Plan, Scenario, guidance_for
from anamorph.benchmarks.summary import Line, lines, reference_of
from anamorph.checkpoint import Checkpoint
from anamorph.errors import BackendError
from anamorph.profiles import Profile, store

PLAN = Plan(processes=3, most=3, seconds=300, burst_s=2, fewest=3)


def measured(
    model: str,
    precision: str,
    engines: Mapping[str, Sequence[str]],
    out: Path | None,
    say: Callable[[str], None],
) -> Result:
    """Whole pictures of the model's own size on every engine that serves the precision."""
    cells = tuple(
        Cell(model, engine=engine, precision=precision, guidance=guidance_for(model))
        for engine, precisions in engines.items() if precision in precisions
    )  # fmt: skip
    if not cells:
        raise BackendError(f"no engine here runs in {precision}; see `anamorph backends`")
    scenario = Scenario("best", cells, PLAN)
    if out is not None:
        return Run(scenario, out, say).all()
    with tempfile.TemporaryDirectory() as place:
        return Run(scenario, Path(place) / "best.jsonl", say).all()


def chosen(result: Result) -> Line:
    """The fastest cell; raises BackendError: no figure counts."""
    done = lines(result)
    if not (shown := ranked(done)):
        reasons = "; ".join(f"{one.cell.arm}: {one.refusal}" for one in done)
        raise BackendError(f"no engine has a figure that counts ({reasons}); try again when the machine is quiet")
    return shown[0]


def answer(result: Result, checkpoint: Checkpoint) -> str:
    """Keep the answer, and say it in one line."""
    best = chosen(result)
    reference = reference_of(best, lines(result))
    assert best.median is not None
    profile = Profile(best.cell.engine, best.cell.precision, best.median / best.cell.batch, result.run["time"])
    place = store(checkpoint, profile)
    faster = ""
    if reference is not None and reference.median and reference is not best:
        faster = f", {reference.median / best.median:.2f} times as fast as eager float32"
    return f"{best.cell.arm}: {seconds(best.median)} a picture{faster}; backend=auto takes it from now on ({place})"
