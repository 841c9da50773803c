"""Finding engines: entry points, choice, failures, and the contract that every engine keeps."""

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from strangers import Named, install, plugin

from anamorph import plugins
from anamorph.backends.eager import Eager
from anamorph.components import Component
from anamorph.engine import Backend, Program, Target
from anamorph.errors import BackendError, BackendUnavailable, InputError
from anamorph.guard import open_parts


def test_built_in_engines_come_from_entry_points() -> None:
    names = importlib.metadata.entry_points(group=plugins.GROUP).names
    assert {"eager", "compile", "null", "gaussian"} <= names
    found = plugins.discover()
    assert names == {*found.backends, *(f"{name}-exporter" for name in found.exporters)}
    assert {"onnx", "openvino", "torchscript", "aotinductor"} <= set(found.exporters)


def test_a_strangers_engine_comes_in_through_the_same_door(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, one=plugin(Named("abacus"), Named("slide-rule")))
    assert set(plugins.discover().backends) == {"abacus", "slide-rule"}


def test_a_broken_plugin_is_named_and_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, broken=None, good=plugin(Named("abacus")))
    with pytest.warns(UserWarning, match="plug-in broken could not be loaded"):
        found = plugins.discover()
    assert set(found.backends) == {"abacus"}
    assert "stranger_broken" in found.failures["broken"]


def test_two_engines_of_one_name_are_a_failure_of_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Named("abacus")
    install(monkeypatch, a=plugin(first), b=plugin(Named("abacus")))
    with pytest.warns(UserWarning, match="already there"):
        found = plugins.discover()
    assert found.backends["abacus"] is first


def test_discovery_can_be_narrowed_and_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, a=plugin(Named("abacus")), b=plugin(Named("beads")))
    assert set(plugins.discover("b").backends) == {"beads"}
    assert plugins.discover("none").backends == {}
    monkeypatch.setenv(plugins.VARIABLE, "a")
    assert set(plugins.discover().backends) == {"abacus"}
    with pytest.raises(InputError, match="names zzz; installed are a, b"):
        plugins.discover("zzz")


def choose(monkeypatch: pytest.MonkeyPatch, *engines: Backend) -> tuple[Backend, str]:
    install(monkeypatch, all=plugin(*engines))
    monkeypatch.setattr(plugins, "installed", plugins.discover)
    return plugins.choose_backend("checkpoint")


def test_auto_takes_the_highest_rank_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, reason = choose(monkeypatch, Named("a", 1), Named("b", 5), Named("c", 9, "not here"), Named("d"))
    assert backend.name == "b"
    assert reason.startswith("auto: b has the highest rank")


def test_auto_says_what_to_install_when_nothing_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="c: run pip install c"):
        choose(monkeypatch, Named("c", 9, "run pip install c"))


def test_unknown_and_missing_engines_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, all=plugin(Named("abacus", 1, "run pip install abacus")))
    monkeypatch.setattr(plugins, "installed", plugins.discover)
    with pytest.raises(BackendError, match="no engine 'abakus'; known are auto, abacus"):
        plugins.get_backend("abakus")
    with pytest.raises(BackendUnavailable, match="engine abacus is not available: run pip install abacus"):
        plugins.get_backend("abacus")


def test_missing_pytorch_is_one_sentence_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert Eager().unavailable() == "PyTorch is not installed; run: pip install 'anamorph[torch]'"


def test_importing_the_package_and_its_plugins_imports_no_engine() -> None:
    import subprocess

    code = (
        "import sys, anamorph, anamorph.plugins as p; p.list_backends();"
        "heavy = {'torch', 'onnxruntime', 'openvino', 'coremltools', 'transformers', 'onnx'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_runtime_imports_no_engine_and_no_outer_layer() -> None:
    import ast

    root = Path(__file__).parent.parent / "runtime"
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            outer = [
                n for n in names if n.startswith(("anamorph.backends", "anamorph.exporters", "anamorph.benchmarks"))
            ]
            assert not outer, f"{path.name} imports {outer}"


def programs(backend: Backend, component: Component, parts: Sequence[str]) -> dict[str, Program]:
    return open_parts(backend, component, parts, Target())


@pytest.mark.parametrize("name", ["eager", "null"])
def test_every_engine_checks_its_inputs_and_keeps_the_declared_shapes(sd1: Path, name: str) -> None:
    from anamorph.checkpoint import Source, open_checkpoint
    from anamorph.pipelines.describing import read_component

    component = read_component(open_checkpoint(Source(str(sd1))), "vae", ("AutoencoderKL",))
    opened = programs(plugins.get_backend(name), component, component.parts)
    decoder = opened["vae_decoder"]
    latents = decoder.arrays.put(np.zeros((3, 4, 5, 6), np.float32))
    out = decoder.session()({"latent_sample": latents})["sample"]
    assert tuple(out.shape) == (3, 3, 40, 48)
    moments = opened["vae_encoder"].session()({"sample": decoder.arrays.put(np.zeros((1, 3, 40, 48), np.float32))})
    assert tuple(moments["latent_parameters"].shape) == (1, 8, 5, 6)
    with pytest.raises(InputError, match="misses latent_sample and got z"):
        decoder.session()({"z": latents})
    with pytest.raises(InputError, match="a dimension is 3, expected 4"):
        decoder.session()({"latent_sample": latents[:, :3]})
    with pytest.raises(InputError, match="height is 41, expected a multiple of 8"):
        opened["vae_encoder"].session()({"sample": decoder.arrays.put(np.zeros((1, 3, 41, 48), np.float32))})
