"""Pictures to follow on the command line: named, recorded, replayed, and refused where they do not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_controlnet import picture

from anamorph.checkpoint import Source, open_checkpoint
from anamorph.cli import main
from anamorph.image import read_request


@pytest.fixture
def edges(tmp_path: Path) -> Path:
    picture(0, 16, 24).save(tmp_path / "edges.png")
    return tmp_path / "edges.png"


def draw(sd2: Path, out: Path, *more: str) -> int:
    return main(["generate", "a cat", "--model", str(sd2), "--backend", "eager", "--steps", "3", "--seed", "0",
                 "--out", str(out), *more])  # fmt: skip


def test_nets_and_pictures_are_named_recorded_and_replayed(
    sd2: Path, controlled_sd2: Path, edges: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, out = str(controlled_sd2 / "controlnet"), tmp_path / "cat.png"
    assert draw(sd2, out, "--controlnet", f"canny={net}", "--control", f"canny={edges}:0.5") == 0
    recorded = read_request(out)
    assert recorded["request"]["controlnet_conditioning_scale"] == [0.5]
    assert recorded["inputs"]["controls"][0]["net"] == "canny"
    assert recorded["inputs"]["nets"]["canny"]["sha256"] == open_checkpoint(Source(net)).digest()
    assert recorded["pipeline"] == "StableDiffusionControlNetPipeline"
    plain = tmp_path / "plain.png"
    assert draw(sd2, plain, "--size", "16x24") == 0
    assert (np.asarray(Image.open(plain)) != np.asarray(Image.open(out))).any()
    capsys.readouterr()
    assert main(["replay", str(out), "--control", str(edges), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"]
    picture(9, 16, 24).save(edges)
    assert main(["replay", str(out), "--control", str(edges)]) == 2
    assert "is another file" in capsys.readouterr().err
    assert main(["replay", str(out)]) == 2
    assert "the picture for canny is missing" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "said"), [
    (["--control", "EDGES"], "has none; name one with --controlnet"),
    (["--controlnet", "NET"], "the picture for controlnet is missing"),
    (["--controlnet", "NET", "--control", "pose=EDGES"], "is for pose, but the nets are controlnet"),
    (["--controlnet", "a=NET", "--controlnet", "b=NET", "--control", "EDGES"], "says not which of a, b"),
    (["--controlnet", "a=NET", "--controlnet", "a=NET"], "names a twice"),
    (["--controlnet", "NET", "--control", "none.png"], "there is no file none.png"),
    (["--controlnet", "SD2", "--control", "EDGES"], "ControlNetModel, ControlNetUnionModel, T2IAdapter"),
])  # fmt: skip
def test_what_does_not_fit_is_said_in_a_sentence(
    more: list[str], said: str, sd2: Path, controlled_sd2: Path, edges: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"EDGES": edges, "NET": controlled_sd2 / "controlnet", "SD2": sd2}
    options = list(more)
    for name, place in places.items():
        options = [option.replace(name, str(place)) for option in options]
    assert draw(sd2, tmp_path / "cat.png", *options) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed


def test_pictures_are_made_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo: Any = np.zeros((20, 30, 3), np.uint8)
    photo[:, 15:] = 200
    Image.fromarray(photo).save(tmp_path / "photo.png")
    out = tmp_path / "edges.png"
    assert main(["control", "canny", str(tmp_path / "photo.png"), "--out", str(out)]) == 0
    assert np.flatnonzero(np.asarray(Image.open(out)).any((0, 2))).tolist() == [14]
    np.save(tmp_path / "depth.npy", np.arange(12.0).reshape(3, 4))
    assert main(["control", "depth", str(tmp_path / "depth.npy"), "--out", str(out)]) == 0
    assert np.asarray(Image.open(out))[-1, -1].tolist() == [255] * 3
    assert main(["control", "tile", str(tmp_path / "photo.png"), "--resolution", "64", "--out", str(out)]) == 0
    assert Image.open(out).size == (128, 64)
    assert main(["control", "depth", str(tmp_path / "photo.png"), "--out", str(out)]) == 2
    assert "cannot be read as an array" in capsys.readouterr().err
