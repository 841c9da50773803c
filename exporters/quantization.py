"""int8: the denoiser of a written folder with quantised layers, those that cost most fidelity left in float32.

    python -m anamorph.exporters.quantization FOLDER CHECKPOINT PLACE PART

runs in a process of its own, with the wishes and samples of a calibration in `PLACE`, and prints what it found as JSON.
"""

import importlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.artifact import Artifact, FileRecord, Part
from anamorph.exporters.calibration import Sample, read_samples, read_wishes
from anamorph.exporters.certificate import open_unfinished
from anamorph.exporters.children import answered, run_child
from anamorph.exporting import INT8

WRITERS: Mapping[str, tuple[str, str, tuple[str, ...]]] = MappingProxyType(
    {
        "openvino": ("anamorph.exporters.openvino_int8", "int8", ("openvino", "nncf")),
        "onnx": ("anamorph.exporters.onnx_int8", "onnx", ("onnx", "onnxruntime")),
    }
)
"""Format -> the module whose `Layers` quantises it, the extra that installs what it needs, and that."""
JUDGES = 4
"""On how many samples errors are measured, at most."""
GROUP = re.compile(r"\w+\.(\d+\.)?\w+\.\d+|\w+")
"""How the names of layers that are tried together begin: down_blocks.0.resnets.1, mid_block.attentions.0, conv_in."""


@dataclass(frozen=True)
class Found:
    """What quantisation cost: the groups left in float32, and the relative L2 error of a call.

    `alone` is the error of each group where no other is quantised.
    """

    kept: Sequence[str]
    error: float
    alone: Mapping[str, float]


class Layers:
    """A denoiser whose layers can be quantised group by group; each format has one."""

    groups: Mapping[str, Sequence[str]]
    """Name of a group -> its layers."""

    def run(self, quantized: Iterable[str], samples: Sequence[Sample]) -> list[NDArray[Any]]:
        """Predictions for these samples where only these groups are quantised."""
        raise NotImplementedError

    def write(self, quantized: Iterable[str], folder: Path) -> str:
        """Write it into an empty folder; returns the name of the file to open."""
        raise NotImplementedError


def unavailable(form: str) -> str | None:
    """None, or why this format cannot be quantised here."""
    if form not in WRITERS:
        return f"{form} has no int8 here; export to {' or '.join(WRITERS)}"
    _, extra, packages = WRITERS[form]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed; run: pip install 'anamorph[{extra}]'" if missing else None


def group_of(layer: str) -> str:
    """The group of a layer: `up_blocks.0.attentions.1.transformer_blocks.0.ff` -> `up_blocks.0.attentions.1`."""
    found = GROUP.match(layer)
    return layer if found is None else found[0]


def grouped(layers: Iterable[str]) -> dict[str, list[str]]:
    """Layers by their group, in order."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(group_of(layer), []).append(layer)
    return found


def relative(values: Sequence[NDArray[Any]], exact: Sequence[NDArray[Any]]) -> float:
    """Relative L2 distance over all samples."""
    pairs = list(zip(values, exact, strict=True))
    return float(np.sqrt(sum(np.sum((v - e) ** 2) for v, e in pairs) / sum(np.sum(e**2) for _, e in pairs)))


def keep(alone: Mapping[str, float], allowed: float) -> list[str]:
    """The groups to leave in float32, the most harmful first, until the others' errors add up to what is allowed.

    Rounding errors of different layers are nearly independent, so that their squares add.
    """
    kept: list[str] = []
    for name in sorted(alone, key=lambda name: -alone[name]):
        if sum(error**2 for other, error in alone.items() if other not in kept) <= allowed**2:
            break
        kept.append(name)
    return kept


def settle(layers: Layers, samples: Sequence[Sample], allowed: float) -> tuple[list[str], float, dict[str, float]]:
    """Which groups stay in float32, the error that is left, and that of each group alone.

    The estimate of `keep` is measured; where it was too low, further groups are kept until the measured error fits.
    """
    exact = [sample.output for sample in samples]
    alone = {name: relative(layers.run([name], samples), exact) for name in layers.groups}
    target = allowed
    while True:
        kept = keep(alone, target)
        rest = [name for name in layers.groups if name not in kept]
        error = relative(layers.run(rest, samples), exact) if rest else 0.0
        if error <= allowed:
            return kept, error, alone
        target *= 0.8


def quantized(artifact: Artifact, part: str, place: Path) -> tuple[Artifact, Found]:
    """A written folder with a part in int8, from the samples in `place`, and what that cost.

    Raises ArtifactError: it could not be quantised.
    """
    failure = f"{part} could not be brought to {INT8} in a fresh process"
    printed = run_child(failure, "quantization", artifact.folder, artifact.checkpoint, place, part)
    answer = json.loads(printed.splitlines()[-1])
    old = artifact.parts[part]
    folder, new = (artifact.folder / old.file).parent, _beside(artifact, part)
    (folder / "config.json").rename(new / "config.json")
    shutil.rmtree(folder)
    new.rename(folder)
    return replace(artifact, parts={**artifact.parts, part: _recorded(artifact, old, folder / answer["file"])}), Found(
        **answer["found"]
    )


def _beside(artifact: Artifact, part: str) -> Path:
    folder = (artifact.folder / artifact.parts[part].file).parent
    return folder.with_name(f"{folder.name}.{INT8}")


def _recorded(artifact: Artifact, old: Part, file: Path) -> Part:
    """The part's record: its weights are its own now, and no values inside it are named."""
    written = (path for path in sorted(file.parent.iterdir()) if path.name != "config.json")
    files = {path.relative_to(artifact.folder).as_posix(): FileRecord.of(path) for path in written}
    name = file.relative_to(artifact.folder).as_posix()
    return replace(old, file=name, files=files, storage=INT8, taps={}, constants={}, linked={})


def main(arguments: Sequence[str]) -> int:
    """Quantise a part of a draft, beside it."""
    folder, checkpoint, place = map(Path, arguments[:3])
    part = arguments[3]

    def work() -> None:
        artifact = open_unfinished(folder, checkpoint).artifact
        assert artifact is not None
        wishes, samples = read_wishes(place), read_samples(place)
        build: Callable[..., Layers] = importlib.import_module(WRITERS[artifact.format][0]).opened
        layers = build(artifact, part, samples)
        kept, error, alone = settle(layers, samples[:: -(-len(samples) // JUDGES)], wishes.error)
        beside = _beside(artifact, part)
        beside.mkdir()
        file = layers.write([name for name in layers.groups if name not in kept], beside)
        print(json.dumps({"file": file, "found": {"kept": kept, "error": error, "alone": alone}}))

    return answered(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
