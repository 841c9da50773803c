"""The table of tasks, adapters and engines: how far pictures of tiny random checkpoints are apart.

    python tests/adapter_table.py [--out benchmarks/results/adapters.md] [--place FOLDER] [--family SD1 ...]
        [--engine openvino ...] [--cell-seconds 600] [--seconds N]

eager stands beside diffusers, every other engine beside eager. Each family runs on each engine in a process of its own;
a cell that takes too long, or whose process dies, is a row with that reason. What was found is kept below PLACE, from
where the next run goes on, as long as the code is the same; `--seconds` ends a run early.
"""

import argparse
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapter_cells import ADAPTERS, FAMILIES, TASKS
from parity import ENGINE_BOUND, IMAGE_BOUND, LATENT_BOUND

from anamorph.benchmarks.environment import environment
from anamorph.files import replacing

ENGINES = ("eager", "compile", "onnxruntime", "openvino", "torchscript", "aotinductor")
ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "adapters.md"
PLACE = ROOT / "build" / "adapters"
Row = dict[str, Any]
Key = tuple[str, str, str, str]
"""Family, engine, adapter, task."""


def code() -> str:
    """What rows must have been made from to be kept."""
    found = hashlib.sha256()
    for folder in ("runtime", "backends", "exporters", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.name.startswith("test_"):
                found.update(path.read_bytes())
    return found.hexdigest()[:16]


class Kept:
    """The rows that were found, one line of JSON each."""

    def __init__(self, path: Path) -> None:
        self.path, self.code = path, code()
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        self.rows: dict[Key, Row] = {tuple(row["key"]): row for row in rows if row["code"] == self.code}

    def add(self, key: Key, row: Row) -> None:
        """Keep a row."""
        self.rows[key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "code": self.code, **row}) + "\n")


def command(family: str, engine: str, place: Path, cells: Sequence[str]) -> list[str]:
    """What finds the rows of these cells."""
    return [sys.executable, str(Path(__file__).with_name("adapter_cells.py")), family, engine, str(place), *cells]


def answers(command: Sequence[str], place: Path, count: int, seconds: float) -> Iterator[Row]:
    """So many rows as they come from one process; the last one may say why there are no more."""
    environment = {**os.environ, "ANAMORPH_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
    with (place / "errors.txt").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        for _ in range(count):
            line = lines.get(timeout=seconds)
            if line is None:
                last = ((place / "errors.txt").read_text(errors="replace").strip().splitlines() or ["no word"])[-1]
                yield {"reason": f"its process ended with {process.wait()}: {last[:200]}", "refused": False}
                return
            yield json.loads(line)
    except queue.Empty:
        yield {"reason": f"it took more than {seconds:g} s", "refused": False}
    finally:
        process.kill()
        process.wait()


def run(keys: Sequence[Key], kept: Kept, place: Path, cell_seconds: float, until: float) -> None:
    """Find what is missing among the rows, until that time."""
    place.mkdir(parents=True, exist_ok=True)
    for family, engine in dict.fromkeys(key[:2] for key in keys):
        while missing := [key for key in keys if key[:2] == (family, engine) and key not in kept.rows]:
            cells = ["|".join(key[2:]) for key in missing]
            rows = answers(command(family, engine, place, cells), place, len(cells), cell_seconds)
            for key, row in zip(missing, rows, strict=False):
                kept.add(key, row)
                print(*key, shown(row, engine, []), f"{row.get('seconds', cell_seconds):.1f} s", flush=True)
                if time.monotonic() > until:
                    rows.close()  # type: ignore[attr-defined]
                    return


def bounds(engine: str) -> tuple[float, float]:
    """What latents and pictures may differ by."""
    return (LATENT_BOUND, IMAGE_BOUND) if engine == "eager" else (ENGINE_BOUND, ENGINE_BOUND)


def passed(row: Mapping[str, Any], engine: str) -> bool:
    """Whether a comparison was made and is within the bounds."""
    return "latents" in row and all(
        row[name] <= most for name, most in zip(("latents", "image"), bounds(engine), strict=True)
    )


def shown(row: Mapping[str, Any] | None, engine: str, notes: list[str]) -> str:
    """A cell's text; a reason goes to the notes, each once."""
    if row is None:
        return "not run"
    if "latents" in row:
        found = f"{row['latents']:.0e} / {row['image']:.0e}"
        return found if passed(row, engine) else f"**{found}**"
    if row["reason"] not in notes:
        notes.append(row["reason"])
    return f"{'none' if row['refused'] else '**failed**'} [{notes.index(row['reason']) + 1}]"


def table(rows: Mapping[Key, Row], keys: Sequence[Key]) -> str:
    """Everything as Markdown."""
    engines = list(dict.fromkeys(key[1] for key in keys))
    notes: list[str] = []
    heads = ("model", "task", "adapter", "moves latents by", *engines)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for family, task, adapter in dict.fromkeys((key[0], key[3], key[2]) for key in keys):
        effect = rows.get((family, "eager", adapter, task), {}).get("effect")
        cells = [shown(rows.get((family, engine, adapter, task)), engine, notes) for engine in engines]
        moved = f"{effect:.0%}" if effect else "-"
        lines.append(f"| {family} | {task} | {adapter} | {moved} | {' | '.join(cells)} |")
    reasons = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([*summary(rows, engines), "", *lines, "", *reasons])


def summary(rows: Mapping[Key, Row], engines: Sequence[str]) -> list[str]:
    """For each engine: comparisons, the worst of them, refusals, failures."""
    lines = ["| engine | beside | compared | worst latents | worst image | refused | failed |", "|---" * 7 + "|"]
    for engine in engines:
        own = [row for key, row in rows.items() if key[1] == engine]
        compared = [row for row in own if "latents" in row]
        worst = [f"{max(row[name] for row in compared):.1e}" if compared else "-" for name in ("latents", "image")]
        refused = sum(row.get("refused", False) for row in own)
        failed = len(own) - refused - sum(passed(row, engine) for row in own)
        beside = "diffusers" if engine == "eager" else "eager"
        lines.append(f"| {engine} | {beside} | {len(compared)} | {' | '.join(worst)} | {refused} | {failed} |")
    return lines


def described(rows: Mapping[Key, Row], keys: Sequence[Key]) -> str:
    """The whole file."""
    here = environment()
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    return f"""# Adapters

Tiny random checkpoints in diffusers' layout, float32: the largest relative L2 difference of the latents after any step,
and of any pixel in 0..1. eager stands beside diffusers (with PEFT), every other engine beside eager. Allowed are
{LATENT_BOUND:g} / {IMAGE_BOUND:g} for eager and {ENGINE_BOUND:g} for both elsewhere; what is above is **bold**.
"moves latents by" is how far the adapter takes eager's last latents from those without it.

Made by `make adapters`.

{table(rows, keys)}

{here["system"]}, {here["processor"]}, {versions}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write the table; 1 where a cell failed or is missing."""
    parser = argparse.ArgumentParser(description="Tasks, adapters and engines: how far pictures are apart.")
    parser.add_argument("--out", type=Path, default=OUT, help="Markdown file to write (default: %(default)s)")
    parser.add_argument("--place", type=Path, default=PLACE, help="what is kept between runs (default: %(default)s)")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--cell-seconds", type=float, default=600.0, help="longest time for a cell")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further cell after that time")
    options = parser.parse_args(arguments)
    every = [(family, engine, adapter, task) for engine in ENGINES for family in FAMILIES
             for adapter in ADAPTERS for task in TASKS]  # fmt: skip
    wanted = [key for key in every if key[0] in options.family and key[1] in options.engine]
    kept = Kept(options.place / "rows.jsonl")
    run(wanted, kept, options.place, options.cell_seconds, time.monotonic() + options.seconds)
    with replacing(options.out) as draft:
        draft.write_text(described(kept.rows, every), encoding="utf-8")
    rows = [kept.rows.get(key) for key in wanted]
    return 0 if all(row is not None and (row.get("refused") or passed(row, key[1]))
                    for key, row in zip(wanted, rows, strict=True)) else 1  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
