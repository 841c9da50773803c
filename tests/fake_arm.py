"""An arm that computes nothing, for tests of the harness: its first argument says how it behaves.

good | wrong (its numbers differ) | lying (runs in another precision) | crashing | hungry | silent | refusing
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from serve import serve

COUNTS = {"flops": {"denoiser": 1000, "picture": 9}, "exponentials": {"denoiser": 10, "picture": 1}}
"""Of the model without rewrites."""


class Fake:
    """Sleeps where a model would compute."""

    def __init__(self) -> None:
        self.behaviour = sys.argv[1]

    def open(self, request: dict[str, Any]) -> dict[str, Any]:
        print("noise that a library prints")
        if self.behaviour == "crashing":
            sys.exit("the engine fell over")
        if self.behaviour == "hungry":
            np.ones(1 << 40, np.uint8)
        if self.behaviour == "silent":
            time.sleep(60)
        if self.behaviour == "refusing" and request["cell"]["batch"] > 1:
            raise MemoryError("batch 2 does not fit")
        self.counts = COUNTS if request["cell"]["rewrites"] == "none" else {"flops": {"denoiser": 800}}
        precision = "bfloat16" if self.behaviour == "lying" else request["cell"]["precision"]
        cache = Path(request["cache"]) / "seen"
        cold = not cache.exists()
        cache.touch()
        phases = {"export_s": 0.05 * cold, "load_s": 0.01}
        time.sleep(sum(phases.values()))
        return {"phases": phases, "precision": precision, "placement": ["fake"], "threads": 1}

    def run(self, _: Path) -> dict[str, Any]:
        started = time.perf_counter()
        time.sleep(0.004)
        return {"total": time.perf_counter() - started, "text": 0.0, "steps": [0.001, 0.001], "vae": 0.001, "post": 0}

    def stages(self, inputs: Path, out: Path) -> dict[str, Any]:
        latents = np.load(inputs / "latents.npy")
        wrong = 1.01 if self.behaviour == "wrong" else 1.0
        np.save(out / "denoiser.npy", latents * wrong)
        np.save(out / "picture.npy", np.full((1, 4, 4, 3), 0.5))
        return {"stages": ["denoiser", "picture"], "counts": self.counts}


serve(Fake, ["numpy"])
