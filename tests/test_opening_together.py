"""Components that are opened beside one another: the same pipeline, the same errors, whatever ends first."""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import FORMATS, exported

from anamorph import DiffusionPipeline
from anamorph.backends.eager import Eager
from anamorph.components import Component
from anamorph.config import Config
from anamorph.entries import _keeping, nothing_kept
from anamorph.errors import ArtifactError, CheckpointError
from anamorph.pipelines import loading
from anamorph.pipelines.loaded import Loaded
from anamorph.pipelines.loading import Ready, open_all
from anamorph.plugins import get_backend

PATIENCE_S = 60
COMPONENT = Component("unet", "UNet2DConditionModel", Config({}))


@dataclass(frozen=True)
class Fake(Ready):
    """A component that opens by calling a function."""

    work: Callable[[], Any] = lambda: None
    beside: bool = True

    @property
    def concurrent(self) -> bool:
        return self.beside

    def open(self) -> Loaded:
        self.work()
        return Loaded(self.component, {})


def fake(work: Callable[[], Any], beside: bool = True) -> Fake:
    return Fake(COMPONENT, "unet", (), {}, None, work, beside)


@pytest.fixture(autouse=True)
def _three_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available_processors", lambda: 3)


def test_components_open_beside_one_another_and_keep_their_order() -> None:
    meeting, last = threading.Barrier(2, timeout=PATIENCE_S), threading.Event()

    def first() -> None:
        meeting.wait()
        assert last.wait(PATIENCE_S)

    def second() -> None:
        meeting.wait()
        last.set()

    assert list(open_all({"a": fake(first), "b": fake(second)})) == ["a", "b"]


def test_the_first_in_order_that_fails_is_the_one_that_is_told() -> None:
    failed = threading.Event()

    def slow() -> None:
        assert failed.wait(PATIENCE_S)
        raise ArtifactError("the first")

    def quick() -> None:
        failed.set()
        raise CheckpointError("the second")

    with pytest.raises(ArtifactError, match="the first"):
        open_all({"good": fake(lambda: None), "a": fake(slow), "b": fake(quick)})
    with pytest.raises(CheckpointError, match="the second"):
        open_all({"b": fake(quick), "a": fake(slow)})


def test_others_wait_in_line_in_the_thread_that_asks() -> None:
    seen: list[tuple[str, bool]] = []

    def note(name: str) -> Callable[[], None]:
        return lambda: seen.append((name, threading.current_thread() is threading.main_thread()))

    open_all({name: fake(note(name), beside=False) for name in "abc"})
    assert seen == [("a", True), ("b", True), ("c", True)]
    open_all({"d": fake(note("d"))})
    assert seen[-1] == ("d", False)


def test_what_holds_for_a_caller_holds_in_its_threads() -> None:
    kept: list[bool] = []
    with nothing_kept():
        open_all({"a": fake(lambda: kept.append(_keeping.get()))})
    open_all({"a": fake(lambda: kept.append(_keeping.get()))})
    assert kept == [False, True]


@pytest.mark.parametrize("engine", ["eager", *FORMATS])
def test_pipelines_open_their_components_so(sd1: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, call = exported(sd1, engine), {"prompt": "a cat", "num_inference_steps": 2, "seed": 1, "output_type": "np"}
    meeting, plain = threading.Barrier(3, timeout=PATIENCE_S), loading.open_parts

    def together(*arguments: Any) -> Any:
        meeting.wait()
        return plain(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "open_parts", together)
        pipe: Any = DiffusionPipeline.from_pretrained(place, backend=engine)
    assert not meeting.broken
    monkeypatch.setattr(type(get_backend(engine)), "concurrent", False)
    one_by_one: Any = DiffusionPipeline.from_pretrained(place, backend=engine)
    assert list(pipe.placement) == list(one_by_one.placement)
    assert np.array_equal(pipe(**call).images, one_by_one(**call).images)


def test_engines_that_promise_nothing_are_asked_by_one_thread(sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, threads = loading.open_parts, list[threading.Thread]()

    def noting(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return plain(*arguments)

    monkeypatch.setattr(loading, "open_parts", noting)
    DiffusionPipeline.from_pretrained(sd1, backend="null")
    assert set(threads) == {threading.main_thread()}
    DiffusionPipeline.from_pretrained(sd1, backend="eager")
    assert threading.main_thread() not in threads[3:]
    assert Eager.concurrent


def test_a_damaged_component_is_named_whatever_opens_beside_it(sd1: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd1, tmp_path / "model"))
    for name in ("unet", "text_encoder"):
        (weights,) = (folder / name).glob("*.safetensors")
        weights.write_bytes(b"nonsense")
    for _ in range(3):
        with pytest.raises(CheckpointError, match="text_encoder"):
            DiffusionPipeline.from_pretrained(folder, backend="eager")
