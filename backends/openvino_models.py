"""Compiled models of one exported part: read from its graph, or taken from the cache where they were compiled before.

What OpenVINO stores of a compiled model is its rewritten graph; the weights stay in the checkpoint's file, in a rounded
copy of that, or in the graph's own, and are packed again at each start. Packing reads them once: their pages are then
given back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.artifact import Artifact
from anamorph.backends.buckets import COMPILED, FOUND, Sizes
from anamorph.backends.memory import giving_back
from anamorph.backends.numpy_program import GraphPort, agreed, imported
from anamorph.backends.openvino_angles import cut_angles
from anamorph.backends.openvino_chunks import CHUNK, chunk_keys
from anamorph.backends.openvino_devices import EXACT, check_sizes, core, read_back, resolved, settings_for
from anamorph.backends.openvino_files import check_ir
from anamorph.backends.openvino_lora import fused_weights, put_inputs
from anamorph.backends.openvino_rounded import multiplied, multiply_narrow, rounded
from anamorph.backends.openvino_weights import exchange_weights, forget_files, put_mapped_weights, put_weights
from anamorph.engine import Target
from anamorph.entries import ANY, Entry, Key, discard, find, keep
from anamorph.errors import ArtifactError, BackendError
from anamorph.interface import Interface
from anamorph.linked import Linked
from anamorph.lora.factors import Change, Layers
from anamorph.lora.ports import digest_of
from anamorph.machine import package_version
from anamorph.rewrites import CHUNKS

TYPES = {"f32": "float32", "i64": "int64", "u8": "uint8"}
"""OpenVINO's names of types -> those of an interface."""
SCALAR = (1,)
"""The shape of single numbers in OpenVINO's files, as other tools feed them."""
LAYOUT = 2
"""Raised whenever the same graph is compiled in another way, so that older entries of the cache are not taken."""
MAIN, ANGLES = "model.blob", "angles.blob"


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled model, what computes its angles in float32 (see `openvino_angles`), and whether it was found."""

    main: Any
    angles: Any | None
    origin: str
    kept: Sequence[Any] = ()
    """The memory that it reads."""


@dataclass(frozen=True)
class Source:
    """A part that models are compiled from, for one target; `further` values of its graph become outputs."""

    artifact: Artifact
    part: str
    target: Target
    further: Sequence[str] = ()
    adapted: Layers = field(default_factory=dict)
    fused: Change = field(default_factory=dict)
    """What adapters change while it runs, or have changed before."""

    @property
    def path(self) -> Path:
        """The graph's file."""
        return self.artifact.folder / self.artifact.parts[self.part].file

    @property
    def _device(self) -> str:
        """OpenVINO's name of the device that runs it."""
        return resolved(self.target.device)

    def _settings(self, precision: str) -> dict[str, Any]:
        return settings_for(precision, self.target.device)

    def checked(self, interface: Interface) -> Interface:
        """The interface as far as the graph serves it, after comparing files and graph with their record."""
        check_ir(self.artifact, self.part, self.artifact.open_part(self.part))
        linked = set(self.artifact.open_weights(self.part))
        try:
            model = core().read_model(self.path)
            self._change(model)
        except RuntimeError as error:
            raise self._refused(error) from None
        check_sizes(self.part, interface, self.target.device)
        declared = {port.name for port in interface.inputs}
        asked = [port for port in model.inputs if not port.names & linked]
        inputs = {min(port.names, key=lambda name: name not in declared): _port(port) for port in asked}
        outputs = {name for port in model.outputs for name in port.names}
        return agreed(self.path, interface, inputs, outputs, SCALAR)

    def compiled(self, sizes: Sizes | None) -> Compiled:
        """The model for these sizes, or for all; from the cache, or compiled now and kept there."""
        key = None if self.further or self.fused or self._copy is None else self.key(sizes)
        entry = None if key is None else find(key)
        if entry is not None:
            try:
                with giving_back(self.weight_files()):
                    return self._imported(entry)
            except RuntimeError as error:
                discard(entry.folder, f"OpenVINO does not take {entry.folder} ({_last_line(error)})")
        try:
            with giving_back(self.weight_files()):
                made = self._compiled_now(sizes)
        except RuntimeError as error:
            raise self._refused(error) from None
        if key is not None:
            keep(key, lambda draft: _store(made, draft))
        return made

    def key(self, sizes: Sizes | None) -> Key:
        """What the entry of a model in the cache depends on."""
        part, precision = self.artifact.parts[self.part], self.target.precision
        settings = {**self._settings(precision), "layout": LAYOUT, "device": self._device}
        if self.adapted:
            settings["adapted"] = digest_of(self.adapted)
        if self._rounds:
            settings["weights"] = "rounded"
        if self._chunks:
            settings["chunk"] = CHUNK
        engine, shape = package_version("openvino"), ANY if sizes is None else sizes.name
        return Key.of(self.part, engine, part.files, part.linked, shape, precision, settings)

    def _compiled_now(self, sizes: Sizes | None) -> Compiled:
        model, weights = self._read()
        if self.further:
            given = {name for port in model.outputs for name in port.names}
            model.add_outputs([name for name in self.further if name not in given])
        if sizes is not None:
            named = {port: name for port in model.inputs for name in port.names if name in sizes.shapes}
            model.reshape({port: list(sizes.shapes[name]) for port, name in named.items()})
        angles = cut_angles(model) if self.target.precision != EXACT else None
        if self.target.precision == "bfloat16":
            multiply_narrow(model)
        if self._chunks:
            chunk_keys(model)
        if angles is not None:
            forget_files(angles)
            angles = core().compile_model(angles, self._device, self._settings(EXACT))
        main = core().compile_model(model, self._device, {**self._settings(self.target.precision), **self._apart()})
        return self._made(main, angles, COMPILED, weights)

    def _imported(self, entry: Entry) -> Compiled:
        kept = [np.memmap(entry.folder / name, np.uint8, "r") for name in sorted(entry.files, reverse=True)]
        main, *angles = (_tensor(values) for values in kept)
        precision = self.target.precision
        main = core().import_model(main, self._device, {**self._settings(precision), **self._apart()})
        angles = [core().import_model(each, self._device, self._settings(EXACT)) for each in angles]
        return self._made(main, angles[0] if angles else None, FOUND, kept)

    def _made(self, main: Any, angles: Any | None, origin: str, kept: Any) -> Compiled:
        if (precision := read_back(main, self.target.device)["precision"]) != self.target.precision:
            raise BackendError(
                f"OpenVINO compiled {self.part} for {precision} instead of {self.target.precision}; update openvino"
            )
        return Compiled(main, angles, origin, kept)

    def _read(self) -> tuple[Any, Mapping[str, Linked]]:
        """The graph with its weights, and the memory that these lie in."""
        model, weights = core().read_model(self.path), self.artifact.open_weights(self.part)
        if weights:
            forget_files(model)
            narrow = self._copy or {}
            weights = {**weights, **{name: narrow[name] for name in multiplied(model) & set(narrow)}}
            file = self.weight_files()[0]
            here = {name: one for name, one in weights.items() if one.place is not None and one.place.file == file}
            put_mapped_weights(model, here, core())
            put_weights(model, {name: one for name, one in weights.items() if name not in here})
        part = self.artifact.parts[self.part]
        if self.fused:
            changed = fused_weights(model, self.path, part, self.fused, weights)
            exchange_weights(model, changed)
            weights = {**weights, **changed}
        self._change(model)
        return model, weights

    def _change(self, model: Any) -> None:
        """Let the model take what is given to it here, beside what it was exported for."""
        part = self.artifact.parts[self.part]
        if self.adapted:
            put_inputs(model, part, self.adapted)
        _take_floats(model, part.interface)

    @property
    def _chunks(self) -> bool:
        """Whether attention to many keys goes by chunks; in float32 that is no faster."""
        narrow = self.target.precision == "bfloat16" and self._device == "CPU"
        return narrow and CHUNKS in self.artifact.parts[self.part].rewrites

    @property
    def _rounds(self) -> bool:
        """Whether matrices are taken from their copy in bfloat16; adapters change what is stored."""
        narrow = self.target.precision == "bfloat16" and self._device == "CPU"
        return narrow and not self.adapted and not self.fused and bool(self.artifact.parts[self.part].linked)

    @cached_property
    def _copy(self) -> Mapping[str, Linked] | None:
        """That copy; None where there should be one, but the cache does not take it."""
        return rounded(self.artifact.parts[self.part], self.artifact.checkpoint) if self._rounds else {}

    def weight_files(self) -> list[Path]:
        """The files that its weights lie in, first the one that most are in."""
        part = self.artifact.parts[self.part]
        own = self.path.with_suffix(".bin")
        linked = sorted(part.linked, key=lambda name: -part.linked[name].size)
        copies = {one.place.file: None for one in (self._copy or {}).values() if one.place is not None}
        return [*copies, *(self.artifact.checkpoint / name for name in linked)] or [own] * own.exists()

    def _apart(self) -> dict[str, Any]:
        """What lets OpenVINO store a compiled model without the weights of one file, and find them there again."""
        files = self.weight_files() if self._device == "CPU" else []
        return {"CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": str(files[0])} if files else {}

    def _refused(self, error: RuntimeError) -> ArtifactError:
        return ArtifactError(f"{self.path} cannot be opened by OpenVINO: {_last_line(error)}")


def _store(made: Compiled, draft: Path) -> None:
    for name, model in {MAIN: made.main, ANGLES: made.angles}.items():
        if model is not None:
            (draft / name).write_bytes(model.export_model().getbuffer())


def _tensor(values: NDArray[np.uint8]) -> Any:
    openvino = imported("openvino", "openvino")
    return openvino.Tensor(values, [values.size], openvino.Type.u8)


def _last_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1]


def _port(port: Any) -> GraphPort:
    kind = port.element_type.to_string()
    sizes = (size.get_length() if size.is_static else None for size in port.partial_shape)
    return GraphPort(TYPES.get(kind, kind), tuple(sizes))


def _take_floats(model: Any, interface: Interface) -> None:
    """Let inputs that files hold as whole numbers (the timestep, as other tools feed it) take our float32.

    Schedulers with fractional timesteps would lose them otherwise.
    """
    import openvino

    whole = {port.name for port in interface.inputs if port.dtype == "float32"}
    for port in model.inputs:
        if not port.names & whole or port.element_type != openvino.Type.i64:
            continue
        old = port.get_node()
        new = openvino.op.Parameter(openvino.Type.f32, old.get_partial_shape())
        new.output(0).set_names(port.names)
        for reader in port.get_target_inputs():  # their conversion to float32 no longer does anything
            reader.replace_source_output(new.output(0))
        model.remove_parameter(old)
        model.add_parameters([new])
    model.validate_nodes_and_infer_types()
