"""Checkpoints that many tests share, written once per run."""

import os
from pathlib import Path

import pytest
from checkpoints import tiny_sd1, tiny_sd2

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of the first Stable Diffusion's kind (epsilon, 8 pixels per latent)."""
    return tiny_sd1(tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="session")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of the second kind (v-prediction, 2 pixels per latent)."""
    return tiny_sd2(tmp_path_factory.mktemp("sd2"))


@pytest.fixture(autouse=True)
def _no_plugin_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of the person who runs the tests must not decide which engines they see."""
    monkeypatch.delenv("ANAMORPH_PLUGINS", raising=False)
