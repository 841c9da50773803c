"""`anamorph cache`: what is kept between starts, why a start finds it or not, making it ahead, and removing it."""

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anamorph.cache import cache_folder
from anamorph.cli import OK
from anamorph.entries import ENTRY, every
from anamorph.errors import InputError

DAY = 86400.0


@dataclass(frozen=True)
class Kept:
    """One thing in the cache: its name (a path below the cache), what it is, bytes, and seconds since its last use."""

    name: str
    what: str
    size: int
    unused: float


def run(options: argparse.Namespace) -> int:
    """One of the actions."""
    actions = {"ls": _list, "rm": _remove, "explain": _explain, "prebuild": _prebuild}
    return actions[options.action](options)


def kept() -> list[Kept]:
    """Everything in the cache but its small records, the largest first."""
    root, known = cache_folder(), {entry.folder: entry for entry in every()}
    found = []
    places = [place for place in root.glob("[!.]*/[!.]*") if place.parent.name not in ("digests", "inductor")]
    for place in sorted([*places, *root.glob("inductor")]):
        entry = known.get(place)
        what = (
            place.relative_to(root).parts[0]
            if entry is None
            else f"{entry.key.engine}, {entry.key.precision}, {entry.key.shape}"
        )
        marks = [place / ENTRY, place / "anamorph.json", place]
        used = next(mark.stat().st_mtime for mark in marks if mark.exists())
        found.append(Kept(place.relative_to(root).as_posix(), what, _size(place), max(0.0, time.time() - used)))
    return sorted(found, key=lambda one: -one.size)


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in (place, *place.rglob("*")) if path.is_file())


def _list(options: argparse.Namespace) -> int:
    found = kept()
    if options.json:
        print(json.dumps({"folder": str(cache_folder()), "entries": [asdict(one) for one in found]}, indent=2))
        return OK
    for one in found:
        print(f"{_bytes(one.size)}  {one.unused / DAY:5.1f} days  {one.name}  {one.what}")
    print(f"{_bytes(sum(one.size for one in found))}  in {cache_folder()}")
    return OK


def _bytes(size: int) -> str:
    return f"{size / 2**20:9.1f} MiB"


def _remove(options: argparse.Namespace) -> int:
    """Remove entries by name, those that were not used for some days, or all."""
    if not (options.names or options.all or options.unused is not None):
        raise InputError("nothing is named; give names that `anamorph cache ls` prints, --unused DAYS or --all")
    found = {one.name: one for one in kept()}
    if lost := [name for name in options.names if name not in found]:
        raise InputError(f"the cache holds nothing called {', '.join(lost)}; see `anamorph cache ls`")
    old = (lambda one: one.unused > options.unused * DAY) if options.unused is not None else (lambda _: False)
    chosen = [one for one in found.values() if options.all or one.name in options.names or old(one)]
    for one in chosen:
        place = cache_folder() / one.name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    if options.all:
        shutil.rmtree(cache_folder() / "digests", ignore_errors=True)
    print(f"removed {len(chosen)} of {len(found)}, {_bytes(sum(one.size for one in chosen)).strip()}")
    return OK


def _explain(options: argparse.Namespace) -> int:
    from anamorph.cli.cache_explained import explained

    rows = list(explained(options))
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return OK
    for row in rows:
        print(f"{row.part}: {row.engine}")
        print("".join(f"  {line}\n" for line in row.lines), end="")
    return OK


def _prebuild(options: argparse.Namespace) -> int:
    """Draw one step at the wished size: all that a later start takes from the cache is then there."""
    from anamorph.cli.common import load_pipeline
    from anamorph.cli.generate import size

    height, width = size(options.size)
    started = time.perf_counter()
    pipe: Any = load_pipeline(options.model, options, options.variant)
    pipe(prompt="", num_inference_steps=1, num_images_per_prompt=options.count, height=height, width=width)
    for placed in pipe.placement.values():
        print(placed)
        print("".join(f"  {line}\n" for line in placed.history), end="")
    print(f"done in {time.perf_counter() - started:.1f} s")
    return OK
