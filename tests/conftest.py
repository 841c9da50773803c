"""Checkpoints that many tests share, written once per run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from checkpoints import tiny_sd1, tiny_sd2
from exported import once, one_process


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all processes of a run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def sd1(shared: Path) -> Path:
    """A random checkpoint of the first Stable Diffusion's kind (epsilon, 8 pixels per latent)."""
    return once(shared / "sd1", tiny_sd1)


@pytest.fixture(scope="session")
def sd2(shared: Path) -> Path:
    """A random checkpoint of the second kind (v-prediction, 2 pixels per latent)."""
    return once(shared / "sd2", tiny_sd2)


@pytest.fixture(name="one_process")
def _one_process() -> Iterator[None]:
    """Exports of this test start no processes."""
    with one_process():
        yield


@pytest.fixture(autouse=True)
def _no_plugin_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of the person who runs the tests must not decide which engines they see."""
    monkeypatch.delenv("ANAMORPH_PLUGINS", raising=False)
