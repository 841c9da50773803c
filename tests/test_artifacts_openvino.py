"""Folders in OpenVINO's format that are damaged, incomplete or point elsewhere are refused by every command."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from exported import exported
from perturbed import copied, record_again, rewrite_manifest

from anamorph import StableDiffusionPipeline
from anamorph.cli import main
from anamorph.errors import ArtifactError

BIN, XML = "unet/openvino_model.bin", "unet/openvino_model.xml"


def _remove(place: Path) -> None:
    (place / BIN).unlink()


def _truncate(place: Path) -> None:
    os.truncate(place / BIN, (place / BIN).stat().st_size - 4096)


def _swap(place: Path) -> None:
    """The weights of another part of the same size: those of the decoder, filled up."""
    data = (place / "vae_decoder" / "openvino_model.bin").read_bytes()
    size = (place / BIN).stat().st_size
    (place / BIN).write_bytes((data * (size // len(data) + 1))[:size])


def _cut_with_its_record(place: Path) -> None:
    os.truncate(place / BIN, (place / BIN).stat().st_size // 2)
    record_again(place, "unet")


def _no_xml(place: Path) -> None:
    (place / XML).write_text("<?xml version='1.0'?><html/>")
    record_again(place, "unet")


def _half_xml(place: Path) -> None:
    text = (place / XML).read_text()
    (place / XML).write_text(text[: len(text) // 2])
    record_again(place, "unet")


def _named_weights(place: Path) -> None:
    text = (place / XML).read_text()
    (place / XML).write_text(text.replace("<rt_info>", '<rt_info><__weights_path value="/etc/passwd"/>', 1))
    record_again(place, "unet")


def _unrecorded_weights(place: Path) -> None:
    rewrite_manifest(place, lambda values: values["parts"]["unet"]["files"].pop(BIN))


def _newer(place: Path) -> None:
    rewrite_manifest(place, lambda values: values.update(schema=99))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_remove, "is missing", id="missing weights"),
        pytest.param(_truncate, "bytes", id="truncated weights"),
        pytest.param(_swap, "SHA-256", id="swapped weights"),
        pytest.param(_cut_with_its_record, "cannot be opened by OpenVINO", id="truncated weights and a forged record"),
        pytest.param(_no_xml, "no OpenVINO IR", id="another kind of XML"),
        pytest.param(_half_xml, "cannot be opened by OpenVINO", id="half a graph"),
        pytest.param(_named_weights, "names a file of weights", id="weights elsewhere"),
        pytest.param(_unrecorded_weights, "does not record", id="weights without a record"),
        pytest.param(_newer, "schema 99", id="newer schema"),
    ],
)
def test_bad_openvino_folders_are_refused_by_every_command(
    sd2: Path, tmp_path: Path, change: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(exported(sd2, "openvino"), tmp_path / "artifact")
    change(folder)
    with pytest.raises(ArtifactError, match=message):
        StableDiffusionPipeline.from_pretrained(folder)
    assert main(["generate", "a cat", "--model", str(folder), "--out", str(tmp_path / "cat.png")]) == 1
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "cat.png").exists()


def test_a_graph_of_another_format_is_not_read_under_openvino_s_name(sd2: Path, tmp_path: Path) -> None:
    """OpenVINO would read it, and the files that it refers to."""
    folder = copied(exported(sd2, "openvino"), tmp_path / "artifact")
    shutil.copy(exported(sd2, "onnxruntime") / "unet" / "model.onnx", folder / XML)
    record_again(folder, "unet")
    with pytest.raises(ArtifactError, match="no OpenVINO IR"):
        StableDiffusionPipeline.from_pretrained(folder)
