"""`optimum-cli export anamorph`, with optimum's own command line.

optimum is installed without what it depends on: its command line needs nothing else until a command runs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OPTIMUM = "optimum==2.3.0"


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, str]]:
    """optimum's command line, which finds what this package installs into its namespace."""
    place = tmp_path_factory.mktemp("optimum")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, OPTIMUM],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    paths = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))
    return [sys.executable, "-m", "optimum.commands.optimum_cli"], {**os.environ, "PYTHONPATH": paths}


def test_it_is_listed_and_takes_our_arguments(command: tuple[list[str], dict[str, str]]) -> None:
    line, environment = command
    for arguments, expected in ((["export", "-h"], "anamorph"), (["export", "anamorph", "-h"], "--link")):
        done = subprocess.run([*line, *arguments], capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_failures_are_one_sentence_and_our_exit_code(command: tuple[list[str], dict[str, str]], tmp_path: Path) -> None:
    line, environment = command
    arguments = ["export", "anamorph", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--to", "onnx"]
    done = subprocess.run([*line, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("anamorph: ")
    assert "Traceback" not in done.stderr


@pytest.mark.processes
def test_it_exports(command: tuple[list[str], dict[str, str]], smallest: Path, tmp_path: Path) -> None:
    line, environment = command
    out = tmp_path / "out"
    arguments = ["export", "anamorph", str(smallest), str(out), "--to", "onnx", "--static", "16x16", "--batch", "1"]
    done = subprocess.run([*line, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert (out / "anamorph.json").is_file()
