"""What changed between two results: every cell that both measured, tested by Welch on the medians of processes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from anamorph.benchmarks.environment import fingerprint
from anamorph.benchmarks.records import Result
from anamorph.benchmarks.statistics import FEWEST, Contrast, contrast, holm, needed
from anamorph.benchmarks.summary import line
from anamorph.errors import InputError

TOLD = 1.05
SURE = 0.05
"""Chance of a false alarm among all cells that is taken."""


@dataclass(frozen=True)
class Change:
    """One cell: `contrast` is new over old, `p` its chance after Holm's adjustment, `verdict` one of slower, faster,
    same (the whole interval is within the threshold), unclear; or why there is none."""

    key: str
    verdict: str
    contrast: Contrast | None = None
    p: float = 1.0
    needed: int | None = None
    """Processes a side that would show a change by 5 %."""

    def __str__(self) -> str:
        if self.contrast is None:
            return f"{self.key}: {self.verdict}"
        found = self.contrast
        more = f"; {TOLD - 1:.0%} would take {self.needed} processes a side" if self.verdict == "unclear" else ""
        return (
            f"{self.key}: {self.verdict}, {found.ratio - 1:+.1%} of the time "
            f"({found.low - 1:+.1%} to {found.high - 1:+.1%}), p {self.p:.2g}{more}"
        )


def changes(old: Result, new: Result, threshold: float) -> list[Change]:
    """Every cell of both results; `threshold` is the share of time below which a change does not count.

    Raises InputError: they were measured on different machines, or have no cell in common.
    """
    before, after = fingerprint(old.environment), fingerprint(new.environment)
    if differs := [key for key in before if key != "versions" and before[key] != after[key]]:
        raise InputError(f"the results come from machines with different {', '.join(differs)}; measure both on one")
    common = [key for key in old.cells if key in new.cells]
    if not common:
        raise InputError("the results have no cell in common; run the same scenario")
    found = [(key, _refusal(key, old, new)) for key in common]
    tested = [
        (key, contrast(old.cells[key].samples(), new.cells[key].samples())) for key, refusal in found if refusal is None
    ]
    chances = dict(zip((key for key, _ in tested), holm([one.p for _, one in tested if one]), strict=True))
    contrasts = dict(tested)
    return [
        Change(key, refusal) if refusal is not None else replace(
            _judged(key, contrasts[key], chances[key], threshold),
            needed=needed(old.cells[key].samples(), new.cells[key].samples(), TOLD),
        )
        for key, refusal in found
    ]  # fmt: skip


def _refusal(key: str, old: Result, new: Result) -> str | None:
    for name, result in (("old", old), ("new", new)):
        if (reason := line(result.cells[key], {}).refusal) is not None:
            return f"not compared: {name} {reason}"
    counts = [len(result.cells[key].samples()) for result in (old, new)]
    if min(counts) < FEWEST:
        return f"not compared: {counts[0]} and {counts[1]} processes that count, {FEWEST} a side are needed"
    return None


def _judged(key: str, found: Contrast | None, p: float, threshold: float) -> Change:
    assert found is not None
    if p < SURE and abs(found.ratio - 1) > threshold:
        verdict = "slower" if found.ratio > 1 else "faster"
    elif max(abs(found.low - 1), abs(found.high - 1)) <= threshold:
        verdict = "same"
    else:
        verdict = "unclear"
    return Change(key, verdict, found, p)


def broken(old: Result, new: Result) -> list[str]:
    """Cells that had a speed and have none any more, with the reason."""
    return [
        f"{key}: {reason}" for key, measured in old.cells.items()
        if key in new.cells and line(measured, {}).refusal is None
        and (reason := line(new.cells[key], {}).refusal) is not None and not reason.startswith("void")
    ]  # fmt: skip


def told(found: Sequence[Change]) -> str:
    """The changes for people, what got slower first."""
    order = {"slower": 0, "faster": 2, "same": 3, "unclear": 1}
    return "\n".join(str(one) for one in sorted(found, key=lambda one: order.get(one.verdict, 4)))
