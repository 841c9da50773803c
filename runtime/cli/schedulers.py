"""`anamorph schedulers`: which samplers there are, and when to use which."""

import argparse
import json

from anamorph.cli import OK
from anamorph.schedulers import SCHEDULERS


def run(options: argparse.Namespace) -> int:
    """Print every scheduler with one line on when to use it, and how often it calls the model."""
    rows = [
        {"name": name, "calls_per_step": kind.order, "when": kind.SUMMARY, "compatible": kind in COMPATIBLE}
        for name, kind in sorted(SCHEDULERS.items())
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return OK
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['when']}")
    print("\n`anamorph compare --schedulers A,B PROMPT` draws with several of them side by side.")
    return OK


COMPATIBLE = SCHEDULERS["EulerDiscreteScheduler"]().compatibles
"""Those that take each other's configurations in a pipeline for Stable Diffusion."""
