"""The pictures that are compared: models, requests, first latents, folders and our own results."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.benchmarks.interop import xl
from anamorph.checkpoint import BUNDLED, Source, open_checkpoint
from anamorph.exporting import ExportOptions
from anamorph.noise import SeededNoise
from anamorph.pipelines import DiffusionPipeline
from anamorph.plugins import get_exporter

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


FACTOR = 4
"""Pixels per latent of both models."""


@dataclass(frozen=True)
class Model:
    """A checkpoint whose exports are compared."""

    name: str
    checkpoint: Path


@dataclass(frozen=True)
class Case:
    """One request of a model, with its first latents [1, C, h, w], kept as files in `folder`."""

    model: Model
    name: str
    folder: Path
    call: Mapping[str, Any]
    latents: Picture

    @property
    def sizes(self) -> Mapping[str, Any]:
        """Arguments that tell a denoiser of SDXL's kind its widths before its heights."""
        size = self.call["width"], self.call["height"]
        return {"original_size": size, "target_size": size} if self.model.name == "xl" else {}


def models(place: Path) -> list[Model]:
    """The bundled model, and a tiny one of SDXL's kind, which is written below `place`."""
    xl.make(place / "xl")
    return [Model("sd", BUNDLED), Model("xl", place / "xl")]


def write_cases(model: Model, place: Path) -> list[Case]:
    """Write `call.json` and `latents.npy` of every case of a model below `place`."""
    cases = []
    for number, (name, arguments) in enumerate(CALLS.items()):
        call = {**arguments, "num_inference_steps": STEPS}
        latents = SeededNoise((number,)).normal((4, call["height"] // FACTOR, call["width"] // FACTOR))
        folder = place / name
        folder.mkdir(parents=True)
        (folder / "call.json").write_text(json.dumps(call), encoding="utf-8")
        np.save(folder / "latents.npy", latents)
        cases.append(Case(model, f"{model.name} {name}", folder, call, latents))
    return cases


def export(form: str, model: Model, folder: Path) -> None:
    """A model in one format, as `anamorph export` writes it."""
    source = open_checkpoint(Source(str(model.checkpoint)))
    get_exporter([form]).export(source, folder, ExportOptions(), lambda _: None)


def draw(folder: Path, engine: str, case: Case, width_first: bool = False) -> Picture:
    """Our picture [1, H, W, 3] in 0..1; `width_first`: the denoiser is told widths before heights, if any."""
    pipe = DiffusionPipeline.from_pretrained(folder, backend=engine)
    pipe.set_progress_bar_config(disable=True)
    picture: Picture = pipe(
        **case.call, **(case.sizes if width_first else {}), latents=case.latents, output_type="np"
    ).images
    return picture
