"""OpenVINO on its devices, in a pinned precision, because left alone it chooses bfloat16 by itself."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array, NumpyArrays
from anamorph.artifact import Artifact
from anamorph.backends.buckets import SPARED, Buckets, Sizes
from anamorph.backends.memory import giving_back
from anamorph.backends.numpy_program import artifact_of, prepared
from anamorph.backends.openvino_devices import EXACT, PLACES, devices, precisions, promised
from anamorph.backends.openvino_models import SCALAR, Compiled, Source
from anamorph.components import Component
from anamorph.engine import Backend, Costs, Graph, Placement, Program, Target
from anamorph.entries import Key
from anamorph.interface import Interface, size_of
from anamorph.lora.factors import Layers
from anamorph.lora.ports import adaptable, is_factor, is_rank
from anamorph.machine import free_memory
from anamorph.memory import OwnSizes, Saving
from anamorph.plugins import hookimpl
from anamorph.rewrites import noted

KEYS = 16
"""With fewer, attention of a model for one size is wrong in bfloat16."""


@dataclass(frozen=True)
class OpenVinoProgram(Graph):
    """A part with its compiled models, made when sizes are first called.

    Each session has infer requests of its own, because a request holds its outputs.
    """

    source: Source
    interface: Interface
    buckets: Buckets[Compiled]
    arrays: NumpyArrays

    @property
    def placement(self) -> Placement:
        """Read back from OpenVINO."""
        target = self.source.target
        details = {
            **promised(target.precision, target.device),
            **noted(self.source.artifact.parts[self.source.part].rewrites),
        }
        precision = details.pop("precision")
        return Placement(self.source.part, "openvino", target.device, precision, details, tuple(self.buckets.history))

    def layers(self) -> Layers:
        """See `anamorph.lora.adapting.Adaptable`."""
        return adaptable(self.source.part, self.source.artifact.parts[self.source.part])

    def ranks(self, rank: int) -> int | None:  # noqa: ARG002 - ranks are open
        """See `anamorph.lora.adapting.Adaptable`."""
        return None

    def session(self) -> "OpenVinoSession":
        """A caller with buffers of its own."""
        return OpenVinoSession(self)

    def spare(self, saving: Saving) -> str | None:
        """Take the number of sizes that have a model of their own; see `Program.spare`."""
        if not isinstance(saving, OwnSizes):
            return super().spare(saving)
        self.buckets.spare(saving)
        return None


@dataclass(frozen=True)
class OpenVinoSession:
    """Runs infer requests; results are copies, because the next call overwrites the request's own."""

    program: OpenVinoProgram
    requests: WeakKeyDictionary[Compiled, "Requests"] = field(default_factory=WeakKeyDictionary)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        interface = self.program.interface
        values = prepared(interface, inputs)
        given = {name: value.reshape(value.shape or SCALAR) for name, value in values.items()}
        shapes = {name: value.shape for name, value in given.items() if not is_factor(name)}  # ranks stay open
        axes = {name: size for name, size in interface.sizes_of(inputs).items() if not is_rank(name)}
        made = self.program.buckets.take(Sizes(shapes, [name for name in inputs if name in shapes], axes))
        if made not in self.requests:
            self.requests[made] = Requests.of(made)
        request = self.requests[made].run(given)
        return {port.name: np.array(request.get_tensor(port.name).data) for port in interface.outputs}


@dataclass(frozen=True)
class Requests:
    """Infer requests for a model, and for what computes its angles."""

    main: Any
    angles: Any | None

    @classmethod
    def of(cls, made: Compiled) -> "Requests":
        """New ones."""
        return cls(made.main.create_infer_request(), made.angles and made.angles.create_infer_request())

    def run(self, given: Mapping[str, NDArray[Any]]) -> Any:
        """Run both; the main request holds the outputs until it runs again."""
        if self.angles is not None:
            _infer(self.angles, given)
            ports = self.angles.model_outputs
            given = {**given, **{name: self.angles.get_tensor(name).data for port in ports for name in port.names}}
        _infer(self.main, given)
        return self.main


def _infer(request: Any, given: Mapping[str, NDArray[Any]]) -> None:
    """Run a request with those of the values that it takes."""
    taken = {name for port in request.model_inputs for name in port.names}
    request.infer({name: value for name, value in given.items() if name in taken}, share_inputs=True)


class OpenVino:
    """Opens exported folders in OpenVINO's IR format."""

    name = "openvino"
    formats = ("openvino",)
    rank: int | None = 10
    double = False
    places: Mapping[str, tuple[str, ...]] = PLACES
    sizes = "any"
    costs = Costs(memory=1.9, disk={"bfloat16": 2.0})
    concurrent = True
    options: Mapping[str, str] = MappingProxyType({})

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("openvino"):
            return None
        return "OpenVINO is not installed; run: pip install 'anamorph[openvino]'"

    def devices(self) -> tuple[str, ...]:
        return devices()

    def precisions(self, device: str) -> tuple[str, ...]:
        return precisions(device)

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        artifact = artifact_of(component, self.name, self.formats)
        return {part: _open(artifact, part, target, component=component) for part in parts}

    def key(self, artifact: Artifact, part: str, target: Target) -> Key:
        return Source(artifact, part, target).key(None)

    def inner_values(
        self, artifact: Artifact, part: str, names: Sequence[str]
    ) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        program = _open(artifact, part, Target(), names)
        program.spare(OwnSizes(0))
        session = program.session()

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            session(inputs)
            (requests,) = session.requests.values()
            return {name: np.array(requests.main.get_tensor(name).data) for name in names}

        return run


def _open(
    artifact: Artifact, part: str, target: Target, further: Sequence[str] = (), component: Component | None = None
) -> OpenVinoProgram:
    """Open a part, for the adapters of its component; `further` values of its graph become outputs."""
    if component is None:
        source, declared = Source(artifact, part, target, further), artifact.parts[part].interface
    else:
        source = Source(artifact, part, target, further, component.adapted, component.fused)
        declared = component.interface(part)
    interface = source.checked(declared)

    def make(sizes: Sizes | None) -> Compiled:
        made = source.compiled(sizes)
        return made if sizes is not None else _settled(made, source, interface)

    def fits() -> bool:
        free = free_memory()
        return free is None or free > SPARED * artifact.parts[part].size

    def alone(sizes: Sizes) -> bool:
        return target.precision == EXACT or _has_keys(interface, sizes)

    return OpenVinoProgram(source, interface, Buckets(make, fits, alone), NumpyArrays())


def _has_keys(interface: Interface, sizes: Sizes) -> bool:
    """Whether every attention has `KEYS` keys or more.

    In bfloat16, models of OpenVINO 2026.4 for one size return other values at each call where an attention has fewer:
    a UNet's at pictures whose smallest level is below 4 x 4. Those for all sizes do not.
    """
    axes = interface.axes
    sides = [sizes.axes[name] // axis.multiple for name, axis in axes.items() if name.endswith(("height", "width"))]
    return math.prod(sides or [KEYS]) >= KEYS and sizes.axes.get("sequence", KEYS) >= KEYS


def _settled(made: Compiled, source: Source, interface: Interface) -> Compiled:
    """A model for all sizes after one call in which every open axis is longer than its shortest.

    OpenVINO 2026.4 settles its fused attention at the first call of a compiled model. Where that has a single key
    (a picture whose smallest level is one pixel, a text of one token), all later calls of 16 keys or more return
    wrong values. Models for one size are not concerned. Weights are packed at that call, too.
    """
    sizes = {
        name: max(axis.minimum, min(2 * axis.multiple, axis.maximum or 2 * axis.multiple))
        for name, axis in interface.axes.items()
    }
    if any(axis.minimum != axis.maximum for axis in interface.axes.values()):
        ports = interface.required.inputs
        shapes = {port.name: tuple(size_of(dimension, sizes) for dimension in port.axes) for port in ports}
        values = prepared(interface, {port.name: np.zeros(shapes[port.name], port.dtype) for port in ports})
        with giving_back(source.weight_files()):
            Requests.of(made).run({name: value.reshape(value.shape or SCALAR) for name, value in values.items()})
    return made


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [OpenVino()]
