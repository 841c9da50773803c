"""Run every peer on our folders and our engines on theirs; see `anamorph.benchmarks.interop`."""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anamorph.benchmarks import peers
from anamorph.benchmarks.interop.cases import FORMATS, Case, Model, Picture, draw, export, models, write_cases
from anamorph.errors import AnamorphError
from anamorph.image import psnr

SCRIPTS = Path(peers.__file__).parent
ENOUGH = 40.0
"""Decibels; pictures that are further apart fail."""
SECONDS = 900
"""Longest time that a peer may take for one command."""


@dataclass(frozen=True)
class Peer:
    """Another tool: its environment's name, the format of its folders, the script that runs it there.

    `eight_bits`: it hands out no other pixels. `width_first`: it tells SDXL's denoisers widths before heights.
    """

    name: str
    form: str
    script: tuple[str, ...]
    eight_bits: bool = False
    width_first: bool = False
    exports: bool = True


PEERS = (
    Peer("optimum-onnx", "onnx", ("optimum_draw.py", "optimum-onnx", "draw")),
    Peer("optimum-intel", "openvino", ("optimum_draw.py", "optimum-intel", "draw")),
    Peer("openvino-genai", "openvino", ("genai_draw.py",), eight_bits=True, width_first=True, exports=False),
)


@dataclass(frozen=True)
class Row:
    """One line of the table: who opened whose folder, and how far its picture is from eager's and our engine's."""

    folder: str
    opener: str
    case: str
    opened: bool
    decibels: tuple[float, ...] = ()
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether a picture came and is close enough to all of ours."""
        return bool(self.decibels) and all(value >= ENOUGH for value in self.decibels)


class References:
    """Our own pictures, each drawn once."""

    def __init__(self, folders: Path) -> None:
        self.folders = folders
        self.drawn: dict[tuple[str, str, bool], Picture] = {}

    def of(self, engine: str, case: Case, width_first: bool) -> Picture:
        """Eager's from the checkpoint, another engine's from our export."""
        key = (engine, case.name, width_first)
        if key not in self.drawn:
            form = next((form for form, name in FORMATS.items() if name == engine), None)
            folder = case.model.checkpoint if form is None else self.folders / form / case.model.name
            self.drawn[key] = draw(folder, engine, case, width_first)
        return self.drawn[key]

    def decibels(self, picture: Picture, peer: Peer, case: Case, by_peer: bool = True) -> tuple[float, ...]:
        """PSNR to eager's picture and to the one of our engine for that format; the picture is `by_peer` or by us."""
        ours = [self.of(engine, case, peer.width_first and by_peer) for engine in ("eager", FORMATS[peer.form])]
        return tuple(psnr(picture, np.round(one * 255) / 255 if peer.eight_bits else one) for one in ours)


def run(python: Path, arguments: Sequence[str]) -> str | None:
    """Run a script in a peer's environment, offline; None, or why it failed."""
    if not python.exists():
        return f"{python} is missing; run: make peers"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [str(python), "-sE", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"it took more than {SECONDS} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]


def ours_in_theirs(root: Path, peer: Peer, cases: Sequence[Case], references: References) -> Iterator[Row]:
    """The peer opens our folder as it is."""
    for case in cases:
        folder = references.folders / peer.form / case.model.name
        out = root / "artifacts" / "drawn" / peer.name / case.name
        out.mkdir(parents=True)
        script, *rest = peer.script
        python = root / peer.name / "bin" / "python"
        failure = run(python, [str(SCRIPTS / script), *rest, str(folder), str(case.folder), str(out)])
        known = out / "opened.json"
        versions = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
        opener = f"{peer.name} {versions.get(peer.name, '')}".strip()
        name = f"ours, {peer.form}"
        if failure is not None:
            yield Row(name, opener, case.name, bool(versions), note=failure)
            continue
        picture = np.load(out / "picture.npy")
        notes = {"8-bit pixels": peer.eight_bits, "told width before height": peer.width_first and case.sizes}
        note = ", ".join(text for text, applies in notes.items() if applies)
        yield Row(name, opener, case.name, True, references.decibels(picture, peer, case), note)


def theirs_in_ours(
    root: Path, peer: Peer, model: Model, cases: Sequence[Case], references: References
) -> Iterator[Row]:
    """The peer exports the checkpoint, and our engine opens that."""
    folder = root / "artifacts" / "theirs" / peer.form / model.name
    python = root / peer.name / "bin" / "python"
    arguments = [str(SCRIPTS / peer.script[0]), peer.name, "export", str(model.checkpoint), str(folder)]
    failure = run(python, arguments)
    engine = FORMATS[peer.form]
    for case in cases:
        if failure is not None:
            yield Row(f"{peer.name}'s", engine, case.name, False, note=f"its export failed: {failure}")
            continue
        try:
            picture = draw(folder, engine, case)
        except AnamorphError as error:
            yield Row(f"{peer.name}'s", engine, case.name, False, note=str(error))
            continue
        decibels = references.decibels(picture, peer, case, by_peer=False)
        yield Row(f"{peer.name}'s", engine, case.name, True, decibels)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [("folder", "opened by", "picture", "opened", "dB to eager", "dB to ours", "", "")]
    for row in rows:
        eager, ours = [f"{value:.1f}" for value in row.decibels] or ["-", "-"]
        opened, verdict = "yes" if row.opened else "no", "ok" if row.passed else "FAILED"
        lines.append((row.folder, row.opener, row.case, opened, eager, ours, verdict, row.note))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main() -> int:
    """Run all that is asked for; 0 if every row passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("build/peers"), help="where the environments lie")
    parser.add_argument("--peer", choices=[peer.name for peer in PEERS], help="only this one")
    parser.add_argument("--model", choices=["sd", "xl"], help="only this one")
    options = parser.parse_args()
    root = options.root.resolve()
    artifacts = root / "artifacts"
    shutil.rmtree(artifacts, ignore_errors=True)
    every = [model for model in models(artifacts / "checkpoints") if options.model in (None, model.name)]
    cases = {model: write_cases(model, artifacts / "cases" / model.name) for model in every}
    peers = [peer for peer in PEERS if options.peer in (None, peer.name)]
    for form in sorted({peer.form for peer in peers}):
        for model in every:
            print(f"exporting {model.name} to {form}", flush=True)
            export(form, model, artifacts / form / model.name)
    references, rows = References(artifacts), list[Row]()
    for peer, model in itertools.product(peers, every):
        print(f"{peer.name} opens our folder of {model.name}", flush=True)
        rows += ours_in_theirs(root, peer, cases[model], references)
        if peer.exports:
            print(f"we open the folder that {peer.name} exports of {model.name}", flush=True)
            rows += theirs_in_ours(root, peer, model, cases[model], references)
    print(f"\n{table(rows)}")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
