"""Copies of exported folders with something changed, their records brought up to date as a careless editor would."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import load_file

from anamorph.artifact import FileRecord


def copied(artifact: Path, place: Path) -> Path:
    shutil.copytree(artifact, place)
    return place


def rewrite_manifest(place: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = place / "anamorph.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def record_again(place: Path, part: str) -> None:
    """Let the manifest agree with the files of a part, whatever they hold now."""

    def change(values: dict[str, Any]) -> None:
        files = values["parts"][part]["files"]
        files.update({name: vars(FileRecord.of(place / name)) for name in files})

    rewrite_manifest(place, change)


def scale_weight(place: Path, part: str, weight: str, factor: float = 1.05) -> None:
    """Multiply one weight of an exported part, named as in the model; ONNX has those of linear layers transposed."""
    folder = place / part
    if (folder / "model.onnx").exists():
        _scale_in_onnx(folder, weight, factor)
    else:
        _scale_in_openvino(folder, stored(place, part, weight), factor)
    record_again(place, part)


def stored(place: Path, part: str, weight: str) -> bytes:
    """The weight as the artifact's checkpoint holds it."""
    values = json.loads((place / "anamorph.json").read_text(encoding="utf-8"))
    (file,) = (Path(values["source"]["name"]) / values["parts"][part]["component"]).glob("*.safetensors")
    (found,) = (value for name, value in load_file(file).items() if name.removeprefix("text_model.") == weight)
    return found.tobytes()


def _scale_in_onnx(folder: Path, weight: str, factor: float) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == weight)
    if tensor.raw_data:
        tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(factor)).tobytes()
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return
    entry = {item.key: item.value for item in tensor.external_data}
    _scale(folder / entry["location"], int(entry["offset"]), int(entry["length"]), factor)


def _scale_in_openvino(folder: Path, values: bytes, factor: float) -> None:
    """OpenVINO drops the names of weights, so that they are found by value."""
    path = folder / "openvino_model.bin"
    data = path.read_bytes()
    assert data.count(values) == 1
    _scale(path, data.index(values), len(values), factor)


def _scale(path: Path, offset: int, length: int, factor: float) -> None:
    values = np.memmap(path, np.float32, "r+", offset, (length // 4,))
    values *= np.float32(factor)
    values.flush()
