"""What PyTorch computes, kept in files: the references of a certificate.

    python -m anamorph.exporters.references CHECKPOINT VARIANT REFERENCES REWRITES

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
from anamorph.checkpoint import Checkpoint, Source, open_checkpoint
from anamorph.components import Component
from anamorph.denoiser_interfaces import even
from anamorph.errors import ArtifactError
from anamorph.exporters.children import answered, run_child
from anamorph.exporters.taps import recorded
from anamorph.exporters.trial import PICTURE_CALL, pipeline, trajectory, trial
from anamorph.interface import Interface
from anamorph.probes import probe, probe_sizes, probes
from anamorph.rewrites import NONE, inexact

if TYPE_CHECKING:
    from anamorph.models.base import Model

EXACT = 1e-5
"""Relative L2 difference that an exact rewrite may make (float32)."""


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


def check_rewritten(component: Component, part: str, module: "Model", names: Sequence[str]) -> float:
    """How far a part computed by these rewrites is from the same without them, both by PyTorch (relative L2).

    Raises ArtifactError: by more than exact rewrites may be.
    """
    import torch

    interface = even(component.interface(part), component.config).required
    values = [torch.from_numpy(value) for value in probe(interface, probe_sizes(interface)[0]).values()]
    found = []
    for rewrites in ((), names):
        module.rewrite(rewrites)
        with torch.inference_mode():
            found.append(torch.cat([result.flatten() for result in getattr(module, module.method(part))(*values)]))
    plain, rewritten = found
    error = float((rewritten - plain).norm() / plain.norm())
    if not error <= EXACT:
        raise ArtifactError(
            f"{part} by {', '.join(names)} differs from the model by {error:.1e} (relative L2), more than {EXACT:.0e}; "
            "export it without"
        )
    return error


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
    changed = sorted({name for part in artifact.parts.values() for name in inexact(part.rewrites)})
    rewrites = ",".join(changed) or NONE
    (folder / PICTURE_CALL).write_text(json.dumps(trial(artifact, checkpoint)), encoding="utf-8")
    run_child(
        "the checkpoint's own picture could not be drawn in a fresh process",
        "references", checkpoint.folder, checkpoint.variant or "", folder, rewrites,
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Draw the picture whose request lies in the folder."""
    checkpoint, variant, folder, rewrites = arguments

    def work() -> None:
        opened = open_checkpoint(Source(checkpoint, variant=variant or None))
        pipe = pipeline(opened, backend="eager", device="cpu", rewrites=rewrites)
        arrays: dict[str, Any] = dict(trajectory(pipe, Path(folder)))
        np.savez(Path(folder) / "picture.npz", **arrays)

    return answered(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
