"""What `anamorph bench best` keeps, and when `backend="auto"` takes it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from exported import exported

from anamorph import DiffusionPipeline, profiles
from anamorph.benchmarks import best, tune
from anamorph.benchmarks.records import Measured, Result
from anamorph.benchmarks.scenarios import Cell
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.errors import BackendError
from anamorph.profiles import Profile

FAST = Profile("null", "float32", 0.5, "2026-01-01T00:00:00Z")


@pytest.fixture(name="model")
def _model(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of this test alone, and a cache."""
    monkeypatch.setenv("ANAMORPH_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(sd1, tmp_path / "model"))


def engines(model: Path, **options: str) -> set[str]:
    pipe = DiffusionPipeline.from_pretrained(model, **options)
    return {placed.engine for placed in pipe.placement.values()}


def test_auto_takes_what_was_fastest_and_says_so(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert engines(model) == {"eager"}
    profiles.store(open_checkpoint(Source(str(model))), FAST)
    with caplog.at_level("INFO"):
        assert engines(model) == {"null"}
    assert "null was the fastest in float32 when `anamorph bench best` measured" in caplog.text
    assert engines(model, torch_dtype="bfloat16") == {"eager"}  # measured in another precision
    assert engines(model, device="cpu") == {"eager"}  # the caller has spoken of a device
    assert engines(model, backend="eager") == {"eager"}


def test_a_profile_belongs_to_its_model_and_engines(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_checkpoint(Source(str(model)))
    profiles.store(opened, FAST)
    assert profiles.stored(opened, "float32") == FAST
    monkeypatch.setattr(profiles, "package_version", lambda name: f"{name} another")
    assert profiles.stored(opened, "float32") is None
    monkeypatch.undo()
    config = model / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 99}))
    assert profiles.stored(opened, "float32") is None


def test_a_damaged_profile_is_named_and_not_used(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = profiles.store(open_checkpoint(Source(str(model))), FAST)
    place.write_text("{}")
    assert engines(model) == {"eager"}
    assert f"{place} cannot be read" in caplog.text


def test_best_keeps_the_fastest_that_counts(model: Path) -> None:
    def cell(engine: str, seconds: float, passed: bool = True) -> Measured:
        parity = {"passed": passed, "note": "too far", "stages": {}}
        burst = {"void": None, "samples": [{"total": seconds, "sentinel": [1.0, 1.0]}] * 3, "cache": "cold",
                 "first": {"total": seconds}, "phases": {"import_s": 1.0, "export_s": 0.0, "load_s": 1.0},
                 "memory": {}, "placement": []}  # fmt: skip
        return Measured(Cell(engine=engine), bursts=[burst], parity=parity)

    cells = {"a": cell("eager", 2.0), "b": cell("null", 0.5), "c": cell("gaussian", 0.1, passed=False)}
    run = {"time": "2026-01-01T00:00:00Z"}
    text = best.answer(Result(run, cells), open_checkpoint(Source(str(model))))
    assert text.startswith("null float32: 500 ms a picture, 4.00 times as fast as eager float32; backend=auto takes it")
    assert engines(model) == {"null"}
    with pytest.raises(BackendError, match="no parity: too far"):
        best.answer(Result(run, {"c": cells["c"]}), open_checkpoint(Source(str(model))))


def tuned_cells() -> dict[str, Measured]:
    def cell(seconds: float, psnr_db: float | None, **wishes: str) -> Measured:
        parity = {"passed": True, "note": "", "stages": {}, "psnr_db": psnr_db}
        burst = {"void": None, "samples": [{"total": seconds, "sentinel": [1.0, 1.0]}] * 3, "cache": "cold",
                 "first": {"total": seconds}, "phases": {"import_s": 1.0, "export_s": 0.0, "load_s": 1.0},
                 "memory": {}, "placement": []}  # fmt: skip
        return Measured(Cell(**{"engine": "null", **wishes}), bursts=[burst], parity=parity)

    return {
        "a": cell(2.0, None),
        "b": cell(1.0, 45.0, engine="eager", precision="bfloat16"),
        "c": cell(0.5, 26.0, rewrites="token-merging"),
        "d": cell(0.1, 21.0, engine="eager"),
    }


@pytest.mark.parametrize(
    ("quality", "found"),
    [
        ("lossless", ("null", "float32", "")),
        ("high", ("eager", "bfloat16", "")),
        ("fast", ("null", "float32", "token-merging")),
    ],
)
def test_tuning_keeps_the_fastest_within_the_quality(model: Path, quality: str, found: tuple[str, str, str]) -> None:
    opened = open_checkpoint(Source(str(model)))
    text = tune.answer(Result({"time": "now"}, tuned_cells()), quality, opened, lambda _: None)
    profile = profiles.applying(opened, None)
    assert profile is not None
    assert (profile.engine, profile.precision, profile.rewrites) == found
    assert profile.quality == quality
    assert "eager float32: 100 ms, but 21.0 dB where" in text
    assert text.splitlines()[-1].startswith(" ".join(found[:2]))
    assert profiles.applying(opened, "float32") is None  # who names a precision has not asked for a quality
    if quality != "fast":  # the null engine takes no rewrites
        pipe = DiffusionPipeline.from_pretrained(model)
        assert {(placed.engine, placed.precision) for placed in pipe.placement.values()} == {found[:2]}


def test_nothing_near_enough_is_an_error(model: Path) -> None:
    cells = {name: cell for name, cell in tuned_cells().items() if name in "cd"}
    with pytest.raises(
        BackendError, match=r"within 60 dB \(null float32 token-merging: 26.0 dB; eager float32: 21.0 dB"
    ):
        tune.answer(Result({"time": "now"}, cells), "lossless", open_checkpoint(Source(str(model))), lambda _: None)


def test_what_is_tried_depends_on_the_quality() -> None:
    here = {"eager": ["float32", "bfloat16"], "onnxruntime": ["float32"], "openvino": ["float32", "bfloat16"]}
    arms = {
        name: [cell.arm for cell in tune.candidates("bundled", tune.QUALITIES[name], here)] for name in tune.QUALITIES
    }
    assert arms["lossless"] == ["eager float32", "onnxruntime float32", "openvino float32"]
    assert arms["high"] == arms["fast"] == [f"{engine} {one}" for engine, every in here.items() for one in every]


@pytest.mark.parametrize(("engine", "whole"), [("eager", False), ("onnxruntime", True), ("openvino", True)])
def test_approximations_are_tried_by_the_fastest_engine(engine: str, whole: bool) -> None:
    cells = tune.approximations(Cell(engine=engine, precision="float32"))
    cached = [cell for cell in cells if cell.caching]
    assert {cell.caching for cell in cached} == {2, 3, 5}
    assert all("step-caching" in cell.rewrites for cell in cached)
    assert {cell.engine for cell in cells} == {engine}
    assert ("int8" in {cell.quantize for cell in cells}) == whole
    assert all(cell.near for cell in cells)


def test_an_export_that_was_tuned_is_opened(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened = open_checkpoint(Source(str(model)))
    folder = exported(model, "openvino")
    profiles.store(opened, Profile("openvino", "float32", 0.1, "now", "fast", "", str(folder)))
    with caplog.at_level("INFO"):
        assert engines(model) == {"openvino"}
    assert "exporting" not in caplog.text
    profiles.store(opened, Profile("openvino", "float32", 0.1, "now", "fast", "", str(folder / "gone")))
    assert engines(model) == {"eager"}
    assert "was removed, so that what was tuned is not used" in caplog.text


def test_calls_cache_steps_as_was_tuned(model: Path) -> None:
    opened = open_checkpoint(Source(str(model)))
    profiles.store(opened, Profile("eager", "float32", 0.1, "now", "fast", "default,step-caching", "", 2))
    pipe: Any = DiffusionPipeline.from_pretrained(model)
    assert pipe.job("a cat", seed=0).request.step_caching == 2
    assert pipe.job("a cat", seed=0, step_caching=1).request.step_caching == 1
    assert pipe.rewrites == "default,step-caching"
    assert pipe("a cat", num_inference_steps=2, seed=0, output_type="latent").images.shape[0] == 1
    named: Any = DiffusionPipeline.from_pretrained(model, backend="eager")
    assert named.job("a cat", seed=0).request.step_caching is None
