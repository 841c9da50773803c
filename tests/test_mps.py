"""The engine for Metal, with its device faked: the processor stands in, and the machine is whatever a test says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import relative

from anamorph import DiffusionPipeline
from anamorph.backends import mps, mps_quirks
from anamorph.backends.mps import Mps, SingleArrays
from anamorph.backends.mps_quirks import QUIRKS, Machine
from anamorph.errors import BackendError, BackendUnavailable
from anamorph.models.attention import Sliceable
from anamorph.plugins import get_backend

SMALL = Machine(macos=(15, 1), torch=(2, 13), memory=16 * 2**30)
LARGE = Machine(macos=(15, 1), torch=(2, 13), memory=128 * 2**30)
OLD = Machine(macos=(13, 6), torch=(1, 13), memory=128 * 2**30)
CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": [3, 4, 5], "guidance_scale": 5.0, "output_type": "np"}
PROMPTS = ["a cat", "a dog", "a red cat"]
Faked = Callable[[Machine], None]


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Faked:
    """Let the processor be the device of a machine."""

    def fake(machine: Machine) -> None:
        monkeypatch.setattr(Mps, "unavailable", lambda _: None)
        monkeypatch.setattr(Mps, "devices", lambda _: ("cpu",))
        monkeypatch.setattr(Mps, "places", {"cpu": Mps.places.get("mps", Mps.places.get("cpu"))})
        monkeypatch.setattr(mps_quirks, "machine", lambda: machine)

    return fake


def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many rows each call of PyTorch's functions takes from now on, by part."""
    seen: dict[str, list[int]] = {}
    plain = mps.TorchSession.__call__

    def call(self: Any, inputs: Any) -> Any:
        first = next(iter(inputs.values()))
        seen.setdefault(self.program.part, []).append(first.shape[0])
        return plain(self, inputs)

    monkeypatch.setattr(mps.TorchSession, "__call__", call)
    return seen


def test_batches_are_cut_and_pictures_stay_the_same(sd1: Path, faked: Faked, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = DiffusionPipeline.from_pretrained(sd1, backend="eager")(PROMPTS, **CALL).images
    faked(LARGE)
    pipe = DiffusionPipeline.from_pretrained(sd1, backend="mps")
    seen = rows(monkeypatch)
    assert relative(pipe(PROMPTS, **CALL).images, expected) <= 1e-5
    assert {part: max(counts) for part, counts in seen.items()} == {"text_encoder": 1, "unet": 2, "vae_decoder": 1}
    assert seen["unet"] == [2, 2, 2] * 2
    placed = pipe.placement["unet"]
    assert placed.engine == "mps"
    assert "batches" in placed.details["quirks"]
    assert "attention-slices" not in placed.details["quirks"]


def test_little_memory_means_half_of_the_heads_at_a_time(sd1: Path, faked: Faked) -> None:
    expected = DiffusionPipeline.from_pretrained(sd1, backend="eager")("a cat", **{**CALL, "seed": 3}).images
    faked(SMALL)
    pipe: Any = DiffusionPipeline.from_pretrained(sd1, backend="mps")
    layers = [layer for layer in pipe.unet.modules() if isinstance(layer, Sliceable)]
    assert all(layer.at_once == max(layer.heads // 2, 1) for layer in layers)
    assert relative(pipe("a cat", **{**CALL, "seed": 3}).images, expected) <= 1e-5


def test_old_versions_are_warmed_up_and_get_no_bfloat16(
    sd1: Path, faked: Faked, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(OLD)
    pipe = DiffusionPipeline.from_pretrained(sd1, backend="mps")
    seen = rows(monkeypatch)
    for seed in (3, 4):
        pipe("a cat", **{**CALL, "seed": seed})
    assert len(seen["unet"]) == 2 * 2 + 1
    assert len(seen["vae_decoder"]) == 2 + 1
    with pytest.raises(BackendError, match="does not run in bfloat16"):
        DiffusionPipeline.from_pretrained(sd1, backend="mps", torch_dtype="bfloat16")
    faked(LARGE)
    assert Mps().precisions("mps") == ("float32", "float16", "bfloat16")


def test_autoencoders_stay_in_float32(sd1: Path, faked: Faked) -> None:
    faked(LARGE)
    with pytest.raises(BackendError, match=r"black .*--no-half-vae\); let vae be in float32"):
        DiffusionPipeline.from_pretrained(sd1, backend="mps", torch_dtype="float16")
    types = {"vae": "float32", "default": "float16"}
    pipe = DiffusionPipeline.from_pretrained(sd1, backend="mps", torch_dtype=types)
    assert {part: placed.precision for part, placed in pipe.placement.items()} == {
        "text_encoder": "float16", "unet": "float16", "vae_decoder": "float32",
    }  # fmt: skip


def test_what_the_device_lacks_never_reaches_it() -> None:
    assert SingleArrays(torch.device("cpu")).put(np.ones(3)).dtype == torch.float32
    assert SingleArrays(torch.device("cpu")).put(np.ones(3, np.int64)).dtype == torch.int64


def test_each_channel_has_a_plane_of_its_own(sd1: Path, faked: Faked) -> None:
    faked(LARGE)
    pipe: Any = DiffusionPipeline.from_pretrained(sd1, backend="mps", torch_dtype="bfloat16")
    assert pipe.unet.conv_in.weight.is_contiguous()
    with pytest.warns(UserWarning, match="mps chooses the layout of its weights by itself"):
        pipe.unet.to(memory_format=torch.channels_last)


def test_each_quirk_names_its_source() -> None:
    assert all(quirk.problem and quirk.remedy for quirk in QUIRKS.values())
    assert all(
        "#" in quirk.source or "documentation" in quirk.source or ".sh" in quirk.source for quirk in QUIRKS.values()
    )


def test_elsewhere_it_says_why_it_cannot_run() -> None:
    with pytest.raises(BackendUnavailable, match=r"Metal is on macOS alone, and this is Linux; take the engine eager$"):
        get_backend("mps")
