"""The table of adapters: cells that compare, and whatever else becomes a row."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from adapter_cells import ADAPTERS, FAMILIES, TASKS, Engine, Files, call_of, cell, theirs
from adapter_table import ENGINES, Kept, answers, passed, table
from exported import shared_place
from parity import LATENT_BOUND, worst

PIECE = ("ControlNet + LoRA + IP-Adapter", "image-to-image")


@pytest.fixture(scope="module")
def engine() -> Engine:
    place = shared_place() / "adapter-table"
    place.mkdir(exist_ok=True)
    return Engine("eager", Files(FAMILIES["SD2"], place))


def test_a_cell_is_within_the_bounds_and_what_differs_is_not(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    row = cell(engine, engine, *PIECE)
    assert passed(row, "eager")
    assert row["effect"] > 0.1
    assert not passed({**row, "latents": 1.1 * LATENT_BOUND}, "eager")
    own = engine.trace(*PIECE)
    weaker: dict[str, Any] = {"controlnet_conditioning_scale": 0.69}
    monkeypatch.setattr("adapter_cells.call_of", lambda *given: {**call_of(*given), **weaker})
    assert worst(own, theirs(engine.files, ADAPTERS[PIECE[0]], PIECE[1]))[0] > 10 * LATENT_BOUND


def test_what_there_is_not_says_why(engine: Engine) -> None:
    row = cell(engine, engine, "T2I-Adapter", "inpaint")
    assert row == {"reason": "diffusers has no such pipeline", "refused": True}
    row = cell(Engine("abacus", engine.files), engine, "none", "inpaint")
    assert "abacus" in row["reason"]
    assert row["refused"]


PRINTS = "import sys, time; print('{\"latents\": 1e-6}', flush=True); "


@pytest.mark.parametrize(("then", "said"), [
    ("time.sleep(60)", "it took more than 0.5 s"), ("sys.exit('lost')", "its process ended with 1: lost"),
])  # fmt: skip
def test_a_process_that_hangs_or_dies_is_a_row(then: str, said: str, tmp_path: Path) -> None:
    first, last = answers([sys.executable, "-c", PRINTS + then], tmp_path, 3, 0.5)
    assert first == {"latents": 1e-6}
    assert last == {"reason": said, "refused": False}


def test_rows_are_kept_while_the_code_is_the_same(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "rows.jsonl")
    key = ("SD1", "eager", "none", "inpaint")
    kept.add(key, {"latents": 1e-6, "image": 1e-6})
    assert Kept(kept.path).rows[key]["latents"] == 1e-6
    kept.path.write_text(json.dumps({"key": key, "code": "older", "latents": 1.0}) + "\n")
    assert not Kept(kept.path).rows


def test_nothing_is_left_out_of_the_table() -> None:
    keys = [("SD1", engine, adapter, task) for engine in ENGINES for adapter in ADAPTERS for task in TASKS]
    rows: dict[Any, Any] = {
        keys[0]: {"latents": 2e-6, "image": 3e-6, "effect": 0.5},
        keys[1]: {"latents": 2e-5, "image": 3e-6},
        keys[2]: {"reason": "it is broken", "refused": False},
        keys[3]: {"reason": "it takes none", "refused": True},
    }
    lines = table(rows, keys).splitlines()
    assert lines[2] == "| eager | diffusers | 2 | 2.0e-05 | 3.0e-06 | 1 | 2 |"
    assert sum(line.startswith("| SD1 ") for line in lines) == len(ADAPTERS) * len(TASKS)
    (plain,) = (line for line in lines if line.startswith("| SD1 | text-to-image | none |"))
    assert plain.split(" | ")[3:6] == ["50%", "2e-06 / 3e-06", "not run"]
    assert sum(line.count("not run") for line in lines) == len(keys) - len(rows)
    assert any("**2e-05 / 3e-06**" in line for line in lines)
    assert any("**failed** [1]" in line for line in lines)
    assert lines[-2:] == ["1. it is broken", "2. it takes none"]
