"""Run the snippets of a documentation text with both libraries; see `anamorph.benchmarks.snippets`."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from anamorph.benchmarks.snippets import cache, reading, rules
from anamorph.benchmarks.snippets.reading import Block
from anamorph.benchmarks.snippets.report import Result, report
from anamorph.errors import AnamorphError, InputError
from anamorph.files import replacing

LIBRARIES = ("anamorph", "diffusers")
SEEDED = re.compile(r"\bgenerator=|\bmanual_seed\(|\bget_inputs\(")
"""What is found in blocks whose pictures do not hang on chance."""
SEEDED_BEFORE = ("write_own_pipeline[20]",)
"""Others whose pictures do not, because a block before them seeds."""
SECONDS = 900
"""Longest time that a chapter may take."""


def run_chapter(
    chapter: str, found: Sequence[Block], library: str, place: Path, device: str, kept: Path
) -> list[Result]:
    """What comes of a chapter's blocks, in a process and a working folder of their own."""
    running = [block for block in found if rules.why_left_out(block) is None]
    codes = {block.number: rules.adapted(block, library, device)[0] for block in running}
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="snippets-") as folder:
        work = Path(folder)
        for name, what in _working_files(chapter, found, library).items():
            _copy(cache.found(place / "hub", what), work / name)
        job = {"given": rules.given(chapter, library), "codes": codes, "pictures": str(place / "pictures"),
               "kept": str(kept)}  # fmt: skip
        written, answers = work / ".job.json", work / ".results.jsonl"
        written.write_text(json.dumps(job), encoding="utf-8")
        ended = _process([str(written), str(answers)], work, place)
        lines = answers.read_text(encoding="utf-8").splitlines() if answers.exists() else []
    done = {line["number"]: line for line in map(json.loads, lines)}
    lost = {"seconds": 0.0, "error": f"not reached: {ended}"}
    return [
        Result(chapter, block.number, library, **{key: done.get(block.number, lost)[key] for key in lost})
        for block in running
    ]


def _working_files(chapter: str, found: Sequence[Block], library: str) -> dict[str, str]:
    files = {name: what.format(library=library) for name, what in rules.FILES.get(chapter, {}).items()}
    held = {name for ids in cache.RECIPES.values() for name in ids}
    return {**files, **{name: what for name, what in rules.clones(found).items() if what in held}}


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def _process(arguments: Sequence[str], work: Path, place: Path) -> str:
    """Run a chapter's process to its end; how it ended."""
    variables = {
        **os.environ, "HF_HOME": str(place), "HF_HUB_CACHE": str(place / "hub"), "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1", "HF_MODULES_CACHE": str(work / ".modules"), "ANAMORPH_CACHE": str(work / ".cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "anamorph.benchmarks.snippets.running", *arguments]
    try:
        done = subprocess.run(
            command, cwd=work, env=variables, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"the chapter took more than {SECONDS} s"
    said = done.stderr.strip().splitlines()
    return f"the process ended with code {done.returncode}: {said[-1] if said else 'without a word'}"


def differences(kept: Path, found: Sequence[Block]) -> dict[str, float]:
    """How far apart both libraries' pictures are at most, of 255, for blocks that name a generator; by block."""
    result = {}
    for block in found:
        both = [kept / library / block.chapter / f"{block.number}.npy" for library in LIBRARIES]
        if (SEEDED.search(block.code) or block.name in SEEDED_BEFORE) and all(path.exists() for path in both):
            ours, theirs = (np.load(path).astype(np.int16) for path in both)
            same_size = ours.shape == theirs.shape
            result[block.name] = float(np.abs(ours - theirs).max()) if same_size else float("inf")
    return result


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m anamorph.benchmarks.snippets", description=__doc__)
    parser.add_argument("spec", type=Path, help="the documentation as one text")
    parser.add_argument("--library", choices=LIBRARIES, nargs="+", default=LIBRARIES)
    parser.add_argument("--chapters", nargs="+", default=rules.CHAPTERS, help="ends of the pages' addresses")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: without the rules for processors")
    parser.add_argument("--cache", type=Path, default=Path("build/snippets"), help="where the checkpoints are made")
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    return parser.parse_args()


def blocks_of(spec: Path, names: Sequence[str]) -> dict[str, list[Block]]:
    """Chapter -> its blocks.

    Raises InputError: there is no such file or chapter.
    """
    try:
        pages = reading.chapters(spec.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{spec} cannot be read: {error.strerror}") from None
    if strange := [name for name in names if name not in pages]:
        raise InputError(f"{spec} has no chapter {', '.join(strange)}; it has {', '.join(pages)}")
    return {name: reading.blocks(name, pages[name]) for name in names}


def main() -> int:
    """Run, print the table; 0 unless a snippet fails here that diffusers runs."""
    options = arguments()
    try:
        found = blocks_of(options.spec, options.chapters)
        place = cache.filled(options.cache.resolve())
    except AnamorphError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    outcomes = list[Result]()
    with tempfile.TemporaryDirectory(prefix="snippets-drawn-") as folder:
        kept = Path(folder)
        for chapter, blocks in found.items():
            for library in options.library:
                print(f"{chapter} with {library}", file=sys.stderr, flush=True)
                outcomes += run_chapter(chapter, blocks, library, place, options.device, kept / library / chapter)
        apart = differences(kept, [block for blocks in found.values() for block in blocks])
    print(report(found, outcomes, apart, options.library, options.device))
    if options.out is not None:
        write(options.out, outcomes, apart)
    failed = {(one.chapter, one.number) for one in outcomes if one.library == "anamorph" and one.error}
    served = {(one.chapter, one.number) for one in outcomes if one.library == "diffusers" and not one.error}
    return 1 if failed & served else 0


def write(path: Path, outcomes: Sequence[Result], apart: Mapping[str, float]) -> None:
    """Everything as JSON."""
    content: dict[str, Any] = {"results": [asdict(one) for one in outcomes], "apart": dict(apart)}
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
