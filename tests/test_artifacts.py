"""Artifacts in ONNX format that are damaged, incomplete or reach outside their folder are refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from exported import exported
from perturbed import record_again, rewrite_manifest

from anamorph import StableDiffusionPipeline
from anamorph.errors import ArtifactError


def _newer(place: Path) -> None:
    rewrite_manifest(place, lambda values: values.update(schema=2))


def _damaged(place: Path) -> None:
    (place / "anamorph.json").write_text("{")


def _incomplete(place: Path) -> None:
    rewrite_manifest(place, lambda values: values["parts"]["unet"].pop("interface"))


def _missing(place: Path) -> None:
    (place / "unet" / "model.onnx_data").unlink()


def _truncated(place: Path) -> None:
    path = place / "unet" / "model.onnx_data"
    os.truncate(path, path.stat().st_size - 4096)


def _swapped(place: Path) -> None:
    path = place / "unet" / "model.onnx_data"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)


def _foreign(place: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["parts"]["unet"]["files"]["../secret"] = values["parts"]["unet"]["files"].popitem()[1]

    rewrite_manifest(place, change)


def _escaping(location: str) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        shutil.copy(place / "unet" / "model.onnx_data", place.parent / "outside")
        path = place / "unet" / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        path.write_bytes(model.SerializeToString())
        record_again(place, "unet")

    return change


def _no_part(place: Path) -> None:
    rewrite_manifest(place, lambda values: values["parts"].pop("unet"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_newer, "schema 2", id="newer schema"),
        pytest.param(_damaged, "cannot be read", id="no JSON"),
        pytest.param(_incomplete, "damaged", id="incomplete manifest"),
        pytest.param(_missing, "is missing", id="missing file"),
        pytest.param(_truncated, "bytes", id="truncated file"),
        pytest.param(_swapped, "SHA-256", id="swapped file"),
        pytest.param(_foreign, "outside its folder", id="file outside"),
        pytest.param(_escaping("../../outside"), "does not record", id="weights outside"),
        pytest.param(_escaping("model.onnx_data/../../../outside"), "does not record", id="weights outside by detour"),
        pytest.param(_no_part, "holds no part of unet", id="missing part"),
    ],
)
def test_bad_artifacts_are_refused(sd1: Path, tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    place = tmp_path / "artifact"
    shutil.copytree(exported(sd1, "onnxruntime"), place)
    change(place)
    with pytest.raises(ArtifactError, match=message) as caught:
        StableDiffusionPipeline.from_pretrained(place)
    assert "\n" not in str(caught.value)
