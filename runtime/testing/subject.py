"""What a check looks at: a pipeline of tiny models on one engine, and the same on eager."""

import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.artifact import NATIVE
from anamorph.checkpoint import BUNDLED, Checkpoint, Source, open_checkpoint
from anamorph.components import CHECKPOINT
from anamorph.config import read_json
from anamorph.engine import Backend, Program, Target
from anamorph.exporting import Check as Measured
from anamorph.exporting import Exporter, ExportOptions
from anamorph.guard import places_here
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.plugins import get_backend, get_exporter
from anamorph.probes import probe
from anamorph.rewrites import NONE

BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 0.15}
"""Execution precision -> largest relative L2 difference from eager in float32 that it explains."""
SMALL: Mapping[str, Mapping[str, Any]] = {
    "unet": {
        "block_out_channels": [32, 64], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "norm_num_groups": 8, "cross_attention_dim": 32,
        "sample_size": 8,
    },
    "vae": {
        "block_out_channels": [16, 32], "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 8, "sample_size": 16,
    },
    "text_encoder": {"hidden_size": 32, "intermediate_size": 48},
}  # fmt: skip
"""Component -> what is smaller than in the bundled model."""
PARTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")


class Broken(AssertionError):
    """An engine or exporter that does not keep its contract; the sentence says where."""


@dataclass(frozen=True)
class Subject:
    """An engine with `pipe` on it, `reference` on eager, the folder that it opened and what exporting measured."""

    backend: Backend
    target: Target
    checkpoint: Checkpoint
    opened: Checkpoint
    pipe: DiffusionPipeline
    reference: DiffusionPipeline
    exporter: Exporter | None
    certificate: tuple[Measured, ...]

    @property
    def bound(self) -> float:
        """Largest relative L2 difference from the reference."""
        return BOUNDS[self.target.precision]

    def program(self, part: str) -> Program:
        """The opened part."""
        return self.pipe.program(part)

    def inputs(self, part: str, sizes: Mapping[str, int], *, optional: bool = False) -> dict[str, NDArray[Any]]:
        """Inputs of a part at these sizes, with or without the optional ones."""
        interface = self.program(part).interface
        return probe(interface if optional else interface.required, sizes)


def call(program: Program, inputs: Mapping[str, NDArray[Any]], session: Any = None) -> dict[str, NDArray[Any]]:
    """Call a program with NumPy arrays; copies, so that nothing that the engine does later changes them."""
    arrays = program.arrays
    found = (session or program.session())({name: arrays.put(value.copy()) for name, value in inputs.items()})
    return {name: np.array(arrays.get(value)) for name, value in found.items()}


def relative(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """Relative L2 difference."""
    exact = reference.astype(np.float64)
    return float(np.linalg.norm(value.astype(np.float64) - exact) / (np.linalg.norm(exact) or 1.0))


@dataclass(frozen=True)
class Check:
    """One demand of the contract; calling it raises Broken, or whatever the engine raises."""

    name: str
    demand: str
    function: Callable[[Subject], None]

    def __call__(self, subject: Subject) -> None:
        self.function(subject)

    def __str__(self) -> str:
        return self.name


def held(kept: bool, sentence: str) -> None:
    """Raise Broken where a demand is not kept."""
    if not kept:
        raise Broken(sentence)


@functools.cache
def _place() -> Path:
    """A folder that goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="anamorph-contract-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def tiny_checkpoint() -> Checkpoint:
    """The bundled model with few channels and random weights, which keep activations of order one."""
    import torch

    from anamorph.models import MODELS

    folder = _place() / "tiny"
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(BUNDLED / name, folder / name)
    shutil.copy(BUNDLED / "model_index.json", folder)
    for seed, (name, smaller) in enumerate(SMALL.items()):
        config = {**read_json(BUNDLED / name / "config.json"), **smaller}
        model = MODELS[config["_class_name"]](**config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                fan = max(1, parameter[0].numel())
                parameter.copy_(0.1 * noise + parameter if parameter.ndim == 1 else noise / fan**0.5)
        model.save_pretrained(folder / name)
    return open_checkpoint(Source(str(folder)))


@functools.cache
def subject(engine: str, device: str | None = None, precision: str | None = None) -> Subject:
    """The engine of that name with tiny models on it, by default where and in what it prefers.

    Raises BackendError: there is no such engine, or it cannot run here. Raises ArtifactError: what was exported for it
    does not compute what eager computes.
    """
    backend, checkpoint = get_backend(engine), tiny_checkpoint()
    places = places_here(backend)
    device = device or next(iter(places))
    target = Target(device, precision or places[device][0], trusted=True)
    exporter: Exporter | None = None
    opened = checkpoint
    certificate: tuple[Measured, ...] = ()
    if CHECKPOINT not in backend.formats:
        exporter = get_exporter(backend.formats)
        folder = _place() / f"{engine}-{len(list(_place().iterdir()))}"
        options = ExportOptions(signature=NATIVE, rewrites=NONE)
        certificate = tuple(exporter.export(checkpoint, folder, options, lambda _: None))
        opened = open_checkpoint(Source(str(folder)))
    pipe = open_pipeline(opened, engine, target)
    reference = open_pipeline(checkpoint, "eager", Target("cpu", "float32"))
    return Subject(backend, target, checkpoint, opened, pipe, reference, exporter, certificate)


def open_pipeline(opened: Checkpoint, engine: str, target: Target) -> DiffusionPipeline:
    """An image-to-image pipeline, which has all parts."""
    kind = DiffusionPipeline.registry["StableDiffusionImg2ImgPipeline"]
    rewrites = NONE if opened.artifact is None else None
    return kind.from_checkpoint(
        opened,
        {},
        backend=engine,
        device=target.device,
        torch_dtype=target.precision,
        rewrites=rewrites,
        trust_remote_code=True,
    )
