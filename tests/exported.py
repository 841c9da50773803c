"""Artifacts that several tests share: each checkpoint is traced and exported once per run."""

import contextlib
import copy
import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from anamorph.artifact import NATIVE, PORTABLE, VERIFIED, Artifact, FileRecord, Part
from anamorph.backends import onnxruntime, openvino
from anamorph.cache import CACHE
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.engine import Session, Target
from anamorph.errors import ArtifactError
from anamorph.exporters import calibration, certificate, folder, quantization, references
from anamorph.exporters import onnx as onnx_format
from anamorph.exporters import openvino as openvino_format
from anamorph.exporters.storing import Storing
from anamorph.exporters.trace import with_scalars
from anamorph.exporting import LINKED, Check, ExportOptions, cached_export
from anamorph.guard import Held
from anamorph.interface import Interface
from anamorph.plugins import get_exporter

FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}
"""Engine -> the format that it opens."""
COMPILED = "ANAMORPH_COMPILED"
"""Environment variable: if it is set, every pipeline is also drawn by torch.compile, which takes minutes."""
ENGINES = [*FORMATS, *(["compile"] if COMPILED in os.environ else [])]

_traces: dict[Any, Any] = {}
_trace = folder.trace


def trace_once(module: Any, method: str, interface: Any) -> Any:
    """The traced graph of a model with its weights: the same for all formats, and for all models of a configuration."""
    known = hasattr(module, "config")
    told = module.config.to_json() if known else float(sum(one.double().sum() for one in module.state_dict().values()))
    ways = getattr(module, "rewrites", ()), getattr(module, "even_sizes", False)
    key = (type(module), told, ways, method, interface.inputs, interface.outputs, interface.sizes)
    if key not in _traces:
        _traces[key] = _trace(module, method, interface)
    program = copy.copy(_traces[key])
    weights = module.state_dict()
    program._state_dict = {
        name: _kept(value, weights[name.removeprefix("model.")]) for name, value in program.state_dict.items()
    }
    return program


def _kept(traced: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A weight in a traced one's place, a copy: a test may change the model, or the file that it maps."""
    assert value.shape == traced.shape
    copied = value.detach().clone()
    return torch.nn.Parameter(copied, requires_grad=False) if isinstance(traced, torch.nn.Parameter) else copied


@contextmanager
def shared_traces() -> Iterator[None]:
    """Both formats start from the same traced graphs: tracing takes most of the time of a tiny export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "trace", trace_once)
        yield


@contextmanager
def one_process() -> Iterator[None]:
    """Run here what belongs into processes of their own: starting those takes most of the time."""
    modules = {
        "calibration": calibration,
        "certificate": certificate,
        "quantization": quantization,
        "references": references,
    }

    def run(failure: str, module: str, *arguments: str | Path) -> str:
        printed, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            code = modules[module].main([str(argument) for argument in arguments])
        if code:
            raise ArtifactError(f"{failure}: {said.getvalue()}")
        return printed.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        for module in modules.values():
            patch.setattr(module, "run_child", run)
        yield


def export(checkpoint: Path, engine: str, out: Path, **options: Any) -> list[Check]:
    """Export without sharing the result."""
    source = open_checkpoint(Source(str(checkpoint)))
    return list(get_exporter([FORMATS[engine]]).export(source, out, ExportOptions(**options), lambda _: None))


def shared_place() -> Path:
    """The folder that all processes of a run have in common."""
    return Path(os.environ["ANAMORPH_TESTS"])


def once(place: Path, make: Callable[[Path], Any]) -> Path:
    """A folder that the first of several processes makes, for all of them."""
    with FileLock(place.with_name(f"{place.name}.lock")):
        if not place.exists():
            draft = place.with_name(f"{place.name}.draft")
            make(draft)
            draft.rename(place)
    return place


@functools.cache
def exported(checkpoint: Path, engine: str, signature: str = PORTABLE, **options: Any) -> Path:
    """The checkpoint's artifact for one engine, or what it opens; not to be changed.

    Without further options it is dynamic and in float32.
    """
    if engine not in FORMATS:
        return checkpoint
    if (signature, options) == (NATIVE, {"storage": LINKED}):  # what pipelines themselves make of a checkpoint
        with shared_traces(), one_process(), pytest.MonkeyPatch.context() as patch:
            patch.setenv(CACHE, str(shared_place() / "cache"))
            return cached_export(open_checkpoint(Source(str(checkpoint))), get_exporter([FORMATS[engine]])).folder
    short = hashlib.sha256(repr((str(checkpoint), sorted(options.items()))).encode()).hexdigest()[:8]

    def make(out: Path) -> None:
        with shared_traces(), one_process():  # also for a test that is about processes
            export(checkpoint, engine, out, signature=signature, **options)

    return once(shared_place() / f"{checkpoint.name}-{short}-{engine}-{signature}", make)


def opened(engine: str, place: Path, program: Any, interface: Interface) -> Session:
    """A traced method of a model, written into `place` and opened by the engine's own adapter."""
    if engine == "onnxruntime":
        written = onnx_format.write(program, interface, place, Storing())
    else:
        written = openvino_format.write(program, with_scalars(interface, (1,)), place, Storing())
    files = {path.name: FileRecord.of(path) for path in place.iterdir()}
    part = Part("part", written.file, files, interface, "float32", VERIFIED)
    artifact = Artifact(place, FORMATS[engine], NATIVE, {"part": part}, {}, {}, {})
    adapter = onnxruntime if engine == "onnxruntime" else openvino
    return Held(adapter._open(artifact, "part", Target()), engine).session()
