"""One table of what each rewrite and option gains and costs, over all results whose arms took turns call by call."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anamorph.benchmarks.arms import PEERS
from anamorph.benchmarks.fidelity import parsed
from anamorph.benchmarks.records import Result
from anamorph.benchmarks.report import UNITS, groups, markdown_table, pairs_text, ranked
from anamorph.benchmarks.scenarios import PICTURES, Cell
from anamorph.benchmarks.statistics import Pairs
from anamorph.benchmarks.summary import COUNTED, Line, in_turn, lines
from anamorph.components import CHECKPOINT
from anamorph.errors import InputError
from anamorph.plugins import get_backend
from anamorph.rewrites import DEFAULT, NONE, named, wanted

HEAD = ("engine", "with", "beside", "work", "times as fast", "from eager fp32", "picture", "over many prompts",
        "by itself")  # fmt: skip
ABOUT = """\
How many times as fast calls are with a rewrite or an option as beside what the third column names, which took turns
with them call by call, with the interval of the median; how far that part is from PyTorch eager in float32 without
rewrites (relative L2), and its picture; how far pictures of the bundled model are over many prompts; whether it is on
by itself there.
"""


@dataclass(frozen=True)
class Gain:
    """One arm beside the one that lacks what it has."""

    line: Line
    base: Cell
    pairs: Pairs


def page(results: Sequence[Result], fidelity: Path | None = None) -> str:
    """The table in Markdown; raises InputError: in none of the results did arms take turns, or a file is no list."""
    found = [gain for result in results for gain in gains(result)]
    if not found:
        raise InputError("no arms took turns in these results; name some of scenarios with together = true")
    many = _fidelity(fidelity) if fidelity is not None else []
    where = "\n".join(map(_where, results))
    return f"# Gains\n\n{ABOUT}\n{markdown_table(HEAD, [_row(gain, many) for gain in found])}\n\n## Where\n\n{where}\n"


def _where(result: Result) -> str:
    """On which machine, with what and when; the page of the scenario says more."""
    run, about = result.run, result.environment
    commit = (about["git"] or {}).get("commit", "unknown")[:12]
    return f"- {run['scenario']}: {about['processor']}, {about['cores']} cores; commit {commit}; begun {run['time']}"


def gains(result: Result) -> list[Gain]:
    """Every arm of ours beside the one of the same work that lacks what it has, most gain first."""
    found = []
    for _, group in groups(lines(result)):
        shown = ranked(group)
        for one in (one for one in shown if one.cell.engine not in PEERS):
            base = _base(one.cell, [other.cell for other in shown])
            if base is not None and (pairs := in_turn(result, one.cell, base)) is not None:
                found.append(Gain(one, base, pairs))
    return sorted(found, key=lambda gain: (_work(gain.line.cell), -gain.pairs.ratio))


def _work(cell: Cell) -> str:
    """What was timed."""
    size = f"{cell.width}x{cell.height}" if cell.width else "its own size"
    steps = f", {cell.steps} steps" * (cell.task in PICTURES)
    return f"{Path(cell.model).name}, {UNITS[cell.task]}, {size}{steps}"


def _base(cell: Cell, among: Sequence[Cell]) -> Cell | None:
    """The arm of the same engine with the fewest rewrites and no approximation; for that one, another tool's."""
    same = [one for one in among if not one.near and (one.engine, one.precision) == (cell.engine, cell.precision)]
    plain = min(same, key=lambda one: len(_rewrites(one)), default=cell)
    return plain if plain != cell else next((one for one in among if one.engine in PEERS), None)


def _rewrites(cell: Cell) -> tuple[str, ...]:
    """Those by which the cell computes."""
    return wanted(cell.rewrites or None, _place(cell))


def _place(cell: Cell) -> str:
    """What decides about rewrites: the format of an export, or the engine where it opens checkpoints itself."""
    form = CHECKPOINT if cell.engine in PEERS else get_backend(cell.engine).formats[0]
    return cell.engine if form == CHECKPOINT else form


def _row(gain: Gain, many: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    one, cell, stage = gain.line, gain.line.cell, gain.line.stages.get(COUNTED[gain.line.cell.task])
    added = tuple(name for name in _rewrites(cell) if name not in _rewrites(gain.base))
    return (
        f"{cell.engine} {cell.precision}", _added(gain, added), _beside(gain), _work(cell),
        f"{gain.pairs.ratio:.3f} ({pairs_text(gain.pairs)})", "-" if stage is None else f"{stage:.1e}",
        "-" if one.psnr_db is None else f"{one.psnr_db:.1f} dB", _over_prompts(cell, many),
        "on" if added and not cell.near and set(added) <= set(wanted(None, _place(cell))) else "off",
    )  # fmt: skip


def _added(gain: Gain, rewrites: Sequence[str]) -> str:
    """What an arm has that its base has not; another tool has none of our rewrites."""
    cell = gain.line.cell
    if gain.base.engine in PEERS:
        rewrites = named(cell.rewrites or None)
    if cell.rewrites in ("", DEFAULT) and not cell.near and (gain.base.engine in PEERS or gain.base.rewrites == NONE):
        rewrites = ["all that are on by themselves"]
    options = [
        cell.quantize, f"guided {cell.interval}" * bool(cell.interval), f"cached {cell.caching:g}" * bool(cell.caching),
    ]  # fmt: skip
    return ", ".join(filter(None, [*options, *rewrites]))


def _beside(gain: Gain) -> str:
    if gain.base.engine in PEERS:
        return f"{gain.base.engine}{' static' * gain.base.static}"
    return "no rewrites" if gain.base.rewrites == NONE else "the same without"


def _over_prompts(cell: Cell, many: Sequence[Mapping[str, Any]]) -> str:
    for one in many if cell.near else ():
        if _asked(cell) == _listed(parsed(one["arm"])):
            return f"{one['psnr_db_mean']:.1f} dB, SSIM {one['ssim']:.3f} ({one['pictures']})"
    return "-"


def _asked(cell: Cell) -> dict[str, Any]:
    """A cell's approximations as `fidelity` lists them."""
    interval = None if cell.guided is None else list(cell.guided)
    return _listed({
        "rewrites": cell.rewrites, "step_caching": cell.refresh, "guidance_interval": interval, "model": cell.quantize,
    })  # fmt: skip


def _listed(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: options.get(name) or None for name in ("step_caching", "guidance_interval", "model")}
    return {**plain, "rewrites": set(named(options.get("rewrites") or None))}


def _fidelity(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); name what `anamorph.benchmarks.fidelity` printed") from None
    if any("psnr_db_mean" not in row for row in rows):
        raise InputError(f"{path} holds other lines than `anamorph.benchmarks.fidelity` prints; name its output")
    return rows
