"""Starts that find what engines compiled before: the same pictures, or the artefact is made again."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import FORMATS, exported
from numpy.typing import NDArray
from parity import relative
from test_export_robust import Copying

from anamorph import StableDiffusionPipeline, digests, entries
from anamorph.artifact import NATIVE
from anamorph.backends import onnx_models
from anamorph.backends.buckets import COMPILED, FOUND
from anamorph.backends.compile import FOLDER, keep_code
from anamorph.backends.openvino import OpenVino
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.cli import OK, USAGE, main
from anamorph.engine import Target
from anamorph.entries import Entry, every, keep
from anamorph.errors import ArtifactError, OutputError
from anamorph.exporting import LINKED, cached_export

ENGINES = tuple(FORMATS)
CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "guidance_scale": 5.0, "output_type": "np"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANAMORPH_CACHE", str(tmp_path / "cache"))


def fresh(checkpoint: Path, engine: str) -> Path:
    """The checkpoint's artifact, and nothing of it in the cache."""
    place = exported(checkpoint, engine)
    for entry in list(every()):
        entries.discard(entry.folder, "a test")
    return place


def drawn(folder: Path, **options: Any) -> tuple[NDArray[Any], dict[str, tuple[str, ...]]]:
    """A picture of a pipeline that was just opened, and how its models came about."""
    digests._digest.cache_clear()  # as in a process of its own
    pipe = StableDiffusionPipeline.from_pretrained(folder, **options)
    picture = np.asarray(pipe("a cat", **CALL).images)
    return picture, {part: placed.history for part, placed in pipe.placement.items()}


def came(history: dict[str, tuple[str, ...]]) -> set[str]:
    return {word for lines in history.values() for line in lines for word in (COMPILED, FOUND) if f"{word}," in line}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_second_start_finds_what_the_first_compiled_and_draws_the_same(sd1: Path, engine: str) -> None:
    first, history = drawn(fresh(sd1, engine))
    assert came(history) == {COMPILED}
    second, history = drawn(exported(sd1, engine))
    assert came(history) == {FOUND}
    np.testing.assert_array_equal(second, first)
    eager, _ = drawn(sd1, backend="eager")
    assert relative(second, eager) <= 1e-4


def test_bfloat16_has_entries_of_its_own(sd1: Path) -> None:
    if "bfloat16" not in OpenVino().precisions(Target().device):
        pytest.skip("the processor has no bfloat16")
    exact, _ = drawn(fresh(sd1, "openvino"))
    first, history = drawn(exported(sd1, "openvino"), torch_dtype="bfloat16")
    assert came(history) == {COMPILED}
    second, history = drawn(exported(sd1, "openvino"), torch_dtype="bfloat16")
    assert came(history) == {FOUND}
    np.testing.assert_array_equal(second, first)
    assert relative(first, exact) > 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_linked_weights_serve_both_starts(sd1: Path, engine: str) -> None:
    place = exported(sd1, engine, NATIVE, storage=LINKED)
    for entry in list(every()):
        entries.discard(entry.folder, "a test")
    first, history = drawn(place)
    assert came(history) == {COMPILED}
    second, history = drawn(place)
    assert came(history) == {FOUND}
    np.testing.assert_array_equal(second, first)
    assert relative(second, drawn(sd1, backend="eager")[0]) <= 1e-4
    if engine == "openvino":  # which leaves weights where they are
        weights = sum(path.stat().st_size for path in sd1.rglob("*.safetensors"))
        assert sum(entry.size for entry in every()) < 0.5 * weights


def broken(entry: Entry) -> None:
    """Cut the largest file."""
    name = max(entry.files, key=lambda name: entry.files[name].size)
    (entry.folder / name).write_bytes((entry.folder / name).read_bytes()[:-8])


def refused(entry: Entry) -> None:
    """What an engine does not take, with a record that fits."""
    entries.discard(entry.folder, "a test")
    names = list(entry.files)
    assert keep(entry.key, lambda draft: [(draft / name).write_bytes(b"nonsense") for name in names] and None)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("damage", [broken, refused])
def test_a_damaged_entry_is_said_and_made_again(
    sd1: Path, engine: str, damage: Callable[[Entry], None], caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = drawn(fresh(sd1, engine))
    for entry in list(every()):
        damage(entry)
    caplog.clear()
    again, history = drawn(exported(sd1, engine))
    assert came(history) == {COMPILED}
    assert caplog.text.count("removed from the cache and made again") >= len(history)
    np.testing.assert_array_equal(again, first)
    assert came(drawn(exported(sd1, engine))[1]) == {FOUND}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_disk_costs_the_cache_alone(
    sd1: Path, engine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OutputError("cannot write: no space left on device; free the disk")

    first, _ = drawn(fresh(sd1, engine))
    monkeypatch.setattr(entries, "drafted", full)
    picture, history = drawn(fresh(sd1, engine))
    assert "going on without the cache" in caplog.text
    assert came(history) == {COMPILED}
    assert not list(every())
    np.testing.assert_array_equal(picture, first)


@pytest.mark.parametrize("engine", ENGINES)
def test_other_weights_are_not_taken_from_the_cache(sd1: Path, sd2: Path, engine: str) -> None:
    exported(sd2, engine)
    drawn(fresh(sd1, engine))
    picture, history = drawn(exported(sd2, engine))
    assert came(history) == {COMPILED}
    assert relative(picture, drawn(sd2, backend="eager")[0]) <= 1e-4


def test_a_damaged_export_in_the_cache_is_made_again(sd1: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, exporter = open_checkpoint(Source(str(sd1))), Copying(exported(sd1, "onnxruntime"))
    model = cached_export(source, exporter).folder / "unet" / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert cached_export(source, exporter).folder == model.parent.parent
    assert model.read_bytes() == whole
    assert "is not the file of the export" in caplog.text
    assert "removed from the cache and made again" in caplog.text


# ---- the command line --------------------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = OK) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == code
    return "".join(capsys.readouterr())


def test_cache_commands(sd1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the cache has none of these weights" in printed(
        capsys, "cache", "explain", str(sd1), "--backend", "openvino"
    )
    assert "eager opens the checkpoint itself" in printed(capsys, "cache", "explain", str(sd1), "--backend", "eager")
    model = str(fresh(sd1, "openvino"))
    said = printed(capsys, "cache", "prebuild", model, "--size", "64x64")
    assert "latent height 8, latent width 8, sequence 77: compiled, for this size alone" in said
    told = json.loads(printed(capsys, "cache", "explain", model, "--json"))
    assert {row["part"] for row in told} == {"text_encoder", "unet", "vae_decoder"}
    assert all("compiled: found for" in "".join(row["lines"]) for row in told)

    listed = json.loads(printed(capsys, "cache", "ls", "--json"))["entries"]
    compiled = [one for one in listed if one["name"].startswith("compiled/")]
    assert len(compiled) == 3
    assert all(one["size"] > 0 for one in compiled)
    count, unet = len(listed), next(one["name"] for one in compiled if "unet" in one["name"])
    assert f"removed 1 of {count}, " in printed(capsys, "cache", "rm", unet)
    assert f"the cache holds nothing called {unet}" in printed(capsys, "cache", "rm", unet, code=USAGE)
    assert f"removed 0 of {count - 1}, " in printed(capsys, "cache", "rm", "--unused", "1")
    assert f"removed {count - 1} of {count - 1}, " in printed(capsys, "cache", "rm", "--all")
    assert "nothing is named" in printed(capsys, "cache", "rm", code=USAGE)


def test_explain_names_the_component_that_differs(
    sd1: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(fresh(sd1, "onnxruntime"))
    drawn(Path(place))
    monkeypatch.setattr(onnx_models, "package_version", lambda name: f"{name} 0.1")
    said = printed(capsys, "cache", "explain", place)
    assert "compiled: not found, it will be made; the nearest is" in said
    assert said.count("  engine: onnxruntime 0.1 here, onnxruntime ") == 3
    assert "processor:" not in said


def test_generate_explains_its_sizes(sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "a cat", "--model", str(exported(sd1, "openvino")), "--steps", "1", "--explain"]
    said = printed(capsys, *arguments, "--out", str(tmp_path / "cat.png"))
    assert (
        "unet: batch 2, latent height 8, latent width 8, sequence 77: compiled, for this size alone, the first" in said
    )
    told = json.loads(printed(capsys, *arguments, "--out", str(tmp_path / "cat.png"), "--json"))
    assert "found in the cache" in told["history"]["vae_decoder"][0]


def test_inductors_code_lies_in_the_users_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    keep_code()
    place = Path(os.environ[FOLDER])
    assert place == tmp_path / "cache" / "inductor"
    assert place.stat().st_mode & 0o077 == 0
    place.chmod(0o777)
    monkeypatch.delenv(FOLDER)
    with pytest.raises(ArtifactError, match="not this user's own"):
        keep_code()
    monkeypatch.setenv(FOLDER, str(tmp_path))
    keep_code()
    assert os.environ[FOLDER] == str(tmp_path)


def test_inductor_goes_on_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    (tmp_path / "cache").write_text("no folder")
    keep_code()
    assert FOLDER not in os.environ
    assert "cannot make" in caplog.text
