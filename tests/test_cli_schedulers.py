"""`anamorph schedulers` and `anamorph compare`, and the plot that the latter draws."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anamorph.cli import OK, USAGE, main
from anamorph.plot import COLOURS, log_plot, ticks
from anamorph.schedulers import SCHEDULERS

Capture = pytest.CaptureFixture[str]


def test_every_scheduler_is_listed_with_its_use(capsys: Capture) -> None:
    assert main(["schedulers", "--json"]) == OK
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(SCHEDULERS)
    assert len({row["when"] for row in rows.values()}) == len(rows)
    assert all(20 < len(row["when"]) < 110 for row in rows.values())
    assert rows["HeunDiscreteScheduler"]["calls_per_step"] == 2
    assert rows["UniPCMultistepScheduler"]["compatible"]
    assert not rows["LCMScheduler"]["compatible"]
    assert main(["schedulers"]) == OK
    assert "UniPCMultistepScheduler" in capsys.readouterr().out


def test_comparison_measures_and_draws(sd1: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "sheet.png"
    arguments = ["compare", "a cat", "--model", str(sd1), "--schedulers", "EulerDiscrete,HeunDiscreteScheduler",
                 "--steps", "4,2", "--reference-steps", "12", "--backend", "eager", "--out", str(out)]  # fmt: skip
    assert main([*arguments, "--json"]) == OK
    found = json.loads(capsys.readouterr().out)["samples"]
    assert [(row["scheduler"], row["steps"], row["calls"]) for row in found] == [
        ("EulerDiscrete", 2, 2), ("EulerDiscrete", 4, 4), ("HeunDiscrete", 2, 3), ("HeunDiscrete", 4, 7)]  # fmt: skip
    assert all(0 < row["distance"] < 10 for row in found)
    picture = Image.open(out)
    assert picture.width >= 900
    colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or []}
    lines = [tuple(int(code[i : i + 2], 16) for i in (1, 3, 5)) for code in COLOURS]
    assert {lines[0], lines[1]} <= colours
    assert lines[2] not in colours


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--steps", "4,x"], "--steps '4,x' is no list of whole numbers"),
        (["--out", "x.jpg"], "does not end in .png"),
    ],
)
def test_wrong_arguments_are_named(extra: list[str], message: str, sd1: Path, capsys: Capture) -> None:
    arguments = ["compare", "a cat", "--model", str(sd1), "--schedulers", "DDIM", *extra]
    assert main(arguments) == USAGE
    assert message in capsys.readouterr().err


def test_ticks_are_round_numbers() -> None:
    assert ticks(0.15, 2.5) == pytest.approx([0.2, 0.5, 1, 2])
    assert ticks(0.0004, 3) == pytest.approx([0.001, 0.01, 0.1, 1])


def test_a_straight_line_on_logarithmic_axes_is_straight() -> None:
    plot = log_plot("t", "s", ("x", "y"), {"line": [(x, 1 / x) for x in (1, 4, 16)]}, (900, 460))
    wanted = np.array([int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)])
    ys, xs = np.nonzero(np.abs(np.asarray(plot, int) - wanted).sum(2) < 30)
    inside = xs < 640  # the legend stands to the right
    slope = np.polyfit(xs[inside], ys[inside], 1)
    assert np.abs(np.polyval(slope, xs[inside]) - ys[inside]).max() < 8
    assert slope[0] > 0.2
