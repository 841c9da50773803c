"""Run in an environment of optimum-onnx or optimum-intel, without anamorph: export a checkpoint, or draw one picture.

    python -sE optimum_draw.py optimum-onnx|optimum-intel export CHECKPOINT OUT
    python -sE optimum_draw.py optimum-onnx|optimum-intel draw FOLDER CASE OUT

CASE holds `call.json` (arguments of the pipeline) and `latents.npy`. `draw` writes `opened.json` (versions) into OUT
when the pipeline is loaded, then `picture.npy` ([1, H, W, 3] in 0..1).
"""

import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

VERSIONS = {
    "optimum-onnx": ("optimum-onnx", "onnxruntime", "diffusers", "transformers"),
    "optimum-intel": ("optimum-intel", "openvino", "diffusers", "transformers"),
}


def load(peer: str, folder: str, **arguments: Any) -> Any:
    """The peer's own pipeline of the class that the folder names."""
    index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    module, prefix = {"optimum-onnx": ("optimum.onnxruntime", "ORT"), "optimum-intel": ("optimum.intel", "OV")}[peer]
    if peer == "optimum-intel":  # left alone, OpenVINO computes in bfloat16 where the processor has it
        arguments["ov_config"] = {"INFERENCE_PRECISION_HINT": "f32"}
    kind: Any = getattr(importlib.import_module(module), prefix + index["_class_name"])
    return kind.from_pretrained(folder, **arguments)


def draw(peer: str, folder: str, case: Path, out: Path) -> None:
    """One picture from the case's latents."""
    pipe = load(peer, folder)
    versions = {name: importlib.metadata.version(name) for name in VERSIONS[peer]}
    (out / "opened.json").write_text(json.dumps(versions), encoding="utf-8")
    pipe.set_progress_bar_config(disable=True)
    call = json.loads((case / "call.json").read_text(encoding="utf-8"))
    latents = torch.from_numpy(np.load(case / "latents.npy"))
    np.save(out / "picture.npy", pipe(**call, latents=latents, output_type="np").images)


def main(arguments: list[str]) -> None:
    """Parse the arguments and run."""
    peer, command, folder, *rest = arguments
    if command == "export":
        load(peer, folder, export=True).save_pretrained(rest[0])
    else:
        draw(peer, folder, Path(rest[0]), Path(rest[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
