"""Fixed inputs for all arms of a work, and how far what they make of them is from PyTorch eager in float32.

A cell whose stages are further away than its precision explains shows no speed: it does not do the same work.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anamorph.autoencoder_interfaces import vae_scale_factor
from anamorph.benchmarks.scenarios import Cell
from anamorph.checkpoint import BUNDLED_NAME, Checkpoint, Source, model_named, open_checkpoint
from anamorph.cli.common import scheduler_class
from anamorph.config import read_json
from anamorph.errors import InputError
from anamorph.image import psnr
from anamorph.interface import size_of
from anamorph.noise import SeededNoise
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.describing import read_component
from anamorph.schedulers import load_scheduler

PROMPTS = {BUNDLED_NAME: "red apple"}
PROMPT = "a photograph of a lighthouse on a cliff at dusk"
NEGATIVE = "blurred"
STRENGTHS = {"image-to-image": 0.8, "inpaint": 1.0}
"""Tasks that start from a picture, and how much of it is drawn anew."""
ALLOWED = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Execution precision -> relative L2 difference that a stage may have."""
DECIBELS = {"float32": 40.0, "float16": 30.0, "bfloat16": 20.0}
"""The same for a whole picture, which counts where an arm shows nothing else."""
NEAR = 20.0
"""PSNR (dB) of a picture by an approximation, whatever its stages say."""


def checkpoint_of(model: str) -> Checkpoint:
    """The model of a cell, opened; raises CheckpointError."""
    return open_checkpoint(Source(model_named(model)))


@functools.cache
def hashes(model: str) -> dict[str, str]:
    """SHA-256 of a model's weights and of its configurations."""
    checkpoint = checkpoint_of(model)
    configs = hashlib.sha256()
    for path in sorted(checkpoint.folder.rglob("*config.json")):
        configs.update(path.relative_to(checkpoint.folder).as_posix().encode() + path.read_bytes())
    return {"weights": checkpoint.digest(), "configs": configs.hexdigest()}


def sized(cell: Cell, checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width in pixels."""
    if cell.height:
        return cell.height, cell.width
    side = int(_config(checkpoint, "unet")["sample_size"]) * vae_scale_factor(_config(checkpoint, "vae"))
    return side, side


def scheduler_config(cell: Cell, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The configuration that every arm takes, None for the checkpoint's own scheduler.

    No scheduler clips: latents are no pictures, and peers differ in what they take a missing key for. Raises
    InputError: the cell asks for a spacing, which its scheduler does not have.
    """
    if cell.scheduler == "own":
        return None
    own = dict(load_scheduler(read_json(checkpoint.place("scheduler") / "scheduler_config.json")).config)
    full = {**own, "clip_sample": False, **({"timestep_spacing": cell.spacing} if cell.spacing else {})}
    scheduler = scheduler_class(cell.scheduler, full)
    if cell.spacing and "timestep_spacing" not in scheduler.own:
        raise InputError(f"{cell.scheduler} has no timestep_spacing; leave out spacing")
    return {**scheduler.config, "_class_name": cell.scheduler}


def write_inputs(cell: Cell, checkpoint: Checkpoint, folder: Path, steps: int) -> None:
    """What all arms are fed, from seeded noise; see `anamorph.benchmarks.peers`."""
    folder.mkdir(parents=True, exist_ok=True)
    height, width = sized(cell, checkpoint)
    guided = cell.guidance > 1
    vae = _config(checkpoint, "vae")
    factor = vae_scale_factor(vae)
    call = {
        "prompt": PROMPTS.get(cell.model, PROMPT), "height": height, "width": width, "num_inference_steps": steps,
        "guidance_scale": cell.guidance, "num_images_per_prompt": cell.batch,
        **({"negative_prompt": NEGATIVE} if guided else {}),
    }  # fmt: skip
    if cell.task in (*STRENGTHS, "control"):
        call |= {"strength": STRENGTHS[cell.task]} if cell.task in STRENGTHS else {}
        _write_pictures(folder, height, width, masked=cell.task == "inpaint")
        if cell.task == "image-to-image":  # the picture's own size counts
            del call["height"], call["width"]
    (folder / "call.json").write_text(json.dumps(call), encoding="utf-8")
    latents = SeededNoise(tuple(range(cell.batch))).normal((vae["latent_channels"], height // factor, width // factor))
    np.save(folder / "latents.npy", latents)
    np.save(folder / "decode.npy", latents)
    sizes = {"batch": cell.batch * (1 + guided), "latent_height": height // factor, "latent_width": width // factor,
             "sequence": _config(checkpoint, "text_encoder")["max_position_embeddings"]}  # fmt: skip
    noise = SeededNoise(tuple(range(sizes["batch"])))
    slot = checkpoint.components["unet"]
    interface = read_component(checkpoint, "unet", (slot[1],) if slot else ()).interface("unet").required
    for port in (port for port in interface.inputs if port.axes):
        shape = tuple(size_of(dimension, sizes) for dimension in port.axes)
        values = noise.normal(shape[1:])
        if port.name == "sample":  # as guidance has it: every branch sees the same
            values = np.concatenate([values[: cell.batch]] * (1 + guided))
        np.save(folder / f"denoiser.{port.name}.npy", values)


def _write_pictures(folder: Path, height: int, width: int, *, masked: bool) -> None:
    """A picture of smooth colours to start from or to follow, and perhaps a mask over its middle."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    colours = np.stack([x, y, 1 - x * y], axis=-1)
    Image.fromarray((255 * colours).astype(np.uint8)).save(folder / "image.png")
    inside = (np.abs(x - 0.5) < 0.25) & (np.abs(y - 0.5) < 0.25)
    if masked:
        Image.fromarray((255 * inside).astype(np.uint8)).save(folder / "mask_image.png")


def _config(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    slot = checkpoint.components.get(name)
    kind = DiffusionPipeline.registry.get(checkpoint.class_name)
    if slot is None or kind is None:
        raise InputError(f"{checkpoint.folder} is a {checkpoint.class_name} without {name}, which is not measured yet")
    return read_component(checkpoint, name, (slot[1],)).config


def compared(reference: Path, found: Path, precision: str, near: bool = False) -> dict[str, Any]:
    """The difference of every stage that both have, and whether the arm does the same work.

    Stages decide where the denoiser is among them; other pictures, and those of an approximation (`near`), have to be
    near enough as a whole.
    """
    stages: dict[str, float] = {}
    decibels, alike = None, False
    asked = NEAR if near else DECIBELS[precision]
    unseen = (reference / "denoiser.npy").exists() and not (found / "denoiser.npy").exists()
    for path in sorted(reference.glob("*.npy")):
        if not (found / path.name).exists():
            continue
        exact, value = np.load(path).astype(np.float64), np.load(found / path.name).astype(np.float64)
        if exact.shape != value.shape:
            return {"passed": False, "note": f"{path.stem} has shape {list(value.shape)}, not {list(exact.shape)}"}
        if not np.isfinite(value).all():
            return {"passed": False, "note": f"{path.stem} has values that are not finite"}
        if path.stem == "picture":
            exactly = np.array_equal(exact, value)
            decibels = None if exactly else round(psnr(exact.astype(np.float32), value.astype(np.float32)), 2)
            alike = exactly or (decibels is not None and decibels >= asked)
        else:
            stages[path.stem] = float(np.linalg.norm(value - exact) / (np.linalg.norm(exact) or 1.0))
    far = {} if near else {name: away for name, away in stages.items() if away > ALLOWED[precision]}
    if far:
        worst = max(far, key=far.__getitem__)
        note = f"{worst} is {far[worst]:.1e} from eager in float32, {ALLOWED[precision]:.0e} is allowed in {precision}"
    elif (near or not stages or unseen) and not alike:
        far = {"picture": 1.0}
        note = f"the picture is {decibels} dB from eager in float32, {asked:g} dB are asked"
    else:
        note = ""
    return {"stages": stages, "psnr_db": decibels, "passed": not far, "note": note}
