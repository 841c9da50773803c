"""One table of what rewrites and options gain, from results whose arms took turns."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anamorph.benchmarks.gains import gains, page
from anamorph.benchmarks.records import Measured, Result
from anamorph.benchmarks.scenarios import Cell
from anamorph.cli import USAGE, main
from anamorph.errors import InputError

CALL = Cell(model="/models/sd15", task="denoiser", engine="openvino", precision="bfloat16", width=512, height=768)
PICTURE = replace(CALL, task="text-to-image")


def result(*arms: tuple[Cell, float], together: bool = True) -> Result:
    """Arms whose calls took turns, each always the same seconds."""
    cells = {}
    for cell, seconds in arms:
        sample = {"total": seconds, "sentinel": [1.0, 1.0]}
        burst: dict[str, Any] = {
            "turn": 0, "samples": [sample] * 9, "void": None, "cache": "cold", "first": {"total": seconds},
            "phases": {"import_s": 0.1, "export_s": 0.0, "load_s": 0.2}, "placement": [], "memory": {},
        }  # fmt: skip
        parity = {"passed": True, "note": "", "stages": {"denoiser": 2e-3}, "psnr_db": 42.0}
        cells[cell.key] = Measured(cell, parity=parity, bursts=[burst])
    about = {"processor": "A processor", "cores": 2, "git": {"commit": "0123456789abcdef"}}
    run = {"plan": {"drift": 0.1, "together": together}, "scenario": "turns", "environment": about, "time": "today"}
    found = Result(run, cells)
    found.weigh(arms[0][0].work)
    return found


def row(text: str, word: str) -> list[str]:
    """The cells of the one row of the table whose second cell begins with a word."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    (found,) = [cells for cells in rows if cells[1].startswith(word)]
    return found


def test_rewrites_stand_beside_none_with_the_pairs_of_their_calls() -> None:
    seconds = {"none": 3.0, "keys-once": 2.0, "step-scope": 3.3, "default": 1.5}
    found = result(*((replace(CALL, rewrites=names), time) for names, time in seconds.items()))
    text = page([found])
    start = ["openvino bfloat16", "keys-once", "no rewrites", "sd15, call of the denoiser, 512x768"]
    assert row(text, "keys-once")[:4] == start
    assert text.endswith("- turns: A processor, 2 cores; commit 0123456789ab; begun today\n")
    assert row(text, "keys-once")[4].startswith("1.500 (1.500 to 1.500, 9 pairs")
    assert row(text, "keys-once")[5:] == ["2.0e-03", "42.0 dB", "-", "on"]
    assert row(text, "step-scope")[4].startswith("0.909 (")
    assert row(text, "step-scope")[-1] == "off"
    assert row(text, "all that are on by themselves")[4].startswith("2.000 (")
    assert [gain.line.cell.rewrites for gain in gains(found)] == ["default", "keys-once", "step-scope"]


def test_a_rewrite_stands_beside_all_others() -> None:
    others = replace(CALL, rewrites="phase-convolutions,row-norms,keys-once,times-once,prefix-sharing,bytes-out")
    text = page([result((others, 3.0), (replace(CALL, rewrites="default"), 2.0))])
    assert row(text, "key-chunks")[1:3] == ["key-chunks", "the same without"]


def test_approximations_stand_beside_the_full_computation_or_another_tool(tmp_path: Path) -> None:
    cached = replace(PICTURE, caching=2, rewrites="default,step-caching")
    guided, whole = replace(PICTURE, interval="0.0-0.8"), replace(PICTURE, quantize="int8")
    peer = replace(PICTURE, engine="openvino-genai", static=True)
    fidelity = tmp_path / "fidelity.jsonl"
    arms = {
        "rewrites=default,step-caching step_caching=2": 41.0, "guidance_interval=[0,0.8]": 31.0,
        "model=int8 backend=openvino torch_dtype=float32": 28.0, "rewrites=default,step-caching step_caching=3": 38.0,
    }  # fmt: skip
    rows = [{"arm": arm, "psnr_db_mean": value, "ssim": 0.99, "pictures": 50} for arm, value in arms.items()]
    fidelity.write_text("\n".join(map(json.dumps, rows)))
    text = page([result((PICTURE, 4.0), (cached, 2.0), (guided, 3.2), (peer, 5.0))], fidelity)
    assert row(text, "cached 2")[1:5] == [
        "cached 2, step-caching", "the same without", "sd15, picture, 512x768, 20 steps",
        "2.000 (2.000 to 2.000, 9 pairs of calls)",
    ]  # fmt: skip
    assert row(text, "cached 2")[-2:] == ["41.0 dB, SSIM 0.990 (50)", "off"]
    assert row(text, "guided 0.0-0.8")[-2:] == ["31.0 dB, SSIM 0.990 (50)", "off"]
    assert row(page([result((PICTURE, 4.0), (peer, 5.0))]), "all that are")[2:5:2] == [
        "openvino-genai static", "1.250 (1.250 to 1.250, 9 pairs of calls)",
    ]  # fmt: skip
    text = page([result((whole, 2.5), (peer, 5.0))], fidelity)
    assert row(text, "int8")[1:3] == ["int8", "openvino-genai static"]
    assert row(text, "int8")[-2:] == ["28.0 dB, SSIM 0.990 (50)", "off"]


def test_results_without_turns_and_lists_of_something_else_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = result((replace(CALL, rewrites="none"), 3.0), (CALL, 2.0), together=False)
    with pytest.raises(InputError, match="no arms took turns in these results"):
        page([alone])
    turns = result((replace(CALL, rewrites="none"), 3.0), (CALL, 2.0))
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("{}")
    with pytest.raises(InputError, match="holds other lines than"):
        page([turns], wrong)
    with pytest.raises(InputError, match="cannot be read"):
        page([turns], tmp_path / "none")
    assert main(["bench", "gains", str(tmp_path / "none")]) == USAGE
    assert "none" in capsys.readouterr().err
