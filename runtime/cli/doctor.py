"""`anamorph doctor`: what is installed, what each engine can do here and with a model, how to get what is missing."""

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from anamorph.cache import cache_folder
from anamorph.capabilities import conflicts, matrix
from anamorph.checkpoint import model_named
from anamorph.cli import OK
from anamorph.cli.backends import describe, print_matrix
from anamorph.cli.inspection import inspect, needs
from anamorph.guard import missing
from anamorph.plugins import installed

PACKAGES = {
    "numpy": "", "tokenizers": "", "safetensors": "", "torch": "torch", "onnx": "onnx", "onnxruntime": "onnx",
    "openvino": "openvino", "coremltools": "coreml",
}  # fmt: skip
"""Package -> the extra of anamorph that brings it ("": always there)."""


def examine() -> dict[str, Any]:
    """Everything as plain JSON types."""
    found = installed()
    exporters = {name: missing(exporter) for name, exporter in sorted(found.exporters.items())}
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "packages": {name: _version(name) for name in ("anamorph", *PACKAGES)},
        "engines": [describe(backend) for _, backend in sorted(found.backends.items()) if not backend.double],
        "exporters": [
            {"format": name, "available": reason is None, "missing": reason} for name, reason in exporters.items()
        ],
        "failed_plugins": found.failures,
        "conflicts": conflicts(),
        "cache": str(cache_folder()),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run(options: argparse.Namespace) -> int:
    """Print the findings; for a model, what draws it here."""
    if options.model is not None:
        model = model_named(options.model)
        report = inspect(model, options.variant)
        print_matrix(matrix(tuple(report.tasks), needs(model, options.variant)), options.json)
        return OK
    found = examine()
    if options.json:
        print(json.dumps(found, indent=2))
        return OK
    print(f"Python {found['python']} on {found['system']}, {found['processors']} processors\n\npackages")
    for name, number in found["packages"].items():
        print(f"  {name:<12} {number or f'missing; pip install {_extra(name)}'}")
    print("\nengines")
    for row in found["engines"]:
        places = "; ".join(f"{device}: {', '.join(kinds)}" for device, kinds in row["devices"].items())
        print(f"  {row['name']:<12} {places if row['available'] else row['missing']}")
    print("\nexport to")
    for row in found["exporters"]:
        print(f"  {row['format']:<12} {'ready' if row['available'] else row['missing']}")
    for name, reason in found["failed_plugins"].items():
        print(f"\nplug-in {name} failed to load: {reason}")
    for sentence in found["conflicts"]:
        print(f"\nconflict: {sentence}")
    print(f"\nexports are kept in {found['cache']}")
    return OK


def _extra(package: str) -> str:
    return f"'anamorph[{PACKAGES[package]}]'"
