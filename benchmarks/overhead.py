"""What the harness adds to what it measures: its figure beside that of a bare loop around the same call.

    python -m anamorph.benchmarks.overhead [--engine NAME] [--rounds 40] [RESULT.jsonl]

The loop and the arm call the same pipeline in turns, in one process; the loop's has no clocks on its parts. From a
result, also the seconds that each process of a cell took beside the work that was asked of it.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from anamorph.backends.cores import physical_cores
from anamorph.benchmarks import parity
from anamorph.benchmarks.arm import Engine
from anamorph.benchmarks.records import read
from anamorph.benchmarks.scenarios import Cell
from anamorph.benchmarks.statistics import interval
from anamorph.pipelines.base import DiffusionPipeline


def ratios(engine: str, rounds: int) -> list[float]:
    """The arm's seconds for a picture of the bundled model over the loop's, round by round, after one to warm up."""
    cell = Cell(engine=engine, guidance=4.0)
    checkpoint = parity.checkpoint_of(cell.model)
    arm = Engine(engine)
    opening = {"cell": asdict(cell), "folder": str(checkpoint.folder), "threads": physical_cores(), "scheduler": None}
    arm.open(opening)
    bare: Any = DiffusionPipeline.from_pretrained(checkpoint.folder, backend=engine)
    bare.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder)
        parity.write_inputs(cell, checkpoint, inputs, cell.steps)
        call = json.loads((inputs / "call.json").read_text(encoding="utf-8"))
        latents = np.load(inputs / "latents.npy")

        def loop() -> float:
            started = time.perf_counter()
            bare(**call, latents=latents)
            return time.perf_counter() - started

        both = [lambda: arm.run(inputs)["total"], loop]
        found = []
        for turn in range(rounds + 1):
            seconds = {index: both[index]() for index in ((0, 1) if turn % 2 else (1, 0))}
            found.append(seconds[0] / seconds[1])
    return found[1:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path)
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    found = ratios(options.engine, options.rounds)
    middle, (low, high) = statistics.median(found), interval([found])
    print(f"arm / bare loop: median {middle:.4f}, 95 % from {low:.4f} to {high:.4f}, {len(found)} rounds")
    if options.result:
        added = [burst["overhead_s"] for cell in read(options.result).cells.values() for burst in cell.bursts]
        print(f"seconds added to each process: median {statistics.median(added):.2f}, {len(added)} processes")


if __name__ == "__main__":
    main()
