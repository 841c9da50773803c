"""A result for people: Markdown and CSV beside the raw samples; `plots` makes the page."""

import csv
import dataclasses
import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from anamorph.benchmarks.growth import growing
from anamorph.benchmarks.records import Result
from anamorph.benchmarks.scenarios import PICTURES
from anamorph.benchmarks.statistics import Pairs
from anamorph.benchmarks.summary import STARTS, Line, break_even, in_turn, lines, reference_of
from anamorph.files import replacing
from anamorph.rewrites import NONE

HEAD = ("arm", "picture or call", "interval", "per second", "denoiser or decoder", "GFLOP/s", "of peak", "memory",
        "to eager fp32", "pictures until it pays")  # fmt: skip
FIGURES = ("processes", "samples", "void", "median", "low", "high", "mad", "p90", "p99", "outliers", "per_second",
           "call", "gflops", "peak_share", "psnr_db", "energy_j", "why")  # fmt: skip
UNITS = {**dict.fromkeys(PICTURES, "picture"), "denoiser": "call of the denoiser", "decode": "decoding"}


def write_all(result: Result, path: Path) -> list[Path]:
    """Write Markdown, CSV and HTML beside the JSONL file; returns their names."""
    from anamorph.benchmarks.plots import page

    done = lines(result)
    texts = {".md": markdown(result, done), ".csv": table(done), ".html": page(result, done)}
    written = []
    for ending, text in texts.items():
        with replacing(path.with_suffix(ending)) as draft:
            draft.write_text(text, encoding="utf-8")
        written.append(path.with_suffix(ending))
    return written


def markdown(result: Result, done: Sequence[Line]) -> str:
    """One table for each work, fastest first, then the cells without a speed and where it was measured."""
    parts = [f"# {result.run['scenario']}\n\n{summary(done)}"]
    for title, group in groups(done):
        shown = ranked(group)
        rows = [cells(one, reference_of(one, group)) for one in shown]
        parts.append(f"## {title}\n\n{markdown_table(HEAD, rows)}" if rows else f"## {title}\n\nNo figure counts.")
        if compared := in_turns(result, shown):
            parts.append("\n".join(f"- {sentence}" for sentence in compared))
        if refused := [one for one in group if one.refusal]:
            parts.append("\n".join(f"- {one.cell.arm}: no speed shown; {one.refusal}" for one in refused))
        if starts := start_rows(shown):
            parts.append(markdown_table(START_HEAD, starts))
    parts.append(environment_text(result))
    return "\n\n".join(parts) + "\n"


def in_turns(result: Result, shown: Sequence[Line]) -> list[str]:
    """What the pairs of calls say that took turns: how much longer each takes than the fastest arm does.

    Where one arm has no rewrites, how much longer that takes than each of the others.
    """
    plain = next((one.cell for one in shown if one.cell.rewrites == NONE), None)
    sides = [(shown[0].cell, one.cell) for one in shown[1:]]
    if plain is not None:
        sides = [(one.cell, plain) for one in shown if one.cell != plain]
    found = [(fast, slow, in_turn(result, fast, slow)) for fast, slow in sides]
    return [
        f"call by call {slow.arm} takes {pairs.ratio:.3f} times as long as {fast.arm} ({pairs_text(pairs)})"
        for fast, slow, pairs in found
        if pairs is not None
    ]


def pairs_text(pairs: Pairs) -> str:
    """The interval of their ratio, and how many they are."""
    if pairs.interval is None:
        return f"{pairs.count} pair{'s' * (pairs.count > 1)} of calls, too few for an interval"
    low, high = pairs.interval
    return f"{low:.3f} to {high:.3f}, {pairs.count} pairs of calls"


def summary(done: Sequence[Line]) -> str:
    """The answer first: the fastest arm of each work, and how time grows with work."""
    said = []
    for title, group in groups(done):
        if not (shown := ranked(group)):
            said.append(f"{title}: no figure counts.")
            continue
        best, reference = shown[0], reference_of(shown[0], group)
        takes = "takes" if len(shown) == 1 else "is fastest,"
        answer = f"{title}: {best.cell.arm} {takes} {seconds(best.median)} a {UNITS[best.cell.task]}"
        if reference is not None and reference.median and best.median and reference is not best:
            answer += f", {reference.median / best.median:.2f} times as fast as eager float32"
        said.append(f"{answer}.")
    return "\n".join(f"- {sentence}" for sentence in [*said, *growing(done)])


def groups(done: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    """Cells of equal work, with a title."""
    works = dict.fromkeys(one.cell.work for one in done)
    return [(title(work.what), [one for one in done if one.cell.work == work]) for work in works]


def title(what: str) -> str:
    """A work as a heading."""
    return ", ".join(part for part in what.split("/") if part not in ("own", "own size"))


def ranked(group: Iterable[Line]) -> list[Line]:
    """Those that show a speed, fastest first."""
    return sorted((one for one in group if one.median is not None), key=lambda one: one.median or 0.0)


def cells(one: Line, reference: Line | None) -> tuple[str, ...]:
    """One row of the table."""
    pays = "-"
    if reference is not None and reference is not one:
        number = break_even(reference, one)
        pays = "never" if number is None else f"{number:.0f}"
    return (
        one.cell.arm, seconds(one.median), interval_text(one), f"{one.per_second:.3g}", seconds(one.call),
        "-" if one.gflops is None else f"{one.gflops:.0f}",
        "-" if one.peak_share is None else f"{one.peak_share:.0%}",
        f"{max(one.memory.values(), default=0) / 1024:.2f} GiB", one.fidelity, pays,
    )  # fmt: skip


def interval_text(one: Line) -> str:
    """The interval, with a mark where it is wider than was asked for."""
    return f"{seconds(one.low)} to {seconds(one.high)}{' (wide)' if one.wide else ''}"


START_HEAD = ("arm", "caches", "import", "export", "load", "first picture or call", "of that, compiling",
              "before the first step")  # fmt: skip


def start_rows(shown: Sequence[Line]) -> list[tuple[str, ...]]:
    """What starts cost, by the state of the caches."""
    return [
        (one.cell.arm, cache, *(seconds(values.get(name)) for name in STARTS))
        for one in shown for cache, values in one.starts.items()
    ]  # fmt: skip


def seconds(value: float | None) -> str:
    """A time with three digits and its unit."""
    if value is None:
        return "-"
    if value >= 1 or value == 0:
        return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def environment_text(result: Result) -> str:
    """Where it was measured, for people."""
    about, peak = result.environment, result.run["peak"]
    rates = ", ".join(f"{name} {found['gflops']:.0f} GFLOP/s ({found['by']})" for name, found in peak.items())
    known = {name: found for name, found in peak.items() if "softmax" in found}
    scores = ", ".join(f"{name} {found['softmax']:.1f}e9/s ({found['softmax_by']})" for name, found in known.items())
    git = about["git"] or {}
    state = f"{git.get('commit', 'unknown')[:12]}{', changed' * bool(git.get('changed'))}"
    return "\n".join([
        "## Where", "",
        f"- {about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB; "
        f"{', '.join(about['instruction_sets']) or 'no vector instructions known'}; "
        f"governor {about['governor'] or 'unknown'}; {about['gpu'] or 'no GPU'}",
        f"- measured peak of matrix products: {rates}",
        *([f"- measured peak of softmax, in scores: {scores}"] if scores else []),
        f"- {about['system']}, Python {about['python']}, "
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items()),
        f"- NumPy's BLAS: {about['numpy_blas']}; PyTorch: {', '.join(about['torch_build']) or 'unknown'}",
        f"- commit {state}; begun {result.run['time']}",
        f"- the harness took {_overhead(result)} of each process beside what it measured, comparing included",
        *(["- each warm start follows another of the same arm at once"] if result.run["plan"].get("second") else []),
        f"- samples count while a fixed product of matrices is within {result.run['plan']['drift']:.0%} of its usual",
        "- energy: " + ("see the CSV" if any(m.samples("energy_j") for m in result.cells.values())
                        else "unavailable, this machine shows no counters"),
    ])  # fmt: skip


def _overhead(result: Result) -> str:
    taken = [burst["overhead_s"] for measured in result.cells.values() for burst in measured.bursts]
    return seconds(statistics.median(taken)) if taken else "nothing"


def table(done: Sequence[Line]) -> str:
    """CSV: one line per cell, figures in seconds and MiB."""
    keys = [item.name for item in dataclasses.fields(done[0].cell)] if done else []
    memory = sorted({name for one in done for name in one.memory})
    phases = sorted({name for one in done for name in one.phases})
    head = [*keys, "refusal", *FIGURES, *memory, *(f"phase_{name}_s" for name in phases),
            *(f"{cache}_{name}" for cache in ("cold", "warm") for name in STARTS)]  # fmt: skip
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(head)
    for one in done:
        row: list[Any] = [getattr(one.cell, key) for key in keys]
        row += [one.refusal, *(getattr(one, name) for name in FIGURES), *(one.memory.get(name) for name in memory)]
        row += [one.phases.get(name) for name in phases]
        row += [one.starts.get(cache, {}).get(name) for cache in ("cold", "warm") for name in STARTS]
        writer.writerow(["" if value is None else value for value in row])
    return out.getvalue()


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts under their heads."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
