"""What the matrix says before anything is loaded, compared with what then happens."""

import importlib.metadata
import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import FORMATS, exported

from anamorph import DiffusionPipeline, capabilities
from anamorph.capabilities import Cell, conflicts, gigabytes
from anamorph.checkpoint import BUNDLED
from anamorph.cli import OK, main
from anamorph.engine import PRECISIONS
from anamorph.errors import BackendError
from anamorph.plugins import list_backends

CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "output_type": "np", "prompt": "a cat"}
Capture = pytest.CaptureFixture[str]


def cells(capsys: Capture, *command: str) -> list[Cell]:
    assert main([*command, "--json"]) == OK
    return [Cell(**row) for row in json.loads(capsys.readouterr().out)["cells"]]


def drawn(folder: Path, cell: Cell) -> Any:
    kind = {"text to image": "StableDiffusionPipeline", "image to image": "StableDiffusionImg2ImgPipeline",
            "inpainting": "StableDiffusionInpaintPipeline"}[cell.task]  # fmt: skip
    pipe = DiffusionPipeline.registry[kind].from_pretrained(
        folder, backend=cell.engine, device=cell.device, torch_dtype=cell.precision
    )
    image, mask = np.zeros((1, 16, 16, 3), np.float32), np.ones((1, 16, 16), np.float32)
    given = {"image": {"image": image}, "mask_image": {"mask_image": mask}}
    sources = {name: value for need in pipe.needs for name, value in given[need].items()}
    return pipe(**CALL, height=16, width=16, **sources) if not sources else pipe(**CALL, **sources)


@pytest.mark.parametrize("form", ["checkpoint", *FORMATS])
def test_what_works_draws_and_what_does_not_is_refused(sd2: Path, capsys: Capture, form: str) -> None:
    folder = sd2 if form == "checkpoint" else exported(sd2, form)
    found = cells(capsys, "doctor", str(folder))
    assert {cell.task for cell in found} == {"text to image", "image to image", "inpainting"}
    assert {cell.engine for cell in found} == {name for name, one in list_backends().items() if not one.double}
    tried = 0
    for cell in found:
        slow = cell.engine == "compile" or (form == "checkpoint" and cell.engine not in ("eager", "compile"))
        if cell.reason is None and not slow:
            assert np.isfinite(drawn(folder, cell).images).all(), cell
            tried += 1
        elif cell.reason is not None and cell.task == "text to image":
            with pytest.raises(BackendError):
                drawn(folder, cell)
    assert tried >= 3
    known = {(cell.engine, cell.device, cell.precision) for cell in found}
    for name, backend in list_backends().items():
        for precision in PRECISIONS if not backend.double else ():
            if (name, "cpu", precision) not in known:  # what is not in the matrix does not work either
                with pytest.raises(BackendError):
                    drawn(folder, Cell("text to image", name, "cpu", precision, "", None))


def test_sizes_follow_from_the_model_and_from_the_export(sd1: Path, fixed: Path, capsys: Capture) -> None:
    of = {(cell.engine, cell.precision): cell.sizes for cell in cells(capsys, "doctor", str(sd1))}
    assert of["eager", "float32"] == "multiples of 8 px"
    assert of["compile", "float32"] == "multiples of 8 px, each compiled at its first call"
    assert of["onnxruntime", "float32"] == "multiples of 32 px"  # three levels below eight pixels for each latent
    of = {(cell.engine, cell.precision): cell.sizes for cell in cells(capsys, "doctor", str(fixed))}
    assert of["onnxruntime", "float32"] == "16 px alone high, 24 px alone wide, 2 in a batch alone"


def test_without_a_model_all_tasks_are_listed(capsys: Capture) -> None:
    found = cells(capsys, "backends", "--matrix")
    assert {"text to image", "depth", "class", "upscale"} <= {cell.task for cell in found}
    assert any(cell.device == "cuda" for cell in found)
    assert main(["backends", "--matrix"]) == OK
    said = capsys.readouterr().out
    assert "eager" in said
    assert "float32" in said


def test_nothing_is_loaded_to_say_so(sd2: Path) -> None:
    code = (
        "import sys; from anamorph.cli import main; main(['doctor', sys.argv[1], '--json']);"
        "heavy = {'transformers', 'diffusers', 'anamorph.models'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(sd2)], check=True, capture_output=True)


def test_a_single_file_and_what_is_missing(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, sd2: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "onnxruntime" else object())
    reasons = {cell.engine: cell.reason for cell in cells(capsys, "doctor", str(sd2))}
    assert reasons["onnxruntime"] == "ONNX Runtime is not installed; run: pip install 'anamorph[onnx]'"
    assert main(["doctor", str(tmp_path / "nowhere")]) != OK
    assert "Traceback" not in capsys.readouterr().err


ORT = ("onnxruntime", "cpu")


def test_what_does_not_fit_is_said(sd2: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "free_memory", lambda: 10**5)
    reasons = {cell.reason for cell in cells(capsys, "doctor", str(sd2)) if cell.device == "cpu"}
    assert all("of memory, and 0 MB are free" in str(reason) for reason in reasons)
    monkeypatch.setattr(capabilities, "free_memory", lambda: None)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(capabilities.shutil, "disk_usage", lambda _: usage(10**4))
    reasons = {cell.reason for cell in cells(capsys, "doctor", str(sd2)) if (cell.engine, cell.device) == ORT}
    assert all("are free" in str(reason) for reason in reasons)
    assert (gigabytes(34 * 10**8), gigabytes(34 * 10**6)) == ("3.4 GB", "34 MB")


MEASURE = """
import sys
from pathlib import Path
from anamorph import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], backend="eager", torch_dtype="float32")
pipe("red apple", num_inference_steps=2, seed=0)
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process its peak of memory")
def test_the_predicted_memory_is_what_a_larger_model_takes_more(sd2: Path, capsys: Capture) -> None:
    """What the engine's own code takes cancels out between two models."""
    measured, predicted = [], []
    for folder in (BUNDLED, sd2):
        (one,) = {
            cell.memory
            for cell in cells(capsys, "doctor", str(folder))
            if (cell.engine, cell.precision, cell.device) == ("eager", "float32", "cpu")
        }
        assert one is not None
        predicted.append(one)
        command = [sys.executable, "-c", MEASURE, str(folder)]
        measured.append(
            int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        )
    more, expected = measured[0] - measured[1], predicted[0] - predicted[1]
    assert expected > 5e7
    assert 0.5 <= more / expected <= 2


def test_versions_that_plug_ins_cannot_use_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert conflicts() == []
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.3.1" if name == "torch" else real(name))
    assert conflicts() == ["torch 2.3.1 is installed, anamorph needs torch>=2.10; run: pip install 'torch>=2.10'"]
