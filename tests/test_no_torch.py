"""Exported folders run in a virtual environment into which neither PyTorch nor transformers was ever installed."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import FORMATS, exported
from packaging.requirements import Requirement
from PIL import Image

import anamorph
from anamorph import StableDiffusionPipeline

ENGINES = tuple(FORMATS)
CALL: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 3, "seed": 3, "guidance_scale": 5.0}
ABSENT = ("torch", "transformers", "diffusers", "onnx", "scipy", "pytest")
WRITING = ("onnx",)
"""What an engine's extra brings for writing artifacts; running them must not need it."""
SCRIPT = """
import importlib.util, json, sys
import numpy as np
from anamorph import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
np.save(sys.argv[2], pipe("a cat", output_type="np", **json.loads(sys.argv[3])).images)
names = json.loads(sys.argv[4])
print(json.dumps({
    "found": [name for name in names if importlib.util.find_spec(name)],
    "engines": sorted({placed.engine for placed in pipe.placement.values()}),
}))
"""


def needed(name: str, extra: str) -> set[str]:
    """All distributions that `pip install 'name[extra]'` brings, without the named one itself."""
    found: set[str] = set()
    waiting = [(name, extra)]
    while waiting:
        current, wanted = waiting.pop()
        for requirement in map(Requirement, importlib.metadata.requires(current) or []):
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": wanted})
            if applies and requirement.name not in (*found, *WRITING):
                found.add(requirement.name)
                waiting.append((requirement.name, ""))
    return found


def linked(name: str, packages: Path) -> None:
    """Put an installed distribution into another environment, as links to its files here."""
    distribution = importlib.metadata.distribution(name)
    for first in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
        if not (packages / first).exists():
            (packages / first).symlink_to(Path(str(distribution.locate_file(first))))


def linked_package(packages: Path) -> None:
    """Put this package there: its files lie elsewhere where it is installed for editing."""
    distribution = importlib.metadata.distribution("anamorph")
    metadata = packages / f"anamorph-{distribution.version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: anamorph\nVersion: {distribution.version}\n")
    (metadata / "entry_points.txt").write_text(distribution.read_text("entry_points.txt") or "")
    ours = packages / "anamorph"
    ours.mkdir()
    for path in Path(anamorph.__file__).parent.iterdir():
        (ours / path.name).symlink_to(path.resolve())
    for name in ("backends", "exporters"):
        if not (ours / name).exists():
            (ours / name).symlink_to(Path(importlib.import_module(f"anamorph.{name}").__path__[0]).resolve())


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def python(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds this package, one engine and what they need."""
    place = tmp_path_factory.mktemp(engine)
    venv.create(place, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(place), "platbase": str(place)}))
    linked_package(packages)
    for name in sorted(needed("anamorph", FORMATS[engine])):
        linked(name, packages)
    return place / ("Scripts" if os.name == "nt" else "bin") / "python"


def test_the_api_needs_no_pytorch(sd2: Path, tmp_path: Path, engine: str, python: Path) -> None:
    out = tmp_path / "picture.npy"
    command = [python, "-I", "-c", SCRIPT, exported(sd2, engine), out, json.dumps(CALL), json.dumps([*ABSENT, engine])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"found": [engine], "engines": [engine]}
    assert "Warning" not in done.stderr
    reference = StableDiffusionPipeline.from_pretrained(sd2, backend="eager")("a cat", output_type="np", **CALL)
    np.testing.assert_allclose(np.load(out), reference.images, rtol=0, atol=1e-4)


def test_the_command_line_needs_no_pytorch(sd2: Path, tmp_path: Path, engine: str, python: Path) -> None:
    out = tmp_path / "picture.png"
    options = ["--size", "16x24", "--steps", "3", "--seed", "3", "--guidance", "5", "--model", exported(sd2, engine)]
    command = [python, "-I", "-m", "anamorph", "generate", "a cat", *options, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{engine} on cpu in float32" in done.stdout
    reference = StableDiffusionPipeline.from_pretrained(sd2, backend="eager")("a cat", output_type="np", **CALL)
    drawn = np.asarray(Image.open(out), np.float64)
    # Where a value lies between two levels, the last digit of float32 decides.
    assert np.abs(drawn - 255 * np.asarray(reference.images[0], np.float64)).max() <= 0.5 + 255e-4
