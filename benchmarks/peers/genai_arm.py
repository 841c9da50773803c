"""Run in an environment of openvino-genai, without anamorph: whole pictures from a folder that we exported.

    python -sE genai_arm.py

It opens folders in OpenVINO's format alone, takes its own few schedulers, gives pictures of eight bits, and tells the
seconds of its models but not the precision that they run in: how far its pictures are from eager's has to tell that.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from serve import Request, serve

PACKAGES = ["openvino-genai", "openvino", "openvino-tokenizers"]
HINTS = {"float32": "f32", "bfloat16": "bf16"}


class GenAi:
    """A pipeline of openvino-genai."""

    def __init__(self) -> None:
        import openvino_genai
        from genai_noise import Given

        self.genai = openvino_genai
        self.given = Given

    def open(self, request: Request) -> dict[str, Any]:
        """Load and compile, for the cell's sizes alone where it is static."""
        cell, threads = request["cell"], request["threads"]
        if cell["task"] != "text-to-image":
            raise ValueError("openvino-genai is measured on whole pictures alone")
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[cell["precision"]],
            "EXECUTION_MODE_HINT": "ACCURACY" if cell["precision"] == "float32" else "PERFORMANCE",
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads,
        }  # fmt: skip
        started = time.perf_counter()
        if cell["static"]:
            self.pipe = self.genai.Text2ImagePipeline(request["folder"])
            self.pipe.reshape(cell["batch"], cell["height"], cell["width"], cell["guidance"])
            self.pipe.compile("CPU", **settings)
        else:
            self.pipe = self.genai.Text2ImagePipeline(request["folder"], "CPU", **settings)
        return {
            "phases": {"export_s": 0.0, "load_s": time.perf_counter() - started},
            "precision": None,
            "placement": [f"asked for {HINTS[cell['precision']]} and {threads} threads; it does not tell"],
            "threads": None,
        }

    def run(self, inputs: Path) -> dict[str, Any]:
        """A whole picture."""
        started = time.perf_counter()
        self.draw(inputs)
        total = time.perf_counter() - started
        told = self.pipe.get_performance_metrics()
        steps = [value / 1e6 for value in told.raw_metrics.unet_inference_durations]
        text = sum(told.get_text_encoder_infer_duration().values()) / 1e3
        return {"total": total, "text": text, "steps": steps, "vae": told.get_vae_decoder_infer_duration() / 1e3}

    def stages(self, inputs: Path, out: Path) -> dict[str, Any]:
        """The picture alone."""
        picture = self.draw(inputs)  # owns the memory of its `data`
        np.save(out / "picture.npy", np.asarray(picture.data).astype(np.float32) / 255)
        return {"stages": ["picture"]}

    def draw(self, inputs: Path) -> Any:
        """Draw from the given latents."""
        call = json.loads((inputs / "call.json").read_text(encoding="utf-8"))
        return self.pipe.generate(**call, generator=self.given(np.load(inputs / "latents.npy")))


if __name__ == "__main__":
    serve(GenAi, PACKAGES)
