"""Proof that an artifact computes what PyTorch computes: references written here, compared in a process of its own.

    python -m anamorph.exporters.certificate ARTIFACT REFERENCES

opens every part through its engine, without PyTorch, and prints one JSON line per comparison.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anamorph.artifact import Artifact, Difference
from anamorph.checkpoint import Checkpoint, Source, open_checkpoint
from anamorph.components import Component, unet_multiple, vae_scale_factor
from anamorph.config import Config
from anamorph.engine import Target
from anamorph.errors import AnamorphError, ArtifactError, BackendUnavailable
from anamorph.exporters.trace import probes
from anamorph.interface import Interface
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.loading import read_component
from anamorph.pipelines.stable_diffusion import StableDiffusionPipeline
from anamorph.plugins import choose_backend

if TYPE_CHECKING:
    from anamorph.models.base import Model

PICTURE = "picture"
STEPS, GUIDANCE = 3, 5.0
PROMPTS = ("a photo of a red cat", "a dog")


@dataclass(frozen=True)
class Measured:
    """One comparison: a part with the sizes and output, or the picture with its step."""

    part: str
    what: str
    output: str
    difference: Difference


def load(component: Component) -> "Model":
    """A component's PyTorch model in float32."""
    from anamorph.models import MODELS

    assert component.folder is not None
    return MODELS[component.class_name].from_pretrained(component.folder, variant=component.variant)


def write_probes(folder: Path, part: str, interface: Interface, module: "Model", config: Config) -> None:
    """Run a part with PyTorch at each probe size and keep inputs and outputs in `folder`."""
    import torch

    for number, inputs in enumerate(probes(interface, config)):
        values = (torch.from_numpy(inputs[port.name]) if port.name in inputs else None for port in interface.inputs)
        with torch.inference_mode():
            results = getattr(module, module.PARTS[part])(*values)
        outputs = {port.name: value.numpy() for port, value in zip(interface.outputs, results, strict=True)}
        arrays: dict[str, Any] = {f"in.{name}": value for name, value in inputs.items()}
        arrays |= {f"out.{name}": value for name, value in outputs.items()}
        np.savez(folder / f"{part}.{number}.npz", **arrays)


def write_picture(folder: Path, checkpoint: Checkpoint, artifact: Artifact) -> None:
    """Draw a small picture with PyTorch eager and keep the request, the latents after each step and the picture."""
    pipe = DiffusionPipeline.from_pretrained(
        checkpoint.folder, backend="eager", device="cpu", torch_dtype="float32", variant=checkpoint.variant,
        safety_checker=None,
    )  # fmt: skip
    call = _call(artifact, pipe)
    (folder / "picture.json").write_text(json.dumps(call), encoding="utf-8")
    arrays: dict[str, Any] = dict(_trajectory(pipe, call))
    np.savez(folder / "picture.npz", **arrays)


def _call(artifact: Artifact, pipe: DiffusionPipeline) -> dict[str, Any]:
    """A request of a size and batch that the artifact takes."""
    configs = {name: pipe.components[name].config for name in ("unet", "vae")}
    factor, multiple = vae_scale_factor(configs["vae"]), unet_multiple(configs["unet"])
    axes = artifact.parts["unet"].interface.axes
    height, width = (
        factor * (axes[name].maximum or times * multiple) for name, times in (("latent_height", 1), ("latent_width", 2))
    )
    count = (axes["batch"].maximum or 2 * len(PROMPTS)) // 2
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    return {"prompt": prompts, "height": height, "width": width, "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE, "seed": list(range(count))}  # fmt: skip


def _trajectory(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    assert isinstance(pipe, StableDiffusionPipeline)
    for state in pipe.steps(**call):
        yield f"step {state.index + 1} of {state.total}", np.asarray(state.latents)
        last = state
    yield "picture", np.asarray(last.preview("np"))


def no_engine(form: str) -> str | None:
    """Why no engine on this machine opens that format, or None."""
    try:
        choose_backend(form)
    except BackendUnavailable as error:
        return str(error)
    return None


def compare(artifact: Artifact, references: Path) -> list[Measured]:
    """Open the artifact in a fresh process and compare it with the references.

    Raises ArtifactError: that process failed.
    """
    command = [sys.executable, "-m", "anamorph.exporters.certificate", str(artifact.folder), str(references)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise ArtifactError(f"the exported folder could not be run in a fresh process: {last}")
    rows = (json.loads(line) for line in done.stdout.splitlines())
    return [Measured(**{**row, "difference": Difference(**row["difference"])}) for row in rows]


def worst(measured: Sequence[Measured], part: str) -> dict[str, Difference]:
    """The largest differences of each output of a part."""
    found: dict[str, Difference] = {}
    for row in measured:
        if row.part == part:
            old = found.get(row.output, Difference(0.0, 0.0))
            new = row.difference
            found[row.output] = Difference(max(old.relative_l2, new.relative_l2), max(old.max_abs, new.max_abs))
    return found


def step_differences(measured: Sequence[Measured]) -> list[Difference]:
    """Those of the picture: latents after each step, then the picture itself."""
    return [row.difference for row in measured if row.part == PICTURE]


def difference(value: NDArray[Any], reference: NDArray[Any]) -> Difference:
    """Relative L2 norm and largest value of `value - reference`."""
    exact = reference.astype(np.float64)
    delta = value.astype(np.float64) - exact
    norm = float(np.linalg.norm(exact))
    return Difference(float(np.linalg.norm(delta)) / (norm or 1.0), float(np.abs(delta).max()))


def _compare_parts(artifact: Checkpoint, references: Path) -> Iterator[Measured]:
    exported = artifact.artifact
    assert exported is not None
    engine, _ = choose_backend(exported.format)
    for name, part in exported.parts.items():
        slot = artifact.components[part.component]
        component = read_component(artifact, part.component, (slot[1],) if slot else ())
        program = engine.open(component, [name], Target("cpu", "float32"))[name]
        session = program.session()
        for file in sorted(references.glob(f"{name}.*.npz")):
            with np.load(file) as stored:
                inputs = {key.removeprefix("in."): stored[key] for key in stored.files if key.startswith("in.")}
                sizes = part.interface.check(inputs)
                where = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
                for output, value in session(inputs).items():
                    yield Measured(name, f"{output} at {where}", output, difference(value, stored[f"out.{output}"]))


def _compare_picture(artifact: Checkpoint, references: Path) -> Iterator[Measured]:
    call = json.loads((references / "picture.json").read_text(encoding="utf-8"))
    pipe = DiffusionPipeline.from_pretrained(artifact.folder, torch_dtype="float32")
    with np.load(references / "picture.npz") as stored:
        for what, value in _trajectory(pipe, call):
            yield Measured(PICTURE, what, "latents", difference(value, stored[what]))


def main(arguments: Sequence[str]) -> int:
    """Compare and print; failures are one sentence on the error stream."""
    folder, references = arguments
    try:
        artifact = open_checkpoint(Source(folder))
        for step in (_compare_parts, _compare_picture):
            for row in step(artifact, Path(references)):
                print(json.dumps(asdict(row)), flush=True)
    except AnamorphError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
