"""Exports and exported folders when things go wrong: killed processes, full disks, strange files, missing engines."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exported import FORMATS, export, exported, trace_once
from scarce import full, sealable

from anamorph import StableDiffusionPipeline
from anamorph.cache import cache_folder
from anamorph.checkpoint import Checkpoint, Source, open_checkpoint
from anamorph.cli import main
from anamorph.errors import BackendUnavailable, InputError, OutputError
from anamorph.exporters.openvino import write
from anamorph.exporters.references import load
from anamorph.exporters.settling import read_components
from anamorph.exporters.storing import Storing
from anamorph.exporting import cached_export

ENGINES = tuple(FORMATS)


def test_killed_exports_leave_a_verified_artifact_or_none(smallest: Path, tmp_path: Path) -> None:
    """20 moments over the duration of an export: mid-write, while the picture is drawn, while all is compared."""
    place = tmp_path / "place"
    place.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("killed_exports.py")), str(smallest), str(place), "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *trials, peace, two = (json.loads(line) for line in done.stdout.splitlines())
    assert len(trials) == 20
    for row in trials:
        assert row["complete"] == row["verified"], row
        assert row["killed"] or row["complete"], row
        assert row["drafts"] <= 1, "an older draft was not removed"
        assert row["loading"] == row["strange"] == [], row
    files = {row["files"] for row in trials if row["killed"]}
    assert len(files) >= 4, f"the moments were not spread over the export: {files}"
    assert peace["left"] == ["out"]
    assert two == {"codes": [0, 0], "written": ["once"], "exports": 1}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(("engine", "share"), [("onnxruntime", 0.1), ("onnxruntime", 0.6), ("openvino", 0.1)])
def test_a_full_disk_is_one_sentence(
    sd2: Path, place: Path, engine: str, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    largest = max(path.stat().st_size for path in exported(sd2, engine).rglob("*.*"))
    arguments = ["export", str(sd2), str(place / "out"), "--to", FORMATS[engine]]
    with full(place, int(share * largest)):
        assert main(arguments) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert "cannot write" in said
        assert "free the disk" in said
        assert list(place.iterdir()) == []


def test_openvino_s_own_failure_to_write_is_one_sentence(sd2: Path, place: Path) -> None:
    """OpenVINO writes its files itself; here the graph that it reads still fits onto the disk."""
    component = read_components(open_checkpoint(Source(str(sd2))))[0]
    interface = component.interface("vae_decoder")
    model = load(component)
    program = trace_once(model, model.PARTS["vae_decoder"], interface)
    size = (exported(sd2, "onnxruntime") / "vae_decoder" / "model.onnx_data").stat().st_size
    with full(place, int(0.7 * size)), pytest.raises(OutputError, match="OpenVINO cannot write") as caught:
        write(program, interface, place / "vae_decoder", Storing())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_or_read_only_cache_is_one_sentence(
    sd2: Path, place: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANAMORPH_CACHE", str(place))
    with full(place, 100_000):
        with pytest.raises(OutputError, match="ANAMORPH_CACHE names another cache") as caught:
            StableDiffusionPipeline.from_pretrained(sd2, backend=engine)
        assert "\n" not in str(caught.value)
        assert [path.name for path in place.rglob("*")] == ["exports"]
    with sealable(place) as seal:
        seal()
        with pytest.raises(OutputError, match="ANAMORPH_CACHE names another cache"):
            StableDiffusionPipeline.from_pretrained(sd2, backend=engine)
        assert list(place.iterdir()) == []


def test_a_read_only_cache_still_gives_what_it_holds(
    sd2: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANAMORPH_CACHE", str(place))
    source = open_checkpoint(Source(str(sd2)))
    with sealable(place) as seal:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Copying, "made", 0)
            cached_export(source, Copying(exported(sd2, "onnxruntime")))
            seal()
            cached_export(source, Copying(exported(sd2, "onnxruntime")))
            assert Copying.made == 1
        target = str(place / "out")
        assert main(["export", str(sd2), target, "--to", "onnx"]) == 1
        assert "cannot write" in capsys.readouterr().err


class Copying:
    """An exporter that copies a finished export."""

    format = "onnx"
    storages = ("linked",)
    made = 0

    def __init__(self, finished: Path, *, late: bool = False) -> None:
        self.finished, self.late = finished, late

    def unavailable(self) -> None:
        return None

    def fingerprint(self) -> dict[str, str]:
        return {}

    def export(self, _checkpoint: Checkpoint, folder: Path, *_: Any) -> list[Any]:
        type(self).made += 1
        shutil.copytree(self.finished, folder)
        if self.late:
            raise InputError(f"{folder} exists already")
        return []

    def verify(self, *_: Any) -> list[Any]:
        return []


def test_an_export_that_another_process_has_just_finished_is_taken(
    sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANAMORPH_CACHE", str(tmp_path))
    opened = cached_export(open_checkpoint(Source(str(sd2))), Copying(exported(sd2, "onnxruntime"), late=True))
    assert opened.artifact is not None
    assert opened.folder.parent == cache_folder() / "exports"


@pytest.mark.parametrize(
    ("further", "code", "message"),
    [
        (["--size", "32x24"], 2, "latent_height is 16, expected 8"),
        (["--size", "16x24", "--count", "2"], 2, "batch is 4, expected 2"),
        (["--size", "16x24", "--dtype", "bf16"], 1, "does not run in bfloat16"),
        (["--size", "16x24", "--device", "cuda"], 1, "no device 'cuda'"),
        (["--size", "16x24", "--backend", "openvino"], 1, "engine openvino opens openvino"),
    ],
)
def test_what_an_artifact_does_not_take_is_refused(
    fixed: Path, tmp_path: Path, further: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cat.png"
    arguments = ["generate", "a cat", "--steps", "1", "--seed", "0", "--model", str(fixed), "--out", str(out)]
    assert main([*arguments, *further]) == code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said
    assert not out.exists()
    if further[0] == "--size" and len(further) == 2:
        assert main([*arguments, "--size", "16x24"]) == 0
        assert out.exists()


@pytest.fixture(params=ENGINES)
def absent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An engine whose package cannot be imported."""
    monkeypatch.setitem(sys.modules, request.param, None)
    name: str = request.param
    return name


def test_a_missing_engine_is_named_with_its_remedy(
    sd2: Path, tmp_path: Path, absent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, remedy = exported(sd2, absent), f"pip install 'anamorph[{FORMATS[absent]}]'"
    with pytest.raises(BackendUnavailable, match="not installed"):
        StableDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(BackendUnavailable, match="not installed"):
        StableDiffusionPipeline.from_pretrained(sd2, backend=absent)
    for further in ([], ["--backend", absent]):
        arguments = ["generate", "a cat", "--model", str(folder), "--out", str(tmp_path / "cat.png"), *further]
        assert main(arguments) == 1
        said = capsys.readouterr().err.strip()
        assert remedy in said
        assert "\n" not in said
    assert main(["doctor"]) == 0
    assert remedy in capsys.readouterr().out


def test_an_engine_that_is_installed_but_broken_is_one_sentence(
    sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libonnxruntime.so is damaged')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = str(exported(sd2, "onnxruntime"))
    assert main(["generate", "a cat", "--model", folder, "--out", str(tmp_path / "cat.png")]) == 1
    said = capsys.readouterr().err.strip()
    assert "libonnxruntime.so is damaged" in said
    assert "pip install --force-reinstall 'anamorph[onnx]'" in said
    assert "\n" not in said


def test_an_export_for_an_engine_that_is_missing_stays_unverified(
    sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export(sd2, "onnxruntime", tmp_path / "out") == []
    monkeypatch.undo()
    artifact = open_checkpoint(Source(str(tmp_path / "out"))).artifact
    assert artifact is not None
    statuses = {part.status for part in artifact.parts.values()} | {artifact.image["status"]}
    assert len(statuses) == 1
    assert "ONNX Runtime is not installed" in statuses.pop()
