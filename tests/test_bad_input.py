"""What is wrong with an input, at the command line: one sentence, a code that is not zero, and nothing written."""

import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import mask, picture
from PIL import Image

from anamorph.cli import FAILED, OK, USAGE, main

Capture = pytest.CaptureFixture[str]
CALL = ["generate", "a cat", "--backend", "eager", "--steps", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and masks, some of them wrong."""
    folder = tmp_path_factory.mktemp("files")
    picture(64, 64).save(folder / "right.png")
    picture(64, 64).convert("CMYK").save(folder / "cmyk.jpg")
    picture(64, 64).convert("RGBA").save(folder / "rgba.png")
    picture(5, 64).save(folder / "flat.png")
    Image.fromarray(np.zeros((8, 8), np.int32)).save(folder / "deep.tiff")
    mask(64, 64).save(folder / "mask.png")
    mask(32, 64).save(folder / "small.png")
    (folder / "cut.png").write_bytes((folder / "right.png").read_bytes()[:60])
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 1 << 20, 1 << 20, 8, 2, 0, 0, 0)
    (folder / "huge.png").write_bytes(header + b"\0" * 64)
    return folder


PICTURES: list[tuple[list[str], str]] = [
    (["--image", "rgba.png"], "image has mode RGBA, expected RGB"),
    (["--image", "cmyk.jpg"], "image has mode CMYK, expected RGB"),
    (["--image", "deep.tiff"], "image has mode I, expected RGB"),
    (["--image", "flat.png"], "height is 0, expected a positive multiple of 8 pixels"),
    (["--image", "cut.png"], "cannot be read as a picture"),
    (["--image", "huge.png"], "cannot be read as a picture"),
    (["--image", "right.png", "--mask", "small.png"], "mask_image is 32x64 and image 64x64 pixels, expected the same"),
    (["--image", "right.png", "--mask", "rgba.png"], "mask_image has mode RGBA, expected 1 or L or RGB"),
    (["--image", "right.png", "--strength", "1.5"], "strength is 1.5, expected 0 to 1"),
    (["--image", "right.png", "--strength", "-0.1"], "strength is -0.1, expected 0 to 1"),
    (["--image", "right.png", "--strength", "nan"], "strength is nan, expected 0 to 1"),
    (["--image", "right.png", "--strength", "0.2"], "strength 0.2 leaves none of 2 steps; expected at least 1/2"),
    (["--image", "right.png", "--task", "upscale"], "StableDiffusionPipeline does not serve upscale"),
]


def refused(arguments: list[str], words: str, code: int, out: Path, capsys: Capture) -> None:
    """Run a command that must fail."""
    capsys.readouterr()
    before = sorted(out.parent.rglob("*"))
    assert main([*CALL, *arguments, "--out", str(out)]) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.startswith("anamorph: ")
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert sorted(out.parent.rglob("*")) == before


@pytest.mark.parametrize(("arguments", "words"), PICTURES, ids=[words[:44] for _, words in PICTURES])
def test_pictures_and_what_shall_be_made_of_them(
    sd1: Path, files: Path, arguments: list[str], words: str, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(files)
    refused(["--model", str(sd1), *arguments], words, USAGE, tmp_path / "out" / "x.png", capsys)


def test_a_refiner_is_no_base(refiner: Path, sdxl: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "x.png"
    task = ["--task", "text-to-image"]
    refused(
        ["--model", str(refiner), *task],
        "this unet is a refiner's, which is told an aesthetic score, but a base is needed",
        FAILED,
        out,
        capsys,
    )
    refused(["--model", str(refiner)], "image is missing; this task starts from image", USAGE, out, capsys)
    assert main([*CALL, "--model", str(sdxl), *task, "--out", str(out)]) == OK


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.place,)


def code_in_a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Trap(path.parent / "ran")}))


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}))
        archive.writestr("m/data/0", b"\0" * (32 << 20), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20


def overlapping_bomb(path: Path) -> None:
    """An archive that claims to be larger inside than it is."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data/0", b"\0" * 64)
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\x01\x02")
    content[central + 20 : central + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(content)


def terabytes(path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)


def endless_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 50) + b"{}")


def expanded(path: Path) -> None:
    """One number that claims to be terabytes of them."""
    torch.save({"state_dict": {"w": torch.zeros(1).expand(1 << 40)}}, path)


FILES: list[tuple[Callable[[Path], None], str, str]] = [
    (code_in_a_pickle, "m.ckpt", "cannot be loaded as plain weights: it holds code or objects beside the weights"),
    (zip_bomb, "m.ckpt", "holds m/data/0 compressed from 33554432 to"),
    (overlapping_bomb, "m.ckpt", "claims 1073741824 bytes for m/data/0 and has"),
    (terabytes, "m.safetensors", "is truncated: tensor w ends at byte 43980465111"),
    (endless_header, "m.safetensors", "its header is cut off or corrupt"),
    (expanded, "m.ckpt", "claims 4398046511104 bytes for w and stores 4"),
]


@pytest.mark.parametrize(("write", "name", "words"), FILES, ids=[write.__name__ for write, _, _ in FILES])
def test_files_that_lie(
    write: Callable[[Path], None], name: str, words: str, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("ANAMORPH_CACHE", str(tmp_path / "cache"))
    write(tmp_path / name)
    refused(["--model", str(tmp_path / name)], words, FAILED, tmp_path / "x.png", capsys)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("write", "name", "words"), FILES, ids=[write.__name__ for write, _, _ in FILES])
def test_folders_with_files_that_lie(
    sd2: Path, write: Callable[[Path], None], name: str, words: str, tmp_path: Path, capsys: Capture
) -> None:
    folder = Path(shutil.copytree(sd2, tmp_path / "copy"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    ending = ".bin" if name.endswith(".ckpt") else ".safetensors"
    write(folder / "unet" / f"diffusion_pytorch_model{ending}")
    if write is expanded:
        words = "state_dict is a dict, expected a tensor"  # a model's own file holds tensors by name
    refused(["--model", str(folder)], words, FAILED, tmp_path / "x.png", capsys)
    assert not (folder / "unet" / "ran").exists()


def test_two_variants_lack_one_component(sd2: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = Path(shutil.copytree(sd2, tmp_path / "copy"))
    for slot, variant in (("unet", "fp16"), ("vae", "non_ema")):
        plain = folder / slot / "diffusion_pytorch_model.safetensors"
        plain.rename(plain.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    for wanted, lacking in (("fp16", "vae"), ("non_ema", "unet")):
        words = f"{lacking} has neither weights of variant '{wanted}' nor plain ones; name a variant that all have"
        refused(["--model", str(folder), "--variant", wanted], words, FAILED, tmp_path / "x.png", capsys)
    refused(["--model", str(folder)], "Is the variant right?", FAILED, tmp_path / "x.png", capsys)
