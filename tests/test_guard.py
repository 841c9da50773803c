"""Plug-ins that break, lie or return nonsense: each is named, and the others go on."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from strangers import Named, install, plugin

from anamorph import StableDiffusionPipeline, plugins
from anamorph.arrays import Array, NumpyArrays
from anamorph.backends.eager import Eager
from anamorph.backends.null import NullProgram
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.cli import FAILED, OK, main
from anamorph.components import Component
from anamorph.engine import Program, Session, Target
from anamorph.errors import BackendError, BackendUnavailable, InputError, NumericalError
from anamorph.guard import missing, open_parts, places_here
from anamorph.pipelines.describing import read_component

Change = Callable[[dict[str, Array]], dict[str, Array]]


@pytest.fixture
def decoder(sd2: Path) -> Component:
    return read_component(open_checkpoint(Source(str(sd2))), "vae", ("AutoencoderKL",))


@pytest.mark.parametrize("failure", [ValueError("no"), SystemExit(3), KeyError("x")])
def test_one_that_raises_while_it_is_asked_is_left_out(monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    def fail() -> Any:
        raise failure

    broken = plugin()
    broken.anamorph_backends = plugins.hookimpl(fail)  # type: ignore[attr-defined]
    install(monkeypatch, broken=broken, good=plugin(Named("abacus")))
    with pytest.warns(UserWarning, match="plug-in broken could not be loaded"):
        found = plugins.discover()
    assert set(found.backends) == {"abacus"}
    assert type(failure).__name__ in found.failures["broken"]


def declaring(**members: Any) -> Any:
    engine: Any = Named("liar")
    for name, value in members.items():
        setattr(engine, name, value)
    return engine


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (
            SimpleNamespace(name="liar"),
            "engine liar lacks formats, rank, double, places, sizes, costs, options, unavailable",
        ),
        (declaring(name=""), "name = ''"),
        (declaring(name="auto"), "name = 'auto'"),
        (declaring(formats="checkpoint"), "formats = 'checkpoint'"),
        (declaring(rank="high"), "rank = 'high'"),
        (declaring(places={"cpu": ("float31",)}), "places = "),
        (declaring(places={"cpu": ()}), "places = "),
        (declaring(sizes="all"), "sizes = 'all'"),
    ],
)
def test_what_is_no_engine_is_left_out(monkeypatch: pytest.MonkeyPatch, engine: Any, said: str) -> None:
    install(monkeypatch, lying=plugin(engine), good=plugin(Named("abacus")))
    with pytest.warns(UserWarning, match="plug-in lying could not be loaded"):
        found = plugins.discover()
    assert set(found.backends) == {"abacus"}
    assert said in found.failures["lying"]


@pytest.mark.parametrize(
    ("exporter", "said"),
    [
        (SimpleNamespace(format="scroll"), "exporter scroll lacks storages, unavailable, fingerprint, export, verify"),
        (
            SimpleNamespace(
                format="scroll", storages=("papyrus",), unavailable=int, fingerprint=int, export=int, verify=int
            ),
            "papyrus",
        ),
    ],
)
def test_what_is_no_exporter_is_left_out(monkeypatch: pytest.MonkeyPatch, exporter: Any, said: str) -> None:
    install(monkeypatch, lying=plugin(exporters=(exporter,)), good=plugin(Named("abacus")))
    with pytest.warns(UserWarning, match="plug-in lying could not be loaded"):
        found = plugins.discover()
    assert (set(found.backends), found.exporters) == ({"abacus"}, {})
    assert said in found.failures["lying"]


class Silent(Named):
    """Raises where it is asked whether it can run."""

    def unavailable(self) -> str | None:
        raise OSError("the driver is upside down")


def test_one_that_cannot_say_whether_it_runs_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, silent=plugin(Silent("silent", 99)), good=plugin(Named("abacus", 1)))
    monkeypatch.setattr(plugins, "installed", plugins.discover)
    backend, _ = plugins.choose_backend("checkpoint")
    assert backend.name == "abacus"
    with pytest.raises(BackendUnavailable, match=r"silent .*OSError: the driver is upside down"):
        plugins.get_backend("silent")
    assert missing(declaring(unavailable=lambda: False)) == (
        "its plug-in answers False instead of a sentence; update or remove it"
    )


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (declaring(devices=lambda: ("cuda",)), "names float32 on cuda, but declares no such device"),
        (declaring(precisions=lambda _: ("float16",)), "names float16 on cpu, but declares float32"),
        (declaring(devices=lambda: ()), "has no device"),
        (declaring(devices=lambda: 1 / 0), "engine liar fails to name its devices: ZeroDivisionError"),
    ],
)
def test_devices_that_were_not_declared_are_refused(engine: Any, said: str) -> None:
    with pytest.raises(BackendError, match=said):
        places_here(engine)


def test_the_commands_go_on_beside_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lying = declaring(devices=lambda: ("cuda",))
    install(monkeypatch, broken=None, lying=plugin(lying), silent=plugin(Silent("silent")), good=plugin(Eager()))
    plugins.installed.cache_clear()
    try:
        for command in ("backends", "doctor"):
            assert main([command, "--json"]) == OK
            plugins.installed.cache_clear()
            said = json.loads(capsys.readouterr().out)
            rows = {row["name"]: row for row in said.get("backends", said.get("engines"))}
            assert rows["eager"]["available"]
            assert "stranger_broken" in next(iter((said.get("failures") or said["failed_plugins"]).values()))
            if command == "backends":
                assert "declares no such device" in rows["liar"]["missing"]
                assert "upside down" in rows["silent"]["missing"]
    finally:
        plugins.installed.cache_clear()


@dataclass(frozen=True)
class Lying:
    """The null program, whose results pass through `change`."""

    program: NullProgram
    change: Change

    interface = property(lambda self: self.program.interface)
    placement = property(lambda self: self.program.placement)
    arrays = property(lambda self: self.program.arrays)

    def session(self) -> Session:
        return lambda inputs: self.change(self.program(inputs))

    def spare(self, _: Any) -> str | None:
        return None

    def shown(self, loaded: Any) -> Any:
        return loaded


class Wrong(Named):
    """An engine whose results pass through `change`."""

    def __init__(self, change: Change) -> None:
        super().__init__("wrong", 99)
        self.change = change

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        return {part: Lying(one, self.change) for part, one in super().open(component, parts, target).items()}  # type: ignore[arg-type, misc]


def each(change: Callable[[Any], Any]) -> Change:
    return lambda outputs: {name: change(value) for name, value in outputs.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (each(lambda value: value[:, :1]), "returned sample from vae_decoder as float32 of shape"),
        (each(lambda value: value.astype(np.float64)), "as float64 of shape"),
        (lambda _: {}, "returned no sample from vae_decoder"),
        (lambda _: [][0], "engine wrong failed in vae_decoder: IndexError"),
    ],
)
def test_results_that_were_not_declared_are_refused_by_name(decoder: Component, change: Change, said: str) -> None:
    program = open_parts(Wrong(change), decoder, ["vae_decoder"], Target())["vae_decoder"]
    with pytest.raises(BackendError, match=said) as caught:
        program.session()({"latent_sample": np.zeros((1, 4, 5, 6), np.float32)})
    assert "engine wrong" in str(caught.value)


def test_nan_is_refused_by_name(sd2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, wrong=plugin(Wrong(each(lambda value: value * np.nan))), good=plugin(Eager()))
    monkeypatch.setattr(plugins, "installed", plugins.discover)
    call: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "seed": 0, "output_type": "np"}
    for part in ("text_encoder", "unet", "vae"):
        pipe = StableDiffusionPipeline.from_pretrained(sd2, backend={part: "wrong", "default": "eager"})
        with pytest.raises(NumericalError, match=rf"{part}\w* returned NaN or infinity .* on engine wrong"):
            pipe("a cat", **call)
    healthy = StableDiffusionPipeline.from_pretrained(sd2, backend="eager")("a cat", **call)
    assert np.isfinite(healthy.images).all()


def test_a_placement_that_was_not_asked_for_is_refused(decoder: Component) -> None:
    class Elsewhere(Named):
        def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
            opened: Mapping[str, Any] = super().open(component, parts, target)
            return {
                part: replace(one, placement=replace(one.placement, precision="bfloat16"))
                for part, one in opened.items()
            }

    with pytest.raises(BackendError, match=r"asked for float32 on cpu and opened .* in bfloat16"):
        open_parts(Elsewhere("abacus"), decoder, ["vae_decoder"], Target())


def test_parts_that_do_not_come_and_failures_to_open_are_typed(decoder: Component) -> None:
    with pytest.raises(BackendError, match="asked for vae_decoder and opened only"):
        open_parts(declaring(open=lambda *_: {}), decoder, ["vae_decoder"], Target())
    with pytest.raises(BackendError, match="engine liar fails to open vae_decoder: ZeroDivisionError"):
        open_parts(declaring(open=lambda *_: 1 / 0), decoder, ["vae_decoder"], Target())
    with pytest.raises(BackendError, match="engine abacus has no device 'tpu' on this machine; it has cpu"):
        open_parts(Named("abacus"), decoder, ["vae_decoder"], Target("tpu"))
    with pytest.raises(BackendError, match="engine abacus does not run in bfloat16 on cpu; it serves float32"):
        open_parts(Named("abacus"), decoder, ["vae_decoder"], Target("cpu", "bfloat16"))


def test_a_wrong_call_never_reaches_the_engine(decoder: Component) -> None:
    reached: list[Any] = []
    program = open_parts(Wrong(lambda outputs: reached.append(outputs) or outputs), decoder, ["vae_decoder"], Target())  # type: ignore[func-returns-value]
    with pytest.raises(InputError, match="expected 4"):
        program["vae_decoder"].session()({"latent_sample": np.zeros((1, 3, 5, 6), np.float32)})
    assert not reached
    assert isinstance(program["vae_decoder"].arrays, NumpyArrays)


def test_on_the_command_line_it_is_one_sentence(
    sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, wrong=plugin(Wrong(lambda _: {})), good=plugin(Eager()))
    monkeypatch.setattr(plugins, "installed", plugins.discover)
    monkeypatch.setattr(sys, "argv", ["anamorph"])
    options = ["--backend", "wrong", "--size", "16x16", "--steps", "1", "--out", str(tmp_path / "x.png")]
    assert main(["generate", "a cat", "--model", str(sd2), *options]) == FAILED
    said = capsys.readouterr().err
    assert "engine wrong returned no" in said
    assert "Traceback" not in said
