"""Core ML on macOS: packages of fixed sizes, called as often as a batch needs."""

import importlib.util
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array, NumpyArrays
from anamorph.artifact import Artifact, Part
from anamorph.backends.coreml_ports import CHECKED, package_names, package_value, port_shape
from anamorph.backends.numpy_program import GraphPort, agreed, artifact_of, imported, prepared
from anamorph.backends.rows import BATCH, rows_of
from anamorph.components import Component
from anamorph.engine import Backend, Costs, Graph, Placement, Program, Target, kind_of
from anamorph.errors import ArtifactError, BackendError
from anamorph.interface import Axis, Interface
from anamorph.plugins import hookimpl
from anamorph.rewrites import noted

UNITS = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")
"""Core ML's compute units: which processors it may choose from."""
HALF, WIDE = "float16", "float32"
"""In which programs compute: the latter where weights are stored so, because the model overflows in the former."""
MANIFEST = "Manifest.json"
"""The file at the root of each package."""
TYPES = {65552: np.float16, 65568: np.float32, 131104: np.int32}
"""Core ML's numbers of array types (MLMultiArrayDataType)."""


def load(package: Path, units: str, function: str | None) -> Any:
    """A package's function as coremltools' model, compiled by Core ML."""
    models = imported("coremltools", "coreml")
    return models.models.MLModel(str(package), compute_units=models.ComputeUnit[units], function_name=function)


@dataclass(frozen=True)
class Described:
    """Inputs of a function of a package with their types and shapes, and the names of its outputs."""

    inputs: Mapping[str, tuple[Any, tuple[int, ...]]]
    outputs: tuple[str, ...]


def described(package: Path) -> dict[str | None, Described]:
    """What a package holds, by the names of its functions; None for one that has a single function."""
    description = imported("coremltools", "coreml").utils.load_spec(str(package)).description
    several = {function.name: function for function in description.functions}
    return {
        name: Described(
            {
                port.name: (TYPES.get(port.type.multiArrayType.dataType), tuple(port.type.multiArrayType.shape))
                for port in each.input
            },
            tuple(port.name for port in each.output),
        )
        for name, each in (several or {None: description}).items()
    }


@dataclass(frozen=True)
class Sized:
    """A part for one size: a function of each of its packages, which run one after another."""

    function: str | None
    steps: tuple[Described, ...]
    interface: Interface

    @property
    def rows(self) -> int:
        """How many rows one call takes."""
        return self.interface.axes[BATCH].minimum

    def serves(self, sizes: Mapping[str, int]) -> bool:
        """Whether it was made for these sizes; batches are cut to its own."""
        axes = self.interface.axes.items()
        return all(axis.minimum == sizes[name] for name, axis in axes if name != BATCH and name in sizes)

    def told(self, values: Mapping[str, NDArray[Any]], first: int, total: int) -> dict[str, NDArray[Any]]:
        """What its packages take from one row on; the last row stands for those that a batch lacks."""
        rows = [min(row, total - 1) for row in range(first, first + self.rows)]
        part = rows_of(self.interface, values, rows)
        names = package_names(self.interface)
        return {names[port.name]: package_value(port, part[port.name], self.rows) for port in self.interface.inputs}


@dataclass(frozen=True)
class CoreMlProgram(Graph):
    """A part with its packages; each size's models are opened when it is first called, and called by one at a time."""

    artifact: Artifact
    part: str
    units: str
    packages: tuple[Path, ...]
    sized: tuple[Sized, ...]
    interface: Interface
    arrays: NumpyArrays
    models: dict[str | None, tuple[Any, ...]] = field(default_factory=dict)
    turn: Lock = field(default_factory=Lock)

    @property
    def placement(self) -> Placement:
        """The units that are allowed, read back from the models; Core ML does not tell which of them it takes."""
        read = {model.compute_unit.name for models in self.models.values() for model in models}
        part = self.artifact.parts[self.part]
        details = {"weights": part.storage, **noted(part.rewrites)}
        return Placement(self.part, "coreml", " ".join(sorted(read)) or self.units, precision_of(part), details)

    def session(self) -> "CoreMlProgram":
        """A call keeps nothing, so a session is no more than the program."""
        return self

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        values, sizes = prepared(self.interface, inputs), self.interface.sizes_of(inputs)
        sized = next(each for each in self.sized if each.serves(sizes))
        names, total = package_names(self.interface), sizes[BATCH]
        results = [self._run(sized, sized.told(values, first, total)) for first in range(0, total, sized.rows)]
        return {
            port.name: np.concatenate([np.asarray(one[names[port.name]], np.float32) for one in results])[:total]
            for port in self.interface.outputs
        }

    def _run(self, sized: Sized, known: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One call: each package takes what it names of the inputs and of what those before it returned."""
        with self.turn:
            for model, step in zip(self.opened(sized), sized.steps, strict=True):
                asked = {name: np.zeros(port[1]) for name, port in step.inputs.items() if name in CHECKED} | known
                given = {name: np.ascontiguousarray(asked[name], kind) for name, (kind, _) in step.inputs.items()}
                known = {**known, **model.predict(given)}
        return known

    def opened(self, sized: Sized) -> tuple[Any, ...]:
        """The models for a size; raises ArtifactError where Core ML does not take a package."""
        if sized.function not in self.models:
            self.models[sized.function] = tuple(self._load(sized, package) for package in self.packages)
        return self.models[sized.function]

    def _load(self, sized: Sized, package: Path) -> Any:
        try:
            return load(package, self.units, sized.function)
        except (RuntimeError, ValueError) as error:
            last = str(error).strip().splitlines()[-1]
            raise ArtifactError(f"{package} cannot be opened by Core ML: {last}") from None


class CoreMl:
    """Opens exported folders of Core ML packages."""

    name = "coreml"
    formats = ("coreml",)
    rank: int | None = 10
    double = False
    places: Mapping[str, tuple[str, ...]] = MappingProxyType({kind_of(unit): (HALF, WIDE) for unit in UNITS})
    sizes = "exported"
    costs = Costs()
    options: Mapping[str, str] = MappingProxyType({})

    def unavailable(self) -> str | None:
        if sys.platform != "darwin":
            return f"Core ML runs on macOS alone, and this is {platform.system()}; open the folder on a Mac"
        if importlib.util.find_spec("coremltools") is None:
            return "coremltools is not installed; run: pip install 'anamorph[coreml]'"
        return None

    def devices(self) -> tuple[str, ...]:
        return UNITS

    def precisions(self, device: str) -> tuple[str, ...]:  # noqa: ARG002 - programs compute in the type they hold
        return HALF, WIDE

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        artifact = artifact_of(component, self.name, self.formats)
        for part in parts:
            if (made := precision_of(artifact.parts[part])) != target.precision:
                raise BackendError(f"{part} was exported to compute in {made}, not in {target.precision}; take {made}")
        return {part: open_part(artifact, part, target.device) for part in parts}


def precision_of(part: Part) -> str:
    """In which a part's programs compute."""
    return WIDE if part.storage == WIDE else HALF


def open_part(artifact: Artifact, name: str, units: str) -> CoreMlProgram:
    """Open a part; raises ArtifactError where its packages are not those of the manifest."""
    artifact.open_part(name)
    part = artifact.parts[name]
    packages = tuple(artifact.folder / Path(file).parent for file in sorted(part.files) if Path(file).name == MANIFEST)
    sized = tuple(_sized(part.interface, packages))
    for listed in part.interface.sizes:
        if not any(each.serves(dict(listed)) for each in sized):
            raise ArtifactError(f"{packages[0]} has no function for {dict(listed)}; export the checkpoint again")
    interface = replace(opened(part.interface), outputs=sized[0].interface.outputs)
    program = CoreMlProgram(artifact, name, units, packages, sized, interface, NumpyArrays())
    program.opened(sized[0])
    return program


def opened(interface: Interface) -> Interface:
    """An interface with batches of any size, which calls cut to those of the packages."""
    return interface.limited({BATCH: Axis(BATCH)})


def _sized(interface: Interface, packages: Sequence[Path]) -> Iterator[Sized]:
    """Every size that packages hold, with the interface as far as they serve it."""
    found = [described(package) for package in packages]
    names, wanted = package_names(interface), replace(opened(interface), sizes=())
    ports = {names[port.name]: port for port in interface.inputs}
    for function in found[0]:
        if any(function not in each for each in found):
            raise ArtifactError(f"{packages[-1]} has no function {function}, which {packages[0]} has; export again")
        steps = tuple(each[function] for each in found)
        inner = {name for step in steps for name in step.outputs}
        taken = {name: port for step in steps for name, port in step.inputs.items() if name not in (*inner, *CHECKED)}
        if strange := [name for name in taken if name not in ports]:
            raise ArtifactError(
                f"{packages[0]} wants {', '.join(strange)}, which nothing feeds to {interface.component}"
            )
        given = {
            ports[name].name: GraphPort(ports[name].dtype, port_shape(ports[name], shape))
            for name, (_, shape) in taken.items()
        }
        outputs = {port.name for port in interface.outputs if names[port.name] in inner}
        rows = next(shape[0] for _, shape in taken.values())
        yield Sized(function, steps, agreed(packages[0], wanted, given, outputs, (rows,)))


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [CoreMl()]
