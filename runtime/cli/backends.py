"""`anamorph backends`: which engines there are, and what is missing for those that cannot run."""

import argparse
import json
from typing import Any

from anamorph.cli import OK
from anamorph.engine import Backend
from anamorph.errors import BackendError
from anamorph.guard import missing, places_here
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
    }


def run(options: argparse.Namespace) -> int:
    """Print the engines; those that cannot run say what to install."""
    found = installed()
    rows = [describe(backend) for _, backend in sorted(found.backends.items())]
    automatic, reason = choose_backend("checkpoint")
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
