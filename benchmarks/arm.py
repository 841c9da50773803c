"""Our own engines as an arm: the process that the parent starts for a cell.

    python -P -m anamorph.benchmarks.arm ENGINE

speaks the protocol that `anamorph.benchmarks.peers` describes.
"""

import hashlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anamorph.arrays import Array
from anamorph.artifact import NATIVE
from anamorph.benchmarks.adapters import denoiser_layers, synthetic
from anamorph.benchmarks.operations import counted
from anamorph.benchmarks.peers.serve import Clock, Request, serve, start_pictures
from anamorph.benchmarks.scenarios import Cell
from anamorph.cache import cache_folder
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.components import CHECKPOINT
from anamorph.decoders import SCALED
from anamorph.engine import Around, Session
from anamorph.exporting import LINKED, ExportOptions, Quantization, cached_export
from anamorph.memory import APART
from anamorph.pipelines import LatentDiffusion
from anamorph.pipelines.auto import AutoPipelineForImage2Image, AutoPipelineForInpainting
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.denoiser import branch_by_branch
from anamorph.pipelines.loaded import Loaded
from anamorph.plugins import get_backend, get_exporter
from anamorph.rewrites import named
from anamorph.scaling import Scaling
from anamorph.schedulers import load_scheduler
from anamorph.stepping import SCOPE

PACKAGES = ["anamorph", "numpy", "torch", "onnxruntime", "openvino"]
LIBRARIES = {"eager": "torch", "compile": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}
"""What an engine imports when it opens something; imported early, so that loading is timed without it."""
NAMES = {"text_encoder": "text", "text_encoder_2": "text", "unet_prepare": "text", "unet": "denoiser",
         "unet_shallow": "denoiser", "transformer": "denoiser", "vae_decoder": "vae", "controlnet": "control",
         "controlnet_prepare": "text", "controlnet_hint": "encode",
         "vae_encoder": "encode"}  # fmt: skip
"""Parts -> phases."""
TIMESTEP = 500.0
CALIBRATION = ("red apple", "a photograph of a lighthouse on a cliff at dusk", "a smiling face", "a green tree")
"""Prompts from which int8 takes its ranges."""
KINDS: dict[str, type[DiffusionPipeline]] = {
    "image-to-image": AutoPipelineForImage2Image,
    "inpaint": AutoPipelineForInpainting,
}
"""Tasks that need another pipeline than the checkpoint names."""


@dataclass(frozen=True)
class Timed(Around):
    """A program whose calls a clock notes."""

    name: str
    clock: Clock

    def session(self) -> Session:
        """The program's, timed."""
        timed: Session = self.clock.timed(self.name, self.program.session())
        return timed

    def shown(self, loaded: Loaded) -> Any:
        """The component: a model that is called directly would not be timed."""
        return loaded


class Engine:
    """One engine of ours with one cell's pipeline."""

    def __init__(self, engine: str) -> None:
        self.backend = get_backend(engine)
        if engine in LIBRARIES:
            importlib.import_module(LIBRARIES[engine])

    def open(self, request: Request) -> dict[str, Any]:
        """Export where the engine needs it, load, and put clocks on all parts."""
        cell = Cell(**request["cell"])
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(request["threads"])
        clock = [time.perf_counter()]
        folder = self._exported(request["folder"], cell)
        clock.append(time.perf_counter())
        rewrites = cell.rewrites or None if folder == request["folder"] else None  # an export has its own
        pipe = KINDS.get(cell.task, DiffusionPipeline).from_pretrained(
            folder, backend=self.backend.name, torch_dtype=cell.precision, rewrites=rewrites,
            guidance_batch=cell.guidance_batch or None,
        )  # fmt: skip
        if cell.lora:
            _adapt(pipe, *cell.lora.split("-"))
        clock.append(time.perf_counter())
        self.cell, self.clock = cell, Clock(_waiting(pipe))
        self.pipe = _timed(pipe, self.clock)
        if request["scheduler"]:
            self.pipe.scheduler = load_scheduler(request["scheduler"])
        places = list(self.pipe.placement.values())
        found = {placed.precision for placed in places}
        export, load = np.diff(clock)
        return {
            "phases": {"export_s": float(export), "load_s": float(load)},
            "precision": found.pop() if len(found) == 1 else "mixed",
            "placement": [str(placed) for placed in places],
            "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
        }

    def _exported(self, folder: str, cell: Cell) -> str:
        """What is opened: the checkpoint, or a folder for this cell's wishes alone."""
        wish = cell.rewrites or None
        if CHECKPOINT in self.backend.formats and not cell.quantize:
            return folder
        exporter = get_exporter(self.backend.formats)
        source = open_checkpoint(Source(folder))
        if not cell.static and not cell.quantize:
            cached_export(source, exporter, wish)
            return folder
        quantize = Quantization(CALIBRATION) if cell.quantize else None
        size, batch = ((cell.height, cell.width), cell.batch) if cell.static else (None, None)
        options = ExportOptions(LINKED, size, batch, NATIVE, wish, quantize)
        name = hashlib.sha256(str(options).encode()).hexdigest()[:16]
        place = cache_folder() / f"benchmark-{exporter.format}-{name}"
        if not place.exists():
            exporter.export(source, place, options, lambda _: None)
        return str(place)

    def run(self, inputs: Path) -> dict[str, Any]:
        """The cell's task once."""
        tasks = {"denoiser": self._denoising, "decode": self._decoding}
        return self.clock.measure(tasks.get(self.cell.task, self._drawing)(inputs))

    def stages(self, inputs: Path, out: Path) -> dict[str, Any]:
        """Text, denoiser, decoder and a whole picture; with PyTorch eager also what they cost in operations."""
        work: dict[str, Callable[[], Any]] = {
            "text": self._texts(inputs),
            "vae": self._decoding(inputs),
            "picture": self._drawing(inputs, "np"),
        }
        if SCOPE not in named(self.cell.rewrites or None):  # such a denoiser hands out samples, not what it predicts
            work["denoiser"] = self._denoising(inputs)
        counts: dict[str, dict[str, int]] = {"flops": {}, "exponentials": {}}
        for name, function in work.items():
            with counted() if self.backend.name == "eager" else nullcontext() as found:
                value = function()
            np.save(out / f"{name}.npy", value)
            if found is not None:
                counts["flops"][name], counts["exponentials"][name] = found.flops, found.exponentials
        return {"stages": list(work), "counts": counts}

    def _texts(self, inputs: Path) -> Callable[[], Any]:
        call = _call(inputs)
        return lambda: self.pipe.encode([call["prompt"]])

    def _drawing(self, inputs: Path, output_type: str = "pil") -> Callable[[], Any]:
        call = _call(inputs)
        if self.cell.guided is not None:
            call["guidance_interval"] = self.cell.guided
        if self.cell.refresh is not None:
            call["step_caching"] = self.cell.refresh
        if pictures := start_pictures(inputs):
            given = {**pictures, "seed": list(range(self.cell.batch))}
        else:
            given = {"latents": np.load(inputs / "latents.npy")}
        return lambda: self.pipe(**call, **given, output_type=output_type).images

    def _denoising(self, inputs: Path) -> Callable[[], Any]:
        denoiser = self.pipe.denoiser()
        arrays = denoiser.arrays
        given = {path.name.split(".")[1]: arrays.put(np.load(path)) for path in inputs.glob("denoiser.*.npy")}
        sample = given.pop("sample")  # the same for every branch
        branches = len(sample) // self.cell.batch
        if self.pipe.guidance_batch == APART:
            each = branch_by_branch(denoiser, [TIMESTEP], given, branches)
            return lambda: arrays.get(each(0, sample))
        shared = branches if denoiser.shares else 1
        predict = denoiser.prepare([TIMESTEP], given, shared)
        return lambda: arrays.get(predict(0, sample[: len(sample) // shared]))

    def _decoding(self, inputs: Path) -> Callable[[], Any]:
        latents, taken = np.load(inputs / "decode.npy"), self.pipe.program("vae_decoder").interface.inputs[0].name
        if taken == SCALED:
            latents = Scaling.of(self.pipe.vae.config).scaled(latents)
        return self._part("vae", {taken: latents})

    def _part(self, name: str, given: Mapping[str, Any]) -> Callable[[], Any]:
        program = self.pipe.program(next(part for part in self.pipe.placement if NAMES[part] == name))
        session, arrays = program.session(), program.arrays
        inputs: dict[str, Array] = {key: arrays.put(value) for key, value in given.items()}
        return lambda: arrays.get(next(iter(session(inputs).values())))


def _call(inputs: Path) -> dict[str, Any]:
    call: dict[str, Any] = json.loads((inputs / "call.json").read_text(encoding="utf-8"))
    return call


def _timed(pipe: DiffusionPipeline, clock: Clock) -> Any:
    """The same pipeline over the same programs, with a clock on each."""
    parts: dict[str, Any] = {
        name: Loaded(value.component, {part: Timed(one, NAMES[part], clock) for part, one in value.programs.items()})
        if isinstance(value, Loaded) else value
        for name, value in pipe.components.items()
    }  # fmt: skip
    timed = type(pipe)(**parts, **pipe.options, guidance_batch=pipe.guidance_batch)
    timed.set_progress_bar_config(disable=True)
    return timed


def _adapt(pipe: DiffusionPipeline, mode: str, rank: str) -> None:
    """Load an adapter that costs what any costs and changes nothing."""
    assert isinstance(pipe, LatentDiffusion)
    factors = synthetic(denoiser_layers(pipe), int(rank), size=0)
    pipe.load_lora_weights({f"{pipe.DENOISER}.{name}": value for name, value in factors.items()})
    if mode == "fused":
        pipe.fuse_lora()


def _waiting(pipe: DiffusionPipeline) -> Callable[[], None]:
    if not any(pipe.program(part).arrays.asynchronous for part in pipe.placement):
        return lambda: None
    import torch

    return torch.cuda.synchronize


if __name__ == "__main__":
    serve(lambda: Engine(sys.argv[1]), PACKAGES)
