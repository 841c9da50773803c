"""Models of one exported part in ONNX Runtime: for all sizes, or once more for a single one.

What ONNX Runtime makes of a graph is kept in the user's cache with its weights, mapped, and serves all sizes. A model
for one size is made of that with its open dimensions fixed: what depends on sizes alone is folded, and memory planned
once. Such models map the same weights, but each packs those of its products for itself. On processors they were no
faster, so that there are none unless they are asked for.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anamorph.artifact import Artifact, Part
from anamorph.backends.buckets import COMPILED, FOUND, Sizes
from anamorph.backends.cores import physical_cores
from anamorph.backends.numpy_program import imported
from anamorph.backends.onnx_arena import share, shrink
from anamorph.backends.onnx_files import with_outputs
from anamorph.backends.onnx_lora import fused_weights, with_inputs
from anamorph.backends.onnx_providers import HOST, RECORD, Choice
from anamorph.entries import ANY, Entry, Key, discard, find, keep
from anamorph.errors import AnamorphError, ArtifactError, OutputError
from anamorph.linked import Linked
from anamorph.lora.factors import Change, Layers
from anamorph.lora.ports import digest_of
from anamorph.machine import package_version

BFLOAT16 = 16
"""ONNX's number of this type (onnx.proto, TensorProto.DataType)."""
OPTIMISED, WEIGHTS = "model.onnx", "weights.bin"
SAVING = {
    "session.optimized_model_external_initializers_file_name": WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}
"""How an optimised model is stored: its weights beside it, mapped. Not as kernels pack them, which it can store, too:
ONNX Runtime 1.31 ends the process when it runs some of the models that it stored so, such as a safety checker."""
LAYOUT = 2
"""Raised whenever the same graph is optimised in another way, so that older entries of the cache are not taken."""


@dataclass(frozen=True)
class Model:
    """A session, how it came about, and what it was read from.

    `weights` are kept, because ONNX Runtime reads linked weights where they are mapped.
    """

    engine: Any
    origin: str
    file: str | bytes
    folder: Path
    weights: Mapping[str, Linked]

    def __del__(self) -> None:
        """Give the session's memory back to the system: the arena outlives it."""
        if not sys.is_finalizing():
            vars(self).clear()
            shrink()

    def dimensions(self, sizes: Sizes) -> dict[str, int] | None:
        """Open dimensions by their names in the graph, or None where inputs of different sizes share a name."""
        found: dict[str, int] = {}
        for port in self.engine.get_inputs():
            for name, size in zip(port.shape, sizes.shapes.get(port.name, ()), strict=False):
                if isinstance(name, str) and found.setdefault(name, size) != size:
                    return None
        return found

    def fixed(self, sizes: Sizes) -> "Model":
        """The same for these sizes alone, on the processor."""
        options = _options()
        for name, size in (self.dimensions(sizes) or {}).items():
            options.add_free_dimension_override_by_name(name, size)
        return replace(self, engine=_session(self.file, self.folder, self.weights, options), origin=COMPILED)


@dataclass(frozen=True)
class Source:
    """A part that is opened: its file, and the layers that adapters change while it runs, or have changed before."""

    artifact: Artifact
    part: str
    path: Path
    adapted: Layers
    fused: Change

    @property
    def exported(self) -> Part:
        """The record of what was exported."""
        return self.artifact.parts[self.part]

    def model(self, further: Sequence[str] = ()) -> str | bytes:
        """What ONNX Runtime reads: the file, or a graph that was made of it."""
        if self.adapted:
            model = with_inputs(self.path, self.exported, self.adapted)
        elif further:
            model = self.path.read_bytes()
        else:
            return str(self.path)
        return with_outputs(model, further)

    def weights(self) -> dict[str, Linked]:
        """The weights that are handed over: those that lie in the checkpoint, and those that adapters have changed."""
        linked = self.artifact.open_weights(self.part)
        return {**linked, **(fused_weights(self.path, self.exported, self.fused, linked) if self.fused else {})}

    def opened(self, choice: Choice, further: Sequence[str] = ()) -> Model:
        """The model for all sizes; `further` values of the graph become outputs.

        Raises ArtifactError: ONNX Runtime does not take it.
        """
        if choice.plain and not further and not self.fused and (cached := _cached(self)) is not None:
            return cached
        linked, folder = self.weights(), self.path.parent
        try:
            file = self.model(further)
            return Model(_session(file, folder, linked, _options(), choice), COMPILED, file, folder, linked)
        except AnamorphError:
            raise
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types
            raise ArtifactError(f"{self.path} cannot be opened by ONNX Runtime: {_first_line(error)}") from None

    @property
    def key(self) -> Key:
        """What the entry of an optimised model in the cache depends on; it serves all sizes."""
        settings = {"threads": physical_cores(), "provider": HOST, "layout": LAYOUT}
        if self.adapted:
            settings["adapted"] = digest_of(self.adapted)
        files = self.exported
        return Key.of(self.part, package_version("onnxruntime"), files.files, files.linked, ANY, "float32", settings)


def _cached(source: Source) -> Model | None:
    """A part's optimised model, made now if it is not in the cache; None where that does not take it."""
    folder = source.path.parent

    def optimise(draft: Path) -> None:
        options = _options()
        options.optimized_model_filepath = str(draft / OPTIMISED)
        for name, value in SAVING.items():
            options.add_session_config_entry(name, value)
        try:
            _session(source.model(), folder, source.weights(), options)
        except AnamorphError:
            raise
        except Exception as error:  # of the disk or of the model: that is opened once more, without the cache
            raise OutputError(f"ONNX Runtime cannot write to {draft} ({_first_line(error)}); free the disk") from None

    key = source.key
    ways: dict[str, Callable[[], Entry | None]] = {FOUND: lambda: find(key), COMPILED: lambda: keep(key, optimise)}
    for origin, look in ways.items():
        if (entry := look()) is None:
            continue
        options = _options()
        options.graph_optimization_level = imported("onnxruntime", "onnx").GraphOptimizationLevel.ORT_DISABLE_ALL
        file = str(entry.folder / OPTIMISED)
        try:
            return Model(_session(file, entry.folder, {}, options), origin, file, entry.folder, {})
        except Exception as error:
            discard(entry.folder, f"ONNX Runtime does not take {entry.folder} ({_first_line(error)})")
    return None


def _options() -> Any:
    options = imported("onnxruntime", "onnx").SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors are raised; its warnings about unused initialisers help nobody
    return options


def _session(
    model: str | bytes, folder: Path, linked: Mapping[str, Linked], options: Any, choice: Choice | None = None
) -> Any:
    """Open a model file, or a model that comes as bytes and does not know the `folder` where its weights lie.

    Without a choice the processor runs it.
    """
    options.add_external_initializers(list(linked), [value_of(weight) for weight in linked.values()])
    if isinstance(model, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    providers: list[Any] = [HOST]
    if choice is not None:
        options.add_session_config_entry(RECORD, "1")
        providers = choice.listed()
    if choice is None or choice.plain:
        share(options)
    return imported("onnxruntime", "onnx").InferenceSession(model, options, providers=providers)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def value_of(weight: Linked) -> Any:
    """A mapped tensor as a value of ONNX Runtime, which reads it where it lies."""
    import onnxruntime

    if weight.dtype == "BF16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(weight.values, BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(weight.values)
