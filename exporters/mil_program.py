"""Functions of a Core ML package: their inputs and outputs as Apple's tools have them, and where large ones are cut."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil.mil import Builder, Function, Program, Var, types

from anamorph.backends.coreml_ports import CHECKED, EXACT, STATES, package_names, package_shape
from anamorph.exporters.mil import Emitting, Weights
from anamorph.exporters.mil_operators import cast, transposed
from anamorph.exporters.mil_safety import filtered
from anamorph.interface import Interface, Port, size_of

INLINE = 64
"""Constants up to this size are in the program itself (bytes)."""
LAYERS = "hidden_states."
"""How the names of the states of a text encoder's layers begin; SDXL takes those before the last."""


@dataclass(frozen=True)
class Face:
    """How a part of one size looks in a package.

    `apple` gives all inputs the types that apple/ml-stable-diffusion feeds, which loses fractions of timesteps.
    `pictures` is the shape of those that its safety checker holds back. Where it is `wide`, it computes in float32
    between inputs and outputs of float16.
    """

    interface: Interface
    apple: bool = False
    pictures: tuple[int, ...] = ()
    wide: bool = False

    def kind(self, port: Port) -> Any:
        """The type of an input: whole numbers are int32, but Apple's are float32."""
        if port.dtype == "int64":
            return types.fp32 if self.apple else types.int32
        return types.fp32 if port.name in EXACT and not self.apple else types.fp16

    def shape(self, port: Port) -> tuple[int, ...]:
        """The shape of an input."""
        sizes = {name: axis.minimum for name, axis in self.interface.axes.items()}
        return package_shape(port, tuple(size_of(axis, sizes) for axis in port.axes), sizes["batch"])

    def opened(self, port: Port, given: Var) -> Var:
        """An input as the PyTorch graph takes it."""
        if port.dtype == "int64":
            return cast(given, types.int32)
        if port.name in EXACT:
            return cast(given, types.fp32)
        if port.name == STATES and given.rank > len(port.axes):
            return transposed(Builder.squeeze(x=given, axes=[2]), [0, 2, 1])
        return cast(given, types.fp32) if self.wide else given


class Writer:
    """Writes one traced graph as one function, or as several that hand values on."""

    def __init__(self, program: torch.export.ExportedProgram, face: Face, weights: Weights, target: Any) -> None:
        self.face, self.target = face, target
        signature = program.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.base = Emitting(weights, np.float32 if face.wide else np.float16)
        ports = iter(face.interface.inputs)
        self.ports: dict[Any, Port] = {}
        for node in program.graph.find_nodes(op="placeholder"):
            if node.name in stored:
                name = stored[node.name]
                self.base.enter_weight(node, name.removeprefix("model."), program.state_dict[name])
            elif node.name in signature.inputs_to_lifted_tensor_constants:
                self.base.known[node] = program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
            else:
                self.ports[node] = next(ports)
        self.nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        (output,) = program.graph.find_nodes(op="output")
        self.results: list[Any] = list(output.args[0])
        self.handed: dict[Any, Var] = {}

    def functions(self, pieces: int) -> list[Function]:
        """The graph in so many pieces of about as many bytes of weights."""
        places = [0, *self._cuts(pieces), len(self.nodes)]
        made = []
        for begin, end in itertools.pairwise(places):
            made.append(self._function(self.nodes[begin:end], self._crossing(end) if end < len(self.nodes) else None))
        return made

    def _function(self, piece: Sequence[Any], crossing: Sequence[Any] | None) -> Function:
        """One function; `crossing` are the nodes that later pieces take, None for the last piece."""
        names = package_names(self.face.interface)
        used = {each for node in piece for each in node.all_input_nodes} | set(self.results if crossing is None else ())
        entering = [node for node in (*self.ports, *self.handed) if node in used]
        called = {node: names[self.ports[node].name] if node in self.ports else node.name for node in entering}
        inputs = {name: self._placeholder(node) for node, name in called.items()}
        inputs |= {name: Builder.placeholder(shape=shape, dtype=types.fp16) for name, shape in self._further.items()}
        with Function(inputs, opset_version=self.target) as function:
            emitting = Emitting(self.base.weights, self.base.floats, dict(self.base.known), self.base.names)
            for node, name in called.items():
                given = function.inputs[name]
                emitting.known[node] = self.face.opened(self.ports[node], given) if node in self.ports else given
            for node in piece:
                emitting.call(node)
            if crossing is None:
                outputs = self._outputs(emitting, names, [function.inputs[name] for name in self._further])
            else:
                made = {node: emitting.known[node] for node in piece if node in crossing}
                made = {node: value for node, value in made.items() if isinstance(value, Var)}
                self.handed |= made
                outputs = {node.name: value for node, value in made.items()}
            function.set_outputs([Builder.identity(x=value, name=name) for name, value in outputs.items()])
        self.base.known |= {node: value for node, value in emitting.known.items() if not _made_later(value)}
        return function

    def _placeholder(self, node: Any) -> Any:
        if node in self.ports:
            port = self.ports[node]
            return Builder.placeholder(shape=self.face.shape(port), dtype=self.face.kind(port))
        return Builder.placeholder(shape=self.handed[node].shape, dtype=self.handed[node].dtype)

    @property
    def _further(self) -> dict[str, tuple[int, ...]]:
        """Inputs besides those of the interface, with their shapes."""
        checks = self.face.apple and self.face.interface.outputs[0].name == "special"
        return dict(zip(CHECKED, (self.face.pictures, (1,)), strict=True)) if checks else {}

    def _outputs(self, emitting: Emitting, names: Mapping[str, str], further: Sequence[Var]) -> dict[str, Var]:
        results = {
            port.name: cast(emitting.known[node], types.fp16)
            for port, node in zip(self.face.interface.outputs, self.results, strict=True)
        }
        outputs = {names[port]: value for port, value in results.items()}
        if further:
            outputs |= filtered(results, *further)
        if self.face.apple and f"{LAYERS}1" in results:
            penultimate = sum(name.startswith(LAYERS) for name in results) - 2
            outputs["hidden_embeds"] = results[f"{LAYERS}{penultimate}"]
        return outputs

    def _cuts(self, pieces: int) -> list[int]:
        """Where to cut: at the first places where only tensors cross and the weights before are their share."""
        sizes = [sum(self._bytes(node)) for node in self.nodes]
        total, before = sum(sizes), 0
        found: list[int] = []
        for place, size in enumerate(sizes, 1):
            before += size
            share = (len(found) + 1) * total / pieces
            if len(found) < pieces - 1 and before >= share and all(_is_tensor(each) for each in self._crossing(place)):
                found.append(place)
        return found

    def _bytes(self, node: Any) -> Iterable[int]:
        for each in node.all_input_nodes:
            value = self.base.known.get(each)
            if isinstance(value, torch.Tensor):
                yield value.nbytes

    def _crossing(self, place: int) -> list[Any]:
        """The nodes before a place that nodes after it take."""
        later = {each for node in self.nodes[place:] for each in node.all_input_nodes} | {*self.results}
        return [node for node in self.nodes[:place] if node in later]


def _is_tensor(node: Any) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)


def _made_later(value: Any) -> bool:
    return isinstance(value, Var) or (isinstance(value, list) and any(isinstance(each, Var) for each in value))


def share_weights(program: Program) -> None:
    """Let equal constants of all functions lie in the package's file once."""
    for function in program.functions.values():
        for operation in function.find_ops(op_type="const"):
            value = operation.outputs[0].val
            if isinstance(value, np.ndarray) and value.nbytes > INLINE:
                bits = np.ascontiguousarray(value).view(np.uint8)
                operation.weight_id = f"{value.shape}{hashlib.blake2b(bits.data).hexdigest()}"
