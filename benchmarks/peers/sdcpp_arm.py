"""Run in an environment of stable-diffusion.cpp, without anamorph: whole pictures from a checkpoint's folder.

    python -sE sdcpp_arm.py

It takes neither latents nor a scheduler's configuration, but draws noise as PyTorch does on a processor, from a seed,
and steps along given sigmas: those of an Euler scheduler are the same work. Its pictures have eight bits, and its
convolutions take half precision whatever is asked for: how far the pictures are from eager's has to tell.
"""

import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from serve import Request, serve

PACKAGES = ["stable-diffusion-cpp-python"]
WEIGHTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
SCHEDULER = "EulerDiscreteScheduler"
SPACINGS = ("linspace", "trailing")
"""Those of whose first sigma the noise is a plain multiple, as here."""
SEED = 0
"""That of the fixed latents' first picture; the next ones count on."""


class StableDiffusionCpp:
    """A pipeline of stable-diffusion.cpp."""

    def __init__(self) -> None:
        import stable_diffusion_cpp

        self.library = stable_diffusion_cpp

    def open(self, request: Request) -> dict[str, Any]:
        """Load; raises ValueError where its work would be another than the cell's."""
        cell = request["cell"]
        config = request["scheduler"] or {}
        if cell["task"] != "text-to-image":
            raise ValueError("stable-diffusion.cpp is measured on whole pictures alone; set task to text-to-image")
        if config.get("_class_name") != SCHEDULER or config["timestep_spacing"] not in SPACINGS:
            raise ValueError(f"it is measured with other noise; set scheduler to {SCHEDULER}, spacing to trailing")
        if config["prediction_type"] not in PREDICTIONS:
            raise ValueError(f"prediction_type is {config['prediction_type']}, it knows {' and '.join(PREDICTIONS)}")
        self.config = config
        started = time.perf_counter()
        self.model = self.library.StableDiffusion(
            model_path=request["folder"], wtype=WEIGHTS[cell["precision"]], n_threads=request["threads"],
            prediction=PREDICTIONS[config["prediction_type"]], rng_type="cpu", sampler_rng_type="cpu",
            vae_decode_only=True, verbose=False,
        )  # fmt: skip
        return {
            "phases": {"export_s": 0.0, "load_s": time.perf_counter() - started},
            "precision": None,
            "placement": [f"asked for weights in {WEIGHTS[cell['precision']]}; it does not tell"],
            "threads": request["threads"],
        }

    def run(self, inputs: Path) -> dict[str, Any]:
        """A whole picture; all that follows the last step counts as the decoder's."""
        marks = [time.perf_counter()]
        self.draw(inputs, lambda *_: marks.append(time.perf_counter()))
        ended = time.perf_counter()
        steps = [after - before for before, after in pairwise(marks[1:])]
        return {"total": ended - marks[0], "text": marks[1] - marks[0], "steps": steps, "vae": ended - marks[-1]}

    def stages(self, inputs: Path, out: Path) -> dict[str, Any]:
        """The picture alone."""
        pictures = self.draw(inputs, lambda *_: None)  # it would call the last one, which is gone
        np.save(out / "picture.npy", np.stack([np.asarray(one.convert("RGB"), np.float32) / 255 for one in pictures]))
        return {"stages": ["picture"]}

    def draw(self, inputs: Path, progress: Any) -> Any:
        """Draw from the noise of the seeds that the given latents are made of."""
        call = json.loads((inputs / "call.json").read_text(encoding="utf-8"))
        return self.model.generate_image(
            prompt=call["prompt"], negative_prompt=call.get("negative_prompt", ""), height=call["height"],
            width=call["width"], cfg_scale=call["guidance_scale"], sample_steps=call["num_inference_steps"],
            sample_method="euler", sigmas=", ".join(map(str, sigmas(self.config, call["num_inference_steps"]))),
            seed=SEED, batch_count=call["num_images_per_prompt"], progress_callback=progress,
        )  # fmt: skip


def sigmas(config: Request, steps: int) -> list[float]:
    """Those of the steps, and 0: sqrt((1 - a) / a) between the training's (Karras et al. 2022, arXiv:2206.00364)."""
    count, first, last = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["beta_schedule"] != "scaled_linear":
        raise ValueError(f"sigmas are known for betas that are scaled_linear, not {config['beta_schedule']}")
    betas = np.linspace(math.sqrt(first), math.sqrt(last), count) ** 2
    kept = np.cumprod(1 - betas)
    known = np.sqrt((1 - kept) / kept)
    spaced = config["timestep_spacing"] == "linspace"
    at = np.linspace(0, count - 1, steps)[::-1] if spaced else np.round(count - count / steps * np.arange(steps)) - 1
    return [*np.interp(at, np.arange(count), known).tolist(), 0.0]


if __name__ == "__main__":
    serve(StableDiffusionCpp, PACKAGES)
