"""Artifacts that several tests share: each checkpoint is traced and exported once per run."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from anamorph.checkpoint import Source, open_checkpoint
from anamorph.exporters import folder
from anamorph.exporting import Check, ExportOptions
from anamorph.plugins import get_exporter

FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}
"""Engine -> the format that it opens."""

_place = Path(tempfile.mkdtemp(prefix="anamorph-tests-"))
atexit.register(shutil.rmtree, _place, ignore_errors=True)
_traces: dict[Any, Any] = {}
_trace = folder.trace


def _trace_once(module: Any, method: str, interface: Any) -> Any:
    weights = float(sum(value.double().sum() for value in module.state_dict().values()))
    key = (weights, module.config.to_json(), method, interface)
    if key not in _traces:
        _traces[key] = _trace(module, method, interface)
    return _traces[key]


@contextmanager
def shared_traces() -> Iterator[None]:
    """Both formats start from the same traced graphs: tracing takes most of the time of a tiny export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "trace", _trace_once)
        yield


def export(checkpoint: Path, engine: str, out: Path, **options: Any) -> list[Check]:
    """Export without sharing the result."""
    with shared_traces():
        source = open_checkpoint(Source(str(checkpoint)))
        return list(get_exporter([FORMATS[engine]]).export(source, out, ExportOptions(**options), lambda _: None))


@functools.cache
def exported(checkpoint: Path, engine: str) -> Path:
    """The checkpoint's artifact for one engine, dynamic and in float32; not to be changed."""
    out = _place / f"{checkpoint.name}-{engine}"
    export(checkpoint, engine, out)
    return out
