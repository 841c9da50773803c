"""Checkpoints that many tests share, written once per run."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
else:
    os.environ["ANAMORPH_TESTS"] = tempfile.mkdtemp(prefix="anamorph-tests-")  # the processes of a run share it

from checkpoints import tiny_refiner, tiny_sd1, tiny_sd2, tiny_sdxl
from exported import once, one_process, shared_place


def pytest_sessionfinish() -> None:
    """What the processes of a run share is removed by the one that started them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(shared_place(), ignore_errors=True)


@pytest.fixture(scope="session")
def sd1() -> Path:
    """A random checkpoint of the first Stable Diffusion's kind (epsilon, 8 pixels per latent)."""
    return once(shared_place() / "sd1", tiny_sd1)


@pytest.fixture(scope="session")
def sd2() -> Path:
    """A random checkpoint of the second kind (v-prediction, 2 pixels per latent)."""
    return once(shared_place() / "sd2", tiny_sd2)


@pytest.fixture(scope="session")
def sdxl() -> Path:
    """A random checkpoint of SDXL's kind (two text encoders, 2 pixels per latent)."""
    return once(shared_place() / "sdxl", tiny_sdxl)


@pytest.fixture(scope="session")
def refiner() -> Path:
    """A random checkpoint of the kind of SDXL's refiner."""
    return once(shared_place() / "refiner", tiny_refiner)


@pytest.fixture(name="one_process")
def _one_process() -> Iterator[None]:
    """Exports of this test start no processes."""
    with one_process():
        yield


@pytest.fixture(autouse=True)
def _no_plugin_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of the person who runs the tests must not decide which engines they see."""
    monkeypatch.delenv("ANAMORPH_PLUGINS", raising=False)
