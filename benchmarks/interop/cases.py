"""The bundled model's pictures that are compared: requests, first latents, folders and our own results."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.checkpoint import BUNDLED, Source, open_checkpoint
from anamorph.exporting import ExportOptions
from anamorph.noise import SeededNoise
from anamorph.pipelines import StableDiffusionPipeline
from anamorph.plugins import get_exporter
from anamorph.schedulers import DDIMScheduler

Picture = NDArray[np.float32]

FORMATS = {"onnx": "onnxruntime", "openvino": "openvino"}
"""Exported format -> our engine that opens it."""
CALLS: Mapping[str, Mapping[str, Any]] = {
    "64x64": {"prompt": "red apple", "negative_prompt": "grey", "height": 64, "width": 64, "guidance_scale": 4.0},
    "64x96": {"prompt": "a yellow heart", "height": 64, "width": 96, "guidance_scale": 1.0},
}
"""Height x width -> arguments of the pipelines: with guidance and without, square and not."""
STEPS = 10
"""openvino-genai 2026.4 takes a step too many where 1000 over the number of steps is no binary fraction."""
DDIM = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing",
        "steps_offset", "rescale_betas_zero_snr", "thresholding")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One request with its first latents [1, C, h, w], kept as files in `folder`."""

    name: str
    folder: Path
    call: Mapping[str, Any]
    latents: Picture


def write_cases(place: Path) -> list[Case]:
    """Write `call.json` and `latents.npy` of every case below `place`."""
    cases = []
    for number, (name, arguments) in enumerate(CALLS.items()):
        call = {**arguments, "num_inference_steps": STEPS}
        latents = SeededNoise((number,)).normal((4, call["height"] // 4, call["width"] // 4))
        folder = place / name
        folder.mkdir(parents=True)
        (folder / "call.json").write_text(json.dumps(call), encoding="utf-8")
        np.save(folder / "latents.npy", latents)
        cases.append(Case(name, folder, call, latents))
    return cases


def export(form: str, folder: Path) -> None:
    """The bundled model in one format, as `anamorph export` writes it."""
    source = open_checkpoint(Source(str(BUNDLED)))
    get_exporter([form]).export(source, folder, ExportOptions(), lambda _: None)


def ddim_config() -> dict[str, Any]:
    """The bundled model's noise levels for a DDIM scheduler, written out in full.

    openvino-genai has no DPM-Solver, and reads no number that JSON does not have (its config says -Infinity).
    """
    own = json.loads((BUNDLED / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    kept = {key: own[key] for key in DDIM}
    return {"_class_name": "DDIMScheduler", **kept, "clip_sample": False, "set_alpha_to_one": True}


def with_ddim(folder: Path, copy: Path) -> None:
    """A copy of an exported folder whose scheduler is DDIM."""
    shutil.copytree(folder, copy)
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(ddim_config(), indent=2), encoding="utf-8")


def draw(folder: Path, engine: str, case: Case, *, ddim: bool = False) -> Picture:
    """Our picture [1, H, W, 3] in 0..1."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, backend=engine)
    pipe.set_progress_bar_config(disable=True)
    if ddim:
        pipe.scheduler = DDIMScheduler.from_config(ddim_config())
    assert isinstance(pipe, StableDiffusionPipeline)
    picture: Picture = pipe(**case.call, latents=case.latents, output_type="np").images
    return picture
