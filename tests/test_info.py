"""`anamorph info`: what it says of every kind of model, from headers alone."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from checkpoints import tiny_inpaint
from exported import FORMATS, exported
from original_layout import make

from anamorph.cli import main


def info(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["info", *arguments, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_a_checkpoint_is_described_from_its_headers(sd1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = info(capsys, str(sd1))
    assert (report["pipeline"], report["format"], report["variants"]) == ("StableDiffusionPipeline", "checkpoint", [])
    rows = {row["name"]: row for row in report["components"]}
    models: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
    }  # fmt: skip
    for slot, kind in models.items():
        parameters = sum(value.numel() for value in kind.from_pretrained(sd1 / slot).parameters())
        assert (rows[slot]["class_name"], rows[slot]["parameters"]) == (kind.__name__, parameters)
        assert (rows[slot]["bytes"], rows[slot]["dtype"]) == (4 * parameters, "float32")
    assert rows["scheduler"] == {"name": "scheduler", "class_name": "DDIMScheduler", "parameters": None, "bytes": None,
                                 "dtype": None}  # fmt: skip
    assert set(report["tasks"]) == {"text to image", "image to image", "inpainting"}
    assert report["engines"]["eager"] == "opens it as it is"
    assert report["engines"]["onnxruntime"] == "opens its export to onnx, made at first use"
    assert "null" not in report["engines"]
    assert report["adapters"] == dict.fromkeys(("unet", "text_encoder"), "takes them hot or fused")


def test_a_model_for_inpainting_serves_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert info(capsys, str(tiny_inpaint(tmp_path)))["tasks"] == {"inpainting": "StableDiffusionInpaintPipeline"}


def test_terabytes_are_described_without_being_read(
    sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(sd1, tmp_path / "large"))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1 << 20, 1 << 15], "data_offsets": [0, 1 << 36]}}).encode()
    with (folder / "unet" / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (1 << 36))  # sparse: takes no room
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors",
                folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")  # fmt: skip
    (folder / "text_encoder" / "model.safetensors").unlink()
    torch.save({}, folder / "text_encoder" / "pytorch_model.bin")
    report = info(capsys, str(folder), "--variant", "fp16")
    rows = {row["name"]: row for row in report["components"]}
    assert (rows["unet"]["parameters"], rows["unet"]["bytes"], rows["unet"]["dtype"]) == (1 << 35, 1 << 36, "bfloat16")
    assert (rows["text_encoder"]["parameters"], rows["text_encoder"]["dtype"]) == (None, "pickle")
    assert report["variants"] == ["fp16"]
    assert main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "34.4 G" in text
    assert "68.7 GB" in text


@pytest.mark.parametrize("engine", FORMATS)
def test_an_exported_folder_says_which_engine_opens_it(
    sd1: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = info(capsys, str(exported(sd1, engine)))
    assert report["format"] == FORMATS[engine]
    assert report["engines"][engine] == "opens it as it is"
    assert report["engines"]["eager"] == f"does not open {FORMATS[engine]}, only checkpoint"
    rows = {row["name"]: row for row in report["components"]}
    assert rows["unet"]["bytes"] > 4 * 100_000
    assert set(report["tasks"]) == {"text to image", "image to image", "inpainting"}


def test_a_file_is_described_as_what_it_would_become(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(tmp_path, "sd1-inpaint", torch.float16)
    report = info(capsys, str(made.file))
    rows = {row["name"]: row for row in report["components"]}
    for slot, model in made.models.items():
        parameters = sum(value.numel() for value in model.parameters())
        assert (rows[slot]["parameters"], rows[slot]["dtype"]) == (parameters, "float16")
    assert (report["pipeline"], report["format"]) == ("StableDiffusionInpaintPipeline", "single file")
    assert report["tasks"] == {"inpainting": "StableDiffusionInpaintPipeline"}


def test_pipelines_of_others_are_listed_and_strange_names_refused(
    sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(sd1, tmp_path / "other"))
    index = (folder / "model_index.json").read_text().replace('"StableDiffusionPipeline"', '"FluxPipeline"')
    (folder / "model_index.json").write_text(index)
    assert info(capsys, str(folder))["tasks"] == {}
    assert main(["info", str(folder)]) == 0
    assert "none in this version, which has StableDiffusion" in capsys.readouterr().out
    assert main(["info", "someone/none"]) == 1
    assert "someone/none is neither a local folder nor could it be had" in capsys.readouterr().err
