"""What PyTorch computes, kept in files: the references of a certificate.

    python -m anamorph.exporters.references CHECKPOINT VARIANT REFERENCES

draws the picture, in a process of its own: the exporting one never holds more than one component.
"""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anamorph.artifact import Artifact
from anamorph.checkpoint import Checkpoint, Source, component_config, open_checkpoint
from anamorph.components import Component, unet_multiple, vae_scale_factor
from anamorph.errors import AnamorphError
from anamorph.exporters.children import run_child
from anamorph.exporters.taps import recorded
from anamorph.exporters.trace import branches, probes
from anamorph.interface import Interface
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.latent_diffusion import LatentDiffusion

if TYPE_CHECKING:
    from anamorph.models.base import Model

STEPS, GUIDANCE, STRENGTH = 3, 5.0, 1.0
PROMPTS = ("a photo of a red cat", "a dog")


def load(component: Component) -> "Model":
    """A component's PyTorch model in float32."""
    from anamorph.models import MODELS

    assert component.folder is not None
    return MODELS[component.class_name].from_pretrained(component.folder, variant=component.variant)


def write_probes(folder: Path, part: str, interface: Interface, module: "Model", blocks: Iterable[str] = ()) -> None:
    """Run a part with PyTorch at each probe size; keep inputs, outputs and those of its `blocks` in `folder`."""
    import torch

    names = list(blocks)
    for number, inputs in enumerate(probes(interface)):
        values = (torch.from_numpy(inputs[port.name]) if port.name in inputs else None for port in interface.inputs)
        with torch.inference_mode(), recorded(module, names) as inner:
            results = getattr(module, module.method(part))(*values)
        outputs = {port.name: value.numpy() for port, value in zip(interface.outputs, results, strict=True)}
        arrays: dict[str, Any] = {f"in.{name}": value for name, value in inputs.items()}
        arrays |= {f"out.{name}": value for name, value in outputs.items()}
        arrays |= {f"tap.{block}": value for block, value in inner.items()}
        np.savez(folder / f"{part}.{number}.npz", **arrays)


@dataclass(frozen=True)
class Probe:
    """One call of a part: inputs, outputs, and the outputs of its blocks."""

    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]
    blocks: Mapping[str, NDArray[Any]]


def read_probes(folder: Path, part: str) -> Iterator[Probe]:
    """What `write_probes` kept, in the same order."""
    for number in itertools.count():
        path = folder / f"{part}.{number}.npz"
        if not path.exists():
            return
        with np.load(path) as stored:
            kinds = [
                {key.removeprefix(f"{kind}."): stored[key] for key in stored.files if key.startswith(f"{kind}.")}
                for kind in ("in", "out", "tap")
            ]
        yield Probe(*kinds)


def write_picture(folder: Path, checkpoint: Checkpoint, artifact: Artifact) -> None:
    """Draw a small picture with PyTorch eager and keep the request, the latents after each step and the picture.

    Raises ArtifactError: the process that draws has failed.
    """
    (folder / "picture.json").write_text(json.dumps(_call(artifact, checkpoint)), encoding="utf-8")
    run_child(
        "the checkpoint's own picture could not be drawn in a fresh process",
        "references", checkpoint.folder, checkpoint.variant or "", folder,
    )  # fmt: skip


def _call(artifact: Artifact, checkpoint: Checkpoint) -> dict[str, Any]:
    """A request of a size and batch that the artifact takes."""
    configs = {name: component_config(checkpoint.place(name)) for name in ("unet", "vae")}
    factor, multiple = vae_scale_factor(configs["vae"]), unet_multiple(configs["unet"])
    axes = artifact.parts["unet"].interface.axes
    height, width = (
        factor * (axes[name].maximum or times * multiple) for name, times in (("latent_height", 1), ("latent_width", 2))
    )
    copies = branches(configs["unet"])
    count = (axes["batch"].maximum or copies * len(PROMPTS)) // copies
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    return {"prompt": prompts, "height": height, "width": width, "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE, "seed": list(range(count))}  # fmt: skip


def read_call(folder: Path) -> dict[str, Any]:
    """The request of the picture."""
    call: dict[str, Any] = json.loads((folder / "picture.json").read_text(encoding="utf-8"))
    return call


def trajectory(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """The latents after each step of a request, by name of the step, and last the picture."""
    assert isinstance(pipe, LatentDiffusion)
    sources = {name: _source(name, len(call["prompt"]), call["height"], call["width"]) for name in pipe.TASK.needs}
    every = {**call, **sources, "strength": STRENGTH}
    arguments: dict[str, Any] = {name: value for name, value in every.items() if name in pipe.TAKES.all}
    for state in pipe.steps(**arguments):
        yield f"step {state.index + 1} of {state.total}", np.asarray(state.latents)
        last = state
    yield "picture", np.asarray(last.preview("np"))


def _source(name: str, count: int, height: int, width: int) -> NDArray[np.float32]:
    """What a pipeline starts from that draws on pictures: ramps [N, H, W, 3], masks [N, H, W] of the right half."""
    y, x = np.indices((height, width), np.float32)
    ramps = np.stack([x / width, y / height, x * y / (width * height)], -1)
    one = (x >= width / 2).astype(np.float32) if name == "mask_image" else ramps.astype(np.float32)
    return np.stack([one] * count)


def main(arguments: Sequence[str]) -> int:
    """Draw the picture whose request lies in the folder; failures are one sentence on the error stream."""
    checkpoint, variant, folder = arguments
    try:
        opened = open_checkpoint(Source(checkpoint))
        unused: dict[str, Any] = {name: None for name in ("safety_checker",) if name in opened.components}
        pipe = DiffusionPipeline.from_pretrained(
            opened.folder, backend="eager", device="cpu", torch_dtype="float32", variant=variant or None, **unused
        )
        arrays: dict[str, Any] = dict(trajectory(pipe, read_call(Path(folder))))
        np.savez(Path(folder) / "picture.npz", **arrays)
    except (AnamorphError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
