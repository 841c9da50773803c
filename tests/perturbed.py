"""Copies of exported folders with something changed, their records brought up to date as a careless editor would."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

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
    """Multiply one weight of an exported part."""
    folder = place / part
    if (folder / "model.onnx").exists():
        _scale_in_onnx(folder, weight, factor)
    else:
        _scale_in_openvino(folder, weight, factor)
    record_again(place, part)


def _scale_in_onnx(folder: Path, weight: str, factor: float) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == weight)
    if tensor.raw_data:
        tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(factor)).tobytes()
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return
    entry = {item.key: item.value for item in tensor.external_data}
    _scale(folder / entry["location"], int(entry["offset"]), int(entry["length"]), factor)


def _scale_in_openvino(folder: Path, weight: str, factor: float) -> None:
    text = (folder / "openvino_model.xml").read_text(encoding="utf-8")
    found = re.search(rf'name="{re.escape(weight)}" type="Const"[^<]*<data[^>]*offset="(\d+)" size="(\d+)"', text)
    assert found is not None, f"no constant {weight}"
    _scale(folder / "openvino_model.bin", int(found[1]), int(found[2]), factor)


def _scale(path: Path, offset: int, length: int, factor: float) -> None:
    values = np.memmap(path, np.float32, "r+", offset, (length // 4,))
    values *= np.float32(factor)
    values.flush()
