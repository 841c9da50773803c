"""Options that are not exact, beside the full computation: how arms are read, drawn in turns and summed up."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anamorph.benchmarks.fidelity import Arm, compare, parsed, summary, write_sheet
from anamorph.errors import InputError


def arm(label: str, shift: float, drawn: list[str]) -> Arm:
    """Draws noise that the prompt decides, and adds `shift`."""

    def draw(prompt: str, **call: Any) -> Any:
        drawn.append(label)
        noise = np.random.default_rng(len(prompt)).random((1, 16, 16, 3)).astype(np.float32)
        return SimpleNamespace(images=0.1 + 0.5 * noise + shift * call["strength"])

    return Arm(label, draw, {"strength": 1.0})


def test_arms_take_turns_and_are_compared_with_the_full_computation(tmp_path: Path) -> None:
    drawn: list[str] = []
    full, near = arm("full", 0.0, drawn), arm("near", 0.1, drawn)
    compare([full, near], ["a", "bb", "ccc"], {"seed": 0})
    assert drawn == ["full", "near"] * 4, "one picture before, then in turns"
    found = summary(full, near)
    assert (found["arm"], found["pictures"]) == ("near", 3)
    assert found["psnr_db_mean"] == found["psnr_db_least"] == 20.0  # -10 log10(0.1^2)
    assert found["ssim"] < 0.999
    assert summary(full, full)["ssim"] == 1.0
    write_sheet(tmp_path / "sheet.png", [full, near], ["a", "bb", "ccc"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 400


def test_options_of_an_arm() -> None:
    given = parsed("guidance_interval=[0.1,0.8] backend=openvino torch_dtype=bf16")
    assert given == {"guidance_interval": [0.1, 0.8], "backend": "openvino", "torch_dtype": "bf16"}
    with pytest.raises(InputError, match="'fast' is no option"):
        parsed("fast")
