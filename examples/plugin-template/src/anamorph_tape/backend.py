"""Plays tapes back: an engine of one screen that keeps the whole contract."""

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anamorph import hookimpl
from anamorph.arrays import Array, NumpyArrays
from anamorph.backends.numpy_program import artifact_of, prepared
from anamorph.components import Component
from anamorph.engine import Backend, Costs, Graph, Placement, Program, Target
from anamorph.errors import ArtifactError
from anamorph.interface import Interface
from anamorph_tape import FORMAT, TAPE, WEIGHTS
from anamorph_tape.exporter import unavailable

NUMBERS = {name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "getitem", "neg")}
READS_FILES = ("from_file",)


@dataclass(frozen=True)
class TapeProgram(Graph):
    """One part: what is shared by all threads. Nothing here changes while it runs, so it is its own session."""

    tape: Mapping[str, Any]
    weights: Mapping[str, Any]
    interface: Interface
    placement: Placement
    arrays: NumpyArrays

    def session(self) -> "TapeProgram":
        return self

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        values = dict(self.weights)
        for name, value in prepared(self.interface, inputs).items():
            values[self.tape["inputs"][name]] = torch.from_numpy(value.copy())
        with torch.inference_mode():
            for line in self.tape["lines"]:
                values[line["to"]] = function(line["call"])(*read(line["args"], values), **read(line["named"], values))
        return {name: values[value].numpy() for name, value in self.tape["outputs"].items()}


def function(name: str) -> Any:
    """What a line calls: an operation of PyTorch on tensors, or one on whole numbers, and nothing else."""
    import torch

    if name in NUMBERS:
        return NUMBERS[name]
    space, _, operation = name.partition(".")
    base, _, overload = operation.partition(".")
    if space != "aten" or base in READS_FILES:
        raise ArtifactError(f"a tape calls {name!r}, which is no operation on tensors; it is refused")
    return getattr(getattr(torch.ops.aten, base), overload)


def read(value: Any, values: Mapping[str, Any]) -> Any:
    """Arguments of a line: the inverse of `exporter.plain`."""
    import torch

    if isinstance(value, dict) and "value" in value:
        return values[value["value"]]
    if isinstance(value, dict) and "torch" in value:
        return getattr(torch, value["torch"])
    if isinstance(value, dict):
        return {name: read(one, values) for name, one in value.items()}
    return [read(one, values) for one in value] if isinstance(value, list) else value


class Tape:
    """The engine; what it declares here is all that commands and tables say about it."""

    name = "tape"
    formats = (FORMAT,)
    rank: int | None = 1  # the only engine for its format, so `backend="auto"` takes it for tapes
    double = False
    places: Mapping[str, tuple[str, ...]] = {"cpu": ("float32",)}
    sizes = "any"
    costs = Costs()
    options: Mapping[str, str] = {}

    def unavailable(self) -> str | None:
        return unavailable()

    def devices(self) -> tuple[str, ...]:
        return tuple(self.places)

    def precisions(self, device: str) -> tuple[str, ...]:
        return self.places[device]

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        from safetensors.torch import load_file

        artifact, opened = artifact_of(component, self.name, self.formats), {}
        for part in parts:
            file = artifact.open_part(part)  # after comparing its files with the manifest
            tape = json.loads(file.with_name(TAPE).read_text(encoding="utf-8"))
            placement = Placement(part, self.name, target.device, target.precision)
            weights = load_file(file.with_name(WEIGHTS))
            opened[part] = TapeProgram(tape, weights, artifact.parts[part].interface, placement, NumpyArrays())
        return opened


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [Tape()]
