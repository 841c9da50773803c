"""Run in an environment of optimum-onnx or optimum-intel, without anamorph.

    python -sE optimum_arm.py optimum-onnx|optimum-intel

Both export by themselves, once for each cache. Their traps are avoided: OpenVINO's precision is pinned (left alone it
takes bfloat16), weights are not quantised (left alone optimum-intel does so from a billion parameters on).
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from serve import Clock, Request, serve
from torch_arm import TorchArm

PACKAGES = ["optimum-onnx", "optimum-intel", "onnxruntime", "openvino", "diffusers", "transformers", "torch"]
PARTS = {"text_encoder": "text", "text_encoder_2": "text", "unet": "denoiser", "vae_decoder": "vae"}
MODULES = {"optimum-onnx": ("optimum.onnxruntime", "ORT"), "optimum-intel": ("optimum.intel", "OV")}
"""Peer -> where its pipelines are, and what their names begin with before diffusers' own."""
HINTS = {"float32": "f32", "bfloat16": "bf16"}
READ = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "tensor(float)": "float32",
        "tensor(float16)": "float16"}  # fmt: skip
"""What the engines call precisions -> our names."""


class Optimum(TorchArm):  # type: ignore[misc]
    """A pipeline of optimum with a clock on each model."""

    def __init__(self, peer: str) -> None:
        super().__init__()
        self.peer, (module, self.prefix) = peer, MODULES[peer]
        self.module = importlib.import_module(module)

    def open(self, request: Request) -> dict[str, Any]:
        """Export where this cache has none, and load."""
        self.cell, self.threads = request["cell"], request["threads"]
        self.torch.set_num_threads(self.threads)
        if self.cell["task"] not in ("text-to-image", "denoiser", "decode"):
            raise ValueError(f"{self.peer} is measured on text to image alone")
        exported = Path(request["cache"]) / self.peer
        index = json.loads((Path(request["folder"]) / "model_index.json").read_text(encoding="utf-8"))
        self.kind = getattr(self.module, self.prefix + index["_class_name"])
        clock = [time.perf_counter()]
        if not exported.exists():
            options = {"load_in_8bit": False, "compile": False} if self.peer == "optimum-intel" else {}
            self.kind.from_pretrained(request["folder"], export=True, **options).save_pretrained(exported)
        clock.append(time.perf_counter())
        self.pipe = self.load(exported)
        clock.append(time.perf_counter())
        self.take_scheduler(request["scheduler"])
        self.clock = Clock()
        for part, name in PARTS.items():
            if (model := getattr(self.pipe, part, None)) is not None:
                model.forward = self.clock.timed(name, model.forward)
        precision, placement = self.placed()
        phases = {"export_s": clock[1] - clock[0], "load_s": clock[2] - clock[1]}
        return {"phases": phases, "precision": precision, "placement": placement, "threads": self.threads}

    def load(self, folder: Path) -> Any:
        """Open what was exported; for the sizes of the cell alone where it is static."""
        if self.peer == "optimum-onnx":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
            return self.kind.from_pretrained(folder, session_options=options)
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[self.cell["precision"]],
            "EXECUTION_MODE_HINT": "ACCURACY" if self.cell["precision"] == "float32" else "PERFORMANCE",
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(self.threads), "CACHE_DIR": "",
        }  # fmt: skip
        pipe = self.kind.from_pretrained(folder, ov_config=settings, compile=False)
        if self.cell["static"]:
            pipe.reshape(1, self.cell["height"], self.cell["width"], self.cell["batch"])
        pipe.compile()
        return pipe

    def placed(self) -> tuple[str, list[str]]:
        """Precision and place, read back."""
        if self.peer == "optimum-onnx":
            session = self.pipe.unet.session
            kind = next(port.type for port in session.get_inputs() if port.name == "sample")
            threads = session.get_session_options().intra_op_num_threads
            return READ.get(kind, kind), [f"unet: {session.get_providers()[0]}, {threads} threads"]
        request = self.pipe.unet.request
        compiled = request.get_compiled_model() if hasattr(request, "get_compiled_model") else request
        hint = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        return READ.get(hint, hint), [f"unet: OpenVINO CPU in {hint}, {threads} threads"]

    def denoiser(self, given: dict[str, Any], extra: dict[str, Any], timestep: Any) -> Any:
        """The exported UNet."""
        named = {"added_cond_kwargs": extra} if extra else {}
        return self.pipe.unet(**given, timestep=timestep, **named, return_dict=False)[0]

    def decoder(self, latents: Any) -> Any:
        """The exported decoder."""
        return self.pipe.vae_decoder(latent_sample=latents, return_dict=False)[0]


if __name__ == "__main__":
    serve(lambda: Optimum(sys.argv[1]), PACKAGES)
