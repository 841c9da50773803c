"""`anamorph info`: what was found out about a model, printed."""

import argparse
import json
from dataclasses import asdict

from anamorph.checkpoint import model_named
from anamorph.cli import OK
from anamorph.cli.inspection import Row, inspect
from anamorph.pipelines import DiffusionPipeline


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    report = inspect(model_named(options.model), options.variant)
    if options.json:
        print(json.dumps(asdict(report), indent=2))
        return OK
    print(f"{report.model}\n{report.pipeline} ({report.format})\n")
    total = Row("together", "", sum(row.parameters or 0 for row in report.components),
                sum(row.bytes or 0 for row in report.components))  # fmt: skip
    rows = [*report.components, total]
    names, classes = (
        max(len(value) for value in column) for column in zip(*((r.name, r.class_name) for r in rows), strict=True)
    )
    for row in rows:
        count = "" if row.parameters is None else _short(row.parameters, " kMG").strip()
        size = "" if row.bytes is None else f"{_short(row.bytes, ' kMG')}B"
        print(f"{row.name:<{names}}  {row.class_name:<{classes}}  {count:>8}  {size:>9}  {row.dtype or ''}".rstrip())
    if report.variants:
        print(f"\nvariants: {', '.join(report.variants)}")
    print("\ntasks")
    for task, name in report.tasks.items():
        print(f"  {task:<14}  {name}")
    if not report.tasks:
        print(f"  none in this version, which has {', '.join(DiffusionPipeline.registry)}")
    print("\nengines")
    for name, how in report.engines.items():
        print(f"  {name:<14}  {how}")
    if report.adapters:
        print("\nadapters (LoRA)")
    for name, how in report.adapters.items():
        print(f"  {name:<14}  {how}")
    return OK


def _short(number: float, units: str) -> str:
    """860 M, 3.4 G: three digits and a unit."""
    power = 0
    while number >= 1000 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    digits = f"{number:.0f}" if power == 0 or number >= 100 else f"{number:.1f}"
    return f"{digits} {units[power].strip()}"
