"""Weights in bfloat16 for OpenVINO: one copy for all graphs and sizes of a component, and the same pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity import relative
from safetensors.torch import load_file, save_file

from anamorph import DiffusionPipeline
from anamorph.backends.openvino import OpenVino
from anamorph.backends.openvino_rounded import FILE, rounded
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.entries import Entry, every, nothing_kept
from anamorph.exporting import cached_export
from anamorph.plugins import get_exporter

pytestmark = pytest.mark.skipif(
    "bfloat16" not in OpenVino().precisions("cpu"), reason="the processor has no bfloat16 for OpenVINO"
)
UNET = Path("unet/diffusion_pytorch_model.safetensors")
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANAMORPH_CACHE", str(tmp_path / "cache"))


def drawn(folder: Path, **call: Any) -> NDArray[Any]:
    """A picture in bfloat16."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder, backend="openvino", torch_dtype="bfloat16")
    return np.asarray(pipe("a cat", num_inference_steps=2, seed=0, output_type="np", **call).images)


def copies() -> dict[str, Entry]:
    return {entry.key.part: entry for entry in every() if entry.key.engine == "rounded"}


def stored_as(kind: str, checkpoint: Path, place: Path) -> Path:
    """The checkpoint with its weights in another type."""
    for path in checkpoint.rglob("*"):
        new = place / path.relative_to(checkpoint)
        new.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({name: value.to(TYPES[kind]) for name, value in load_file(path).items()}, new)
        elif path.is_file():
            new.write_bytes(path.read_bytes())
    return place


def test_pictures_are_as_near_as_with_weights_that_openvino_rounds(sd1: Path) -> None:
    exact = DiffusionPipeline.from_pretrained(sd1, backend="eager", rewrites="none")
    picture = np.asarray(exact("a cat", num_inference_steps=2, seed=0, output_type="np").images)
    with nothing_kept():
        theirs = relative(drawn(sd1), picture)
    assert not copies()
    ours = relative(drawn(sd1), picture)
    assert sorted(copies()) == ["text_encoder_weights", "unet_weights", "vae_weights"]
    assert 0 < ours <= 1.2 * theirs <= 0.05


def test_a_copy_serves_all_sizes_and_graphs_and_is_small(sd1: Path) -> None:
    first = drawn(sd1)
    before = copies()
    drawn(sd1, height=128, width=128)
    drawn(sd1, num_images_per_prompt=2)
    np.testing.assert_array_equal(drawn(sd1), first)
    assert copies() == {name: copies()[name] for name in before}
    assert {name: entry.made for name, entry in copies().items()} == {name: one.made for name, one in before.items()}
    stored = (sd1 / UNET).stat().st_size
    assert 0.4 < before["unet_weights"].size / stored < 0.51
    compiled = [entry.size for entry in every() if entry.key.part == "unet"]
    assert len(compiled) == 2  # for the first size alone, and for all
    assert max(compiled) < 0.4 * stored, "the weights are not stored a second time"


def test_a_copy_holds_what_pytorch_rounds(sd1: Path) -> None:
    artifact = cached_export(open_checkpoint(Source(str(sd1))), get_exporter(["openvino"]), None).artifact
    assert artifact is not None
    part = artifact.parts["unet"]
    found = rounded(part, sd1)
    assert found
    weights = load_file(sd1 / UNET)
    for name, linked in found.items():
        value = weights[part.constants[name].tensor].to(torch.bfloat16)
        bits = value.view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(linked.values.ravel(), bits.ravel())
        assert linked.place is not None
        assert linked.place.file == copies()["unet_weights"].folder / FILE


@pytest.mark.parametrize("kind", TYPES)
def test_narrow_checkpoints_are_drawn_from_without_wide_copies(sd1: Path, tmp_path: Path, kind: str) -> None:
    narrow = stored_as(kind, sd1, tmp_path / "narrow")
    assert relative(drawn(narrow), drawn(sd1)) <= 0.05
    sizes = [entry.size for entry in every() if entry.key.part == "unet"]
    assert len(sizes) == 2
    assert max(sizes) < 1.1 * min(sizes)


def test_a_damaged_copy_is_made_again(sd1: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = drawn(sd1)
    path = copies()["unet_weights"].folder / FILE
    path.write_bytes(path.read_bytes()[:-2])
    np.testing.assert_array_equal(drawn(sd1), first)
    assert "removed from the cache and made again" in caplog.text
    assert path.is_file()
