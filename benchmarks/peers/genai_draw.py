"""Run in an environment of openvino-genai, without anamorph: draw one picture.

    python -sE genai_draw.py FOLDER CASE OUT

CASE holds `call.json` (arguments of the pipeline) and `latents.npy`. Writes `opened.json` (versions) into OUT when the
pipeline is loaded, then `picture.npy` ([1, H, W, 3] in 0..1, from its 8-bit pixels).
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import openvino_genai
from genai_noise import Given

VERSIONS = ("openvino-genai", "openvino", "openvino-tokenizers")
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}


def main(folder: str, case: Path, out: Path) -> None:
    """One picture from the case's latents."""
    pipe = openvino_genai.Text2ImagePipeline(folder, "CPU", **SETTINGS)
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    (out / "opened.json").write_text(json.dumps(versions), encoding="utf-8")
    call = json.loads((case / "call.json").read_text(encoding="utf-8"))
    picture = pipe.generate(**call, generator=Given(np.load(case / "latents.npy")))  # owns the memory of its `data`
    np.save(out / "picture.npy", picture.data.astype(np.float32) / 255)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
