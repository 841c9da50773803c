"""From an exported PyTorch graph of fixed sizes to Core ML's intermediate language (MIL), in float16.

Each operation has one entry in `mil_operators.RULES`. Where a number's sine is taken, the number and its angle stay
float32, because float16 cannot tell 999 from 999.25. All else is float16, and int32 for tokens and places.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil.mil import Builder, Var, types
from numpy.typing import NDArray

from anamorph.errors import BackendError
from anamorph.exporters import mil_layers  # noqa: F401 - it enters its rules
from anamorph.exporters.mil_operators import RULES
from anamorph.exporters.nodes import bound_arguments, leaves

MASKED = -1e4
"""What stands for minus infinity: far below any score, and no infinity, of which some devices make NaN."""
HALF = np.finfo(np.float16)
KINDS = {np.dtype(np.float16): types.fp16, np.dtype(np.float32): types.fp32}
"""NumPy's types -> MIL's."""


@dataclass
class Weights:
    """Arrays by the tensors that they were made of, for all functions of a package."""

    made: dict[Any, NDArray[Any]] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)

    def array(self, name: str, value: torch.Tensor, dtype: Any) -> NDArray[Any]:
        """The values in a type of NumPy's; raises BackendError where float16 cannot hold them."""
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, np.dtype(dtype))
        if key not in self.made:
            self.made[key] = _narrowed(name, value.detach(), np.dtype(dtype))
            self.kept.append(value)  # or its address could be given to another one
        return self.made[key]


def _narrowed(name: str, value: torch.Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype != np.float16 or not value.is_floating_point():
        return np.ascontiguousarray(value.numpy(), dtype)
    half = value.half()
    if not bool(half.isfinite().all()):
        half = value.masked_fill(value == -torch.inf, MASKED).half()
    if not bool(half.isfinite().all()):
        raise BackendError(f"weight {name} has values beyond float16's range, in which Core ML's programs compute")
    return np.ascontiguousarray(half.numpy())


def number(value: float, dtype: Any) -> Any:
    """A number in a type of NumPy's; what float16 would round to nothing becomes its smallest normal number.

    Raises BackendError: it is beyond float16's range.
    """
    value = MASKED if value == -np.inf else value
    if np.dtype(dtype) == np.float16 and abs(value) > float(HALF.max):
        raise BackendError(f"the model holds {value}, beyond float16's range, in which Core ML's programs compute")
    if np.dtype(dtype) == np.float16 and value and abs(value) < float(HALF.smallest_subnormal):
        return np.float16(HALF.tiny)
    return np.dtype(dtype).type(value)


@dataclass
class Emitting:
    """A function while it is written in float16, or in another type of NumPy's.

    `known` is what each node of the PyTorch graph has become.
    """

    weights: Weights
    floats: Any = np.float16
    known: dict[Any, Any] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    constants: dict[int, Var] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def enter_weight(self, node: Any, name: str, value: torch.Tensor) -> None:
        """A tensor of the model, which has that name in the checkpoint."""
        self.known[node] = value
        self.names[id(value)] = name

    def resolve(self, value: Any) -> Any:
        """An argument: nodes replaced by variables, or by what is known now."""
        if isinstance(value, torch.fx.Node):
            return self.known[value]
        if isinstance(value, list | tuple):
            return [self.resolve(item) for item in value]
        return value

    def var(self, value: Any, dtype: Any) -> Var:
        """A variable as it is; a number, or a tensor that is known now, as a constant of this type."""
        if isinstance(value, Var):
            return value
        if not isinstance(value, torch.Tensor):
            return Builder.const(val=number(value, dtype))
        name = self.names.get(id(value), "constant")
        array = self.weights.array(name, value, dtype if value.is_floating_point() else np.int32)
        if id(array) not in self.constants:
            self.constants[id(array)] = Builder.const(val=array, name=self._unused(name.replace(".", "_")))
        return self.constants[id(array)]

    def _unused(self, name: str) -> str:
        """A name for a constant; those after the first of a name are numbered."""
        count = self.counts[name] = self.counts.get(name, 0) + 1
        return name if count == 1 else f"{name}_{count}"

    def call(self, node: Any) -> None:
        """Translate one operation; one of what is known now is computed now, by PyTorch itself."""
        arguments = self.resolve(node.args), {key: self.resolve(value) for key, value in node.kwargs.items()}
        given = list(leaves(arguments))
        if not any(isinstance(value, Var) for value in given):
            result = node.target(*arguments[0], **arguments[1])
            self.known[node] = result
            if (name := next((self.names[id(value)] for value in given if id(value) in self.names), None)) is not None:
                self.names[id(result)] = f"{name}.{node.name}"
            return
        kind = str(node.target)
        if kind not in RULES:
            raise BackendError(
                f"the exporter has no rule for the operation {kind} in Core ML; add one to exporters/mil_operators.py"
            )
        try:
            self.known[node] = RULES[kind](Call(self, node, bound_arguments(node)))
        except (ValueError, TypeError, AssertionError) as error:  # coremltools', where MIL lacks a shape or type
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BackendError(f"Core ML cannot compute {kind} here ({reason}); take another format") from error


@dataclass(frozen=True)
class Call:
    """One operation of the PyTorch graph while it is translated: arguments by the names of its schema."""

    emitting: Emitting
    node: Any
    arguments: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """An argument: numbers as they are, tensors as variables or, if they are known now, as tensors."""
        return self.emitting.resolve(self.arguments[name])

    def var(self, name: str) -> Var:
        """A tensor as a variable."""
        return self.constant(self[name])

    def vars(self, name: str) -> list[Var]:
        """A list of tensors as variables."""
        return [self.constant(value) for value in self[name]]

    def constant(self, value: Any, dtype: Any = None) -> Var:
        """A variable as it is; what is known now in this type, or in that of the function."""
        return self.emitting.var(value, dtype or self.emitting.floats)

    @property
    def kind(self) -> Any:
        """MIL's name for the type of the function."""
        return KINDS[np.dtype(self.emitting.floats)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The traced shape of a tensor."""
        return tuple(int(size) for size in self.arguments[name].meta["val"].shape)

    @property
    def result(self) -> Any:
        """The traced result: its shape and type."""
        return self.node.meta["val"]
