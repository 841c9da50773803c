"""`anamorph export`: a checkpoint to a certified folder for one engine."""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from anamorph.artifact import NATIVE
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.cli import OK
from anamorph.cli.common import folder_of
from anamorph.errors import InputError
from anamorph.exporting import LINKED, Check, CoreMl, ExportOptions, Quantization
from anamorph.pipelines.wishes import precision_name
from anamorph.plugins import get_exporter

NUMBER = re.compile(r"\.\d+ at ")
"""The number of an output of which a part has one per layer."""


def static_sizes(text: str | None) -> list[tuple[int, int]]:
    """`512x768,768x512` -> (512, 768) and (768, 512), height first.

    Raises InputError: the text is of another form.
    """
    sizes = [] if text is None else [re.fullmatch(r"(\d+)x(\d+)", size.strip()) for size in text.split(",")]
    if not all(sizes):
        raise InputError(f"--static {text!r} is not of the form HxW, such as 512x768, or several of these with commas")
    return [(int(size[1]), int(size[2])) for size in sizes if size]


def core_ml(options: argparse.Namespace, sizes: Sequence[tuple[int, int]]) -> CoreMl | None:
    """What is asked for of Core ML's packages alone, or None."""
    asked = {
        "attention": options.attention, "palette": options.palettize, "version": options.apple_names,
        "chunked": options.chunk_unet or None, "sizes": tuple(sizes[1:]) or None,
    }  # fmt: skip
    given = {name: value for name, value in asked.items() if value is not None}
    return CoreMl(**given) if given else None


def quantization(options: argparse.Namespace) -> Quantization | None:
    """What `--quantize` and its companions ask for; raises InputError: one is missing, or has no meaning alone."""
    if options.quantize is None:
        if options.calibrate is not None:
            raise InputError("--calibrate has no meaning without --quantize int8; leave it out")
        return None
    if options.calibrate is None:
        raise InputError("--quantize needs --calibrate FILE: prompts of the kind that will be drawn, one on each line")
    try:
        lines = Path(options.calibrate).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{options.calibrate} cannot be read ({error}); name a text file of prompts") from None
    return Quantization(tuple(line.strip() for line in lines if line.strip()), error=options.quantize_error)


def say(message: str) -> None:
    """Progress goes to the error stream."""
    print(f"anamorph: {message}", file=sys.stderr, flush=True)


def rows(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """A certificate as plain JSON types."""
    return [{**asdict(check), "passed": check.passed} for check in checks]


def table(checks: Sequence[Check]) -> str:
    """A certificate for people: a line per comparison; the worst stands for those that differ in a number alone."""
    width = max((len(check.part) for check in checks), default=0)
    lines = [f"{'part':<{width}}  relative L2  allowed  largest difference  compared"]
    for check in _worst(checks):
        measured = check.difference
        mark = "" if check.passed else "  DIFFERS"
        lines.append(
            f"{check.part:<{width}}  {measured.relative_l2:11.1e}  {check.tolerance:7.0e}  {measured.max_abs:18.1e}  "
            f"{check.what}{mark}"
        )
    return "\n".join(lines)


def _worst(checks: Sequence[Check]) -> Iterable[Check]:
    """All that differ, and of the others the worst of each part, output and sizes: `hidden_states.*` is every layer."""
    found: dict[tuple[str, str], Check] = {}
    for check in checks:
        what = NUMBER.sub(".* at ", check.what) if check.passed and check.block is None else check.what
        old = found.get((check.part, what))
        if old is None or old.difference.relative_l2 < check.difference.relative_l2:
            found[check.part, what] = replace(check, what=what)
    return found.values()


def run(options: argparse.Namespace) -> int:
    """Export, certify, print the certificate."""
    if options.link and options.dtype:
        raise InputError("--link keeps the checkpoint's own type of weights; leave out --dtype or --link")
    named = None if options.dtype is None else precision_name(options.dtype)
    signature, sizes = NATIVE if options.link else options.signature, static_sizes(options.static)
    wishes = ExportOptions(
        LINKED if options.link else named, next(iter(sizes), None), options.batch, signature, options.rewrites,
        quantization(options), core_ml(options, sizes),
    )  # fmt: skip
    exporter = get_exporter([options.to])
    checkpoint = open_checkpoint(Source(folder_of(options.model), variant=options.variant))
    checks = exporter.export(checkpoint, Path(options.out), wishes, say)
    if options.json:
        print(json.dumps({"folder": options.out, "format": exporter.format, "certificate": rows(checks)}, indent=2))
    else:
        print(f"{table(checks)}\n\n{options.out}")
    return OK
