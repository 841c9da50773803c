"""The plug-in of `examples/plugin-template`: installed like a stranger's, kept to the contract, and drawn with."""

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anamorph import plugins, testing
from anamorph.cli import OK, main

TEMPLATE = Path(__file__).parent.parent / "examples" / "plugin-template"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that pip installed it into, for as long as this module's tests run."""
    place = tmp_path_factory.mktemp("installed")
    source = tmp_path_factory.mktemp("source") / "template"  # a build writes beside its sources
    subprocess.run(["cp", "-r", TEMPLATE, source], check=True)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(place)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    sys.path.insert(0, str(place))
    importlib.invalidate_caches()
    plugins.installed.cache_clear()
    yield place
    sys.path.remove(str(place))
    plugins.installed.cache_clear()


@pytest.fixture(scope="module")
def own(installed: Path) -> Any:
    """Its own tests."""
    assert (installed / "anamorph_tape").is_dir()
    spec = importlib.util.spec_from_file_location("test_tape", TEMPLATE / "tests" / "test_tape.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("check", testing.CHECKS, ids=str)
def test_it_keeps_the_contract(own: Any, check: testing.Check) -> None:
    own.test_contract(check)


def test_it_refuses_what_is_no_operation_on_tensors(own: Any) -> None:
    (names,) = (mark.args[1] for mark in own.test_a_strangers_tape_calls_nothing_but_operations_on_tensors.pytestmark)
    for name in names:
        own.test_a_strangers_tape_calls_nothing_but_operations_on_tensors(name)


@pytest.mark.usefixtures("installed")
def test_a_picture_comes_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = testing.subject("tape").opened.folder, tmp_path / "cat.png"
    options = ["--size", "16x16", "--steps", "2", "--seed", "0", "--out", str(out)]
    assert main(["generate", "a cat", "--model", str(model), *options]) == OK
    assert out.is_file()
    assert "tape on cpu in float32" in capsys.readouterr().out
