"""From raw samples to one line per cell: what may be said, and what may not."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from anamorph.benchmarks.records import Measured, Result
from anamorph.benchmarks.scenarios import PICTURES, Cell
from anamorph.benchmarks.statistics import Pairs, interval, mad, outliers, paired, percentile, pooled

PHASES = ("text", "encode", "denoiser", "control", "vae", "post", "host")
"""Where the time of a picture goes; host is the rest: noise, scheduler, and what lies between the calls."""
STARTS = ("import_s", "export_s", "load_s", "first_s", "compile_s", "step_s")
COUNTED = {**dict.fromkeys(PICTURES, "denoiser"), "denoiser": "denoiser", "decode": "vae"}
"""Task -> the stage whose operations its roofline counts."""


@dataclass(frozen=True)
class Line:
    """One cell. Times in seconds; `refusal` says why it shows no speed, and then it has none."""

    cell: Cell
    refusal: str | None = None
    processes: int = 0
    samples: int = 0
    void: int = 0
    median: float | None = None
    low: float | None = None
    high: float | None = None
    mad: float | None = None
    p90: float | None = None
    p99: float | None = None
    outliers: int = 0
    per_second: float | None = None
    """Pictures (or calls) each second, the whole batch counted."""
    call: float | None = None
    """Median seconds of one call of the denoiser, or of the decoder where that is the task."""
    work: float | None = None
    """Operations of what `median` took, as far as the reference counted them."""
    least: float | None = None
    """Seconds that these and the exponentials beside them take at the machine's measured peaks."""
    gflops: float | None = None
    peak_share: float | None = None
    phases: Mapping[str, float] = field(default_factory=dict)
    starts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """cold and warm -> medians of the phases of a start."""
    stages: Mapping[str, float] = field(default_factory=dict)
    psnr_db: float | None = None
    fidelity: str = ""
    memory: Mapping[str, float] = field(default_factory=dict)
    energy_j: float | None = None
    placement: Sequence[str] = ()
    why: str = ""
    wide: bool = False
    """Whether the interval is wider than the scenario asked for."""


def lines(result: Result) -> list[Line]:
    """Every cell of a run, in its order."""
    within = result.run.get("plan", {}).get("within", 0.0)
    return [line(measured, result.run.get("peak", {}), within) for measured in result.cells.values()]


def line(measured: Measured, peak: Mapping[str, Any], within: float = 0.0) -> Line:
    """One cell: its refusal, or its figures."""
    cell = measured.cell
    common: dict[str, Any] = {
        "cell": cell, "void": measured.taken - sum(map(len, measured.samples())), "why": measured.done or "",
        "memory": _memory(measured), "placement": measured.bursts[-1]["placement"] if measured.bursts else (),
        "stages": (measured.parity or {}).get("stages", {}), "psnr_db": (measured.parity or {}).get("psnr_db"),
        "fidelity": _fidelity(measured),
    }  # fmt: skip
    if (refusal := _refusal(measured)) is not None:
        return Line(refusal=refusal, **common)
    bursts = measured.samples()
    samples = pooled(bursts)
    low, high = interval(bursts)
    middle = float(np.median(samples))
    call = _call(measured)
    flops = measured.counts.get("flops", {}).get(COUNTED[cell.task])
    gflops = flops / call / 1e9 if flops and call and not cell.near else None  # an approximation does other work
    rates = peak.get(cell.precision, {})
    top = rates.get("gflops")
    energies = pooled(measured.samples("energy_j"))
    return Line(
        **common, processes=len(bursts), samples=len(samples), median=middle, low=low, high=high, mad=mad(samples),
        p90=percentile(samples, 0.9), p99=percentile(samples, 0.99), outliers=int(outliers(samples).sum()),
        wide=max(high - middle, middle - low) > within * middle,
        per_second=cell.batch / middle, call=call, gflops=gflops, peak_share=gflops / top if gflops and top else None,
        work=_counted(measured, "flops"), least=_least(measured, rates), phases=_phases(measured),
        starts=_starts(measured, middle, call),
        energy_j=float(np.median(energies)) if len(energies) else None,
    )  # fmt: skip


def _refusal(measured: Measured) -> str | None:
    if measured.failed is not None:
        return f"failed: {measured.failed}"
    if measured.parity is None:
        return "not compared with eager yet"
    if not measured.parity["passed"]:
        return f"no parity: {measured.parity['note']}"
    if not measured.samples():
        return f"void: {_void(measured)}" if measured.bursts else "not measured yet"
    return None


def _void(measured: Measured) -> str:
    reasons = [burst["void"] for burst in measured.bursts if burst["void"]]
    return str(reasons[-1]) if reasons else "the machine drifted during each sample"


def _fidelity(measured: Measured) -> str:
    if measured.parity is None:
        return ""
    if measured.parity.get("psnr_db") is not None:
        return f"{measured.parity['psnr_db']:.1f} dB"
    return "identical" if measured.parity["passed"] else "-"


def _call(measured: Measured) -> float | None:
    calls = pooled(measured.samples("steps" if measured.cell.task in PICTURES else "total"))
    return float(np.median(calls)) if len(calls) else None


def _least(measured: Measured, rates: Mapping[str, Any]) -> float | None:
    """Seconds of all products and of all exponentials, one after the other, at these rates."""
    flops, exponentials = (_counted(measured, kind) for kind in ("flops", "exponentials"))
    if flops is None or exponentials is None or "softmax" not in rates:
        return None
    seconds: float = flops / (1e9 * rates["gflops"]) + exponentials / (1e9 * rates["softmax"])
    return seconds


def _counted(measured: Measured, kind: str) -> float | None:
    cell, counted = measured.cell, measured.counts.get(kind, {})
    if cell.near or COUNTED[cell.task] not in counted:
        return None
    if cell.task not in PICTURES:
        return counted[COUNTED[cell.task]]
    return counted.get("text", 0) + cell.steps * counted["denoiser"] + counted.get("vae", 0)


def _phases(measured: Measured) -> dict[str, float]:
    """Median seconds of each phase of a picture; what an arm does not tell apart is host."""
    if measured.cell.task not in PICTURES:
        return {}
    found: dict[str, list[float]] = {name: [] for name in PHASES}
    for sample in (sample for burst in measured.valid for sample in burst["samples"]):
        parts = {name: sample.get(name, 0.0) for name in PHASES if name not in ("denoiser", "host")}
        parts["denoiser"] = sum(sample.get("steps", ()))
        parts["host"] = max(0.0, sample["total"] - sum(parts.values()))
        for name, seconds in parts.items():
            found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def _starts(measured: Measured, middle: float, call: float | None) -> dict[str, dict[str, float]]:
    """What a start costs by the state of the caches; compiling is what the first run takes beyond later ones.

    `step_s` is all from the start of the process to the first denoising step, where the arm tells its steps apart.
    """
    found = {}
    for cache in ("cold", "warm"):
        rows = [burst for burst in measured.bursts if burst["cache"] == cache]
        if not rows:
            continue
        first = statistics.median(burst["first"]["total"] for burst in rows)
        phases = {name: statistics.median(burst["phases"][name] for burst in rows) for name in STARTS[:3]}
        found[cache] = {**phases, "first_s": first, "compile_s": max(0.0, first - middle)}
        if call is not None and all(burst["first"].get("steps") for burst in rows):
            found[cache]["step_s"] = statistics.median(_until_step(burst, call) for burst in rows)
    return found


def _until_step(burst: Mapping[str, Any], call: float) -> float:
    """Seconds before the first step: its model may be compiled within it, beyond what a `call` takes."""
    first = burst["first"]
    seconds: list[float] = [*(burst["phases"][name] for name in STARTS[:3]), first["text"], first["steps"][0] - call]
    return sum(max(0.0, value) for value in seconds)


def _memory(measured: Measured) -> dict[str, float]:
    """The most that a process held: one with filled caches where there were any, because others may export, too."""
    bursts = [burst for burst in measured.bursts if burst["cache"] == "warm"] or measured.bursts
    names = {name for burst in bursts for name in burst["memory"]}
    return {name: max(burst["memory"].get(name, 0.0) for burst in bursts) for name in sorted(names)}


def in_turn(result: Result, old: Cell, new: Cell) -> Pairs | None:
    """How two arms compare whose calls took turns, whatever the machine's speed was; None where they did not."""
    if not result.run["plan"].get("together"):
        return None
    sides = {measured.cell: measured for measured in result.cells.values()}
    before, after = sides[old], sides[new]
    turns = {burst["turn"]: burst for burst in before.bursts if burst["void"] is None}
    kept: list[list[tuple[float, float]]] = []
    for burst in (burst for burst in after.bursts if burst["void"] is None and burst["turn"] in turns):
        both = zip(turns[burst["turn"]]["samples"], burst["samples"], strict=False)  # one may have failed earlier
        kept.append([(x["total"], y["total"]) for x, y in both])
    return paired([[x for x, _ in pairs] for pairs in kept], [[y for _, y in pairs] for pairs in kept])


def break_even(slow: Line, fast: Line) -> float | None:
    """Pictures after which `fast`, started with empty caches, has overtaken `slow`; None: never, or not known."""
    if slow.median is None or fast.median is None or fast.median >= slow.median:
        return None
    if "cold" not in slow.starts or "cold" not in fast.starts:
        return None
    parts = ("import_s", "export_s", "load_s", "compile_s")
    costs = [sum(one.starts["cold"][name] for name in parts) for one in (slow, fast)]
    return max(0.0, (costs[1] - costs[0]) / (slow.median - fast.median)) * slow.cell.batch


def reference_of(line: Line, among: Sequence[Line]) -> Line | None:
    """Eager in float32 at the same work."""
    eager = replace(line.cell.work, engine="eager", precision="float32")
    return next((one for one in among if one.cell == eager), None)
