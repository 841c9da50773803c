"""`anamorph backends`: which engines there are, and what is missing for those that cannot run."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from anamorph.capabilities import Cell, conflicts, gigabytes, matrix
from anamorph.cli import OK
from anamorph.components import CHECKPOINT
from anamorph.engine import Backend
from anamorph.errors import BackendError
from anamorph.guard import missing, places_here
from anamorph.pipelines.auto import ALONE, TASKS
from anamorph.plugins import choose_backend, installed


def describe(backend: Backend) -> dict[str, Any]:
    """One engine as plain JSON types."""
    reason, places = missing(backend), {}
    if reason is None:
        try:
            places = places_here(backend)
        except BackendError as error:
            reason = str(error)
    return {
        "name": backend.name,
        "available": reason is None,
        "missing": reason,
        "opens": list(backend.formats),
        "devices": {device: list(precisions) for device, precisions in places.items()},
        "test_double": backend.double,
        "rank": backend.rank,
        "options": dict(backend.options),
    }


def print_matrix(cells: Sequence[Cell], as_json: bool) -> None:
    """A line for each engine, device and precision with the tasks that it is about; as JSON a cell for each task."""
    if as_json:
        print(json.dumps({"cells": [asdict(cell) for cell in cells], "conflicts": conflicts()}, indent=2))
        return
    grouped: dict[Cell, list[str]] = {}
    for cell in cells:
        grouped.setdefault(replace(cell, task=""), []).append(cell.task)
    heads = ("engine", "device", "precision", "memory", "disk", "works")
    rows = [heads, *(_row(cell) for cell in grouped)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for row in rows:
        print("  ".join(f"{value:<{width}}" for value, width in zip(row, widths, strict=True)).rstrip())
    print(f"\ntasks of each line: {', '.join(dict.fromkeys(cell.task for cell in cells)) or 'none'}")
    for sentence in conflicts():
        print(f"conflict: {sentence}")


def _row(cell: Cell) -> tuple[str, ...]:
    costs = ("" if number is None else gigabytes(number) for number in (cell.memory, cell.disk))
    works = f"no: {cell.reason}" if cell.reason else "; ".join(filter(None, (cell.sizes, cell.note)))
    return cell.engine, cell.device, cell.precision, *costs, works


def run(options: argparse.Namespace) -> int:
    """Print the engines; those that cannot run say what to install."""
    if options.matrix:
        print_matrix(matrix(tuple(dict.fromkeys((*TASKS, *ALONE.values())))), options.json)
        return OK
    found = installed()
    rows = [describe(backend) for _, backend in sorted(found.backends.items())]
    automatic, reason = choose_backend(CHECKPOINT)
    if options.json:
        print(json.dumps({"backends": rows, "failures": found.failures, "auto": automatic.name}, indent=2))
        return OK
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        places = "; ".join(f"{device} ({', '.join(kinds)})" for device, kinds in row["devices"].items())
        note = "test double, " if row["test_double"] else ""
        print(f"{row['name']:<{width}}  {note}{places if row['available'] else 'not available: ' + row['missing']}")
    for name, failure in found.failures.items():
        print(f"{name:<{width}}  plug-in failed to load: {failure}")
    print(f"\n{reason}")
    return OK
