"""The picture of a certificate: a small call that any pipeline takes, drawn step by step."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.artifact import Artifact
from anamorph.autoencoder_interfaces import vae_scale_factor
from anamorph.checkpoint import Checkpoint, component_config
from anamorph.interface import Interface, size_of
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.probes import probe_sizes

STEPS, GUIDANCE, STRENGTH = 3, 5.0, 1.0
PROMPTS = ("a photo of a red cat", "a dog")
PICTURE_CALL = "picture.json"
"""Where the call is kept among the references."""


def pipeline(opened: Checkpoint, precision: str = "float32", **wishes: Any) -> DiffusionPipeline:
    """An opened folder as its pipeline, without what no picture needs to be drawn."""
    kind = DiffusionPipeline.registry[opened.class_name]
    left_out = {name: None for name in ("safety_checker", "depth_estimator", "feature_extractor") if name in kind.SLOTS}
    return kind.from_checkpoint(opened, left_out, torch_dtype=precision, **wishes)


def trial(artifact: Artifact, checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of a call, of a size and batch that the artifact takes, and the size of pictures to start from."""
    kind = DiffusionPipeline.registry[checkpoint.class_name]
    interface = artifact.parts[kind.DENOISER].interface
    branches = kind.most_branches(component_config(checkpoint.place(kind.DENOISER)))
    dealt = 1 if "branches" in interface.axes and kind.ALIKE else branches
    count = (interface.axes["batch"].maximum or dealt * len(PROMPTS)) // dealt
    decoder = artifact.parts.get("vae_decoder")
    factor = 1 if decoder is None else vae_scale_factor(component_config(checkpoint.place(decoder.component)))
    scale = kind.source_scale(factor)
    height, width = (factor * side for side in _latents(interface, scale))
    values = {
        "prompt": [PROMPTS[index % len(PROMPTS)] for index in range(count)], "batch_size": count,
        "class_labels": list(range(count)), "height": height, "width": width, "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE, "strength": STRENGTH, "seed": list(range(count)),
    }  # fmt: skip
    call = {name: value for name, value in values.items() if name in kind.TAKES.all}
    return {"arguments": call, "sources": [count, height // scale, width // scale]}


def _latents(interface: Interface, scale: int) -> tuple[int, int]:
    """Height and width of the latents: the smallest height, and twice that for the width, where they are open.

    Both are multiples of `scale`, because a picture that is enlarged so many times has whole latents.
    """
    smallest = probe_sizes(interface)[0]
    height, width = (size_of(axis, smallest) for axis in interface.inputs[0].axes[2:])
    if "latent_width" in interface.axes and interface.axes["latent_width"].maximum is None:
        height, width = (-(-side // scale) * scale for side in (height, 2 * width))
    return height, width


def trajectory(pipe: DiffusionPipeline, folder: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """The latents after each step of the call that lies in `folder`, by name of the step, and last the picture."""
    call: Mapping[str, Any] = json.loads((folder / PICTURE_CALL).read_text(encoding="utf-8"))
    sources = {name: _sources(pipe, name, call["sources"]) for name in pipe.needs}
    arguments: dict[str, Any] = {**call["arguments"], **sources}
    for state in pipe.steps(**arguments):
        yield f"step {state.index + 1} of {state.total}", np.asarray(state.latents)
        last = state
    yield "picture", np.asarray(last.preview("np"))


def _sources(pipe: DiffusionPipeline, name: str, size: Sequence[int]) -> Any:
    """An argument that pictures start from, or follow: a list of pictures where several nets follow one each."""
    one, count = _source(name, *size), pipe.pictures_of(name)
    return one if count == 1 else [one] * count


def _source(name: str, count: int, height: int, width: int) -> NDArray[np.float32]:
    """What a task starts from: ramps [N, H, W, 3], masks and depths [N, H, W] of the right half."""
    y, x = np.indices((height, width), np.float32)
    ramps = np.stack([x / width, y / height, x * y / (width * height)], -1)
    one = ramps.astype(np.float32) if name in ("image", "control_image") else (x >= width / 2).astype(np.float32)
    return np.stack([one] * count)
