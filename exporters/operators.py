"""One rule per PyTorch operation: how it is written in ONNX, opset 18.

A rule takes a `Call` and returns the name of its result, a tuple of names, or a `Size`.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto

from anamorph.errors import BackendError
from anamorph.exporters.onnx_tensors import TYPES

if TYPE_CHECKING:
    from anamorph.exporters.emit import Call


@dataclass(frozen=True)
class Size:
    """A size that is known when the graph runs: the name of an int64 tensor of shape [1]."""

    name: str


Rule = Callable[["Call"], Any]
OPERATORS: dict[str, Rule] = {}
ONNX_RUNTIME = "com.microsoft"
"""The domain of ONNX Runtime's own operations."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule under the names of its operations."""

    def enter(function: Rule) -> Rule:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return enter


def _elementwise(kind: str) -> Rule:
    def apply(call: "Call") -> str:
        name = next(iter(call.arguments))
        return call.builder.op(kind, call.tensor(name))

    return apply


for _name, _kind in (
    ("exp", "Exp"), ("log", "Log"), ("sin", "Sin"), ("cos", "Cos"), ("sigmoid", "Sigmoid"), ("tanh", "Tanh"),
    ("relu", "Relu"), ("round", "Round"), ("sqrt", "Sqrt"),
):  # fmt: skip
    OPERATORS[f"aten.{_name}.default"] = _elementwise(_kind)


def _binary(kind: str) -> Rule:
    def apply(call: "Call") -> str:
        if call.arguments.get("alpha", 1) != 1:
            raise BackendError(f"the exporter has no rule for {kind.lower()} with alpha={call['alpha']}")
        return call.builder.op(kind, _operand(call, "self"), _operand(call, "other"))

    return apply


for _name, _kind in (("add", "Add"), ("sub", "Sub"), ("mul", "Mul"), ("div", "Div")):
    OPERATORS[f"aten.{_name}.Tensor"] = _binary(_kind)


for _name, _kind in (("eq", "Equal"), ("bitwise_and", "And"), ("__and__", "And")):
    OPERATORS[f"aten.{_name}.Tensor"] = _binary(_kind)


def _operand(call: "Call", name: str) -> str:
    """A tensor, a size, or a number in the type of the result."""
    value = call[name]
    return _number(call, value, call.result.dtype) if isinstance(value, int | float | Size) else call.tensor(name)


def _number(call: "Call", value: "int | float | Size", dtype: Any) -> str:
    if not isinstance(value, Size):
        return call.builder.constant(value, str(dtype).removeprefix("torch."))
    return value.name if TYPES[dtype] == TensorProto.INT64 else call.builder.op("Cast", value.name, to=TYPES[dtype])


def _compared(kind: str) -> Rule:
    def apply(call: "Call") -> str:
        dtype = call.arguments["self"].meta["val"].dtype
        return call.builder.op(kind, call.tensor("self"), _number(call, call["other"], dtype))

    return apply


for _name, _kind in (("eq", "Equal"), ("ge", "GreaterOrEqual")):
    OPERATORS[f"aten.{_name}.Scalar"] = _compared(_kind)


@rule("aten.where.self")
def _where(call: "Call") -> str:
    return call.builder.op("Where", *(call.tensor(name) for name in ("condition", "self", "other")))


@rule("aten.arange.default", "aten.arange.start_step")
def _arange(call: "Call") -> str:
    builder, end = call.builder, call["end"]
    if not isinstance(end, Size) or call.arguments.get("start", 0) != 0 or call.arguments.get("step", 1) != 1:
        raise BackendError("the exporter has no rule for ranges that do not count from 0 to a size")
    return builder.op(
        "Range", builder.constant(0, np.int64), builder.op("Squeeze", end.name), builder.constant(1, np.int64)
    )


@rule("aten.argsort.default")
def _argsort(call: "Call") -> str:
    """Places in rising order along the last dimension."""
    builder, x, rank = call.builder, call.tensor("self"), len(call.shape("self"))
    if call["descending"] or call["dim"] % rank != rank - 1:
        raise BackendError("the exporter has no rule for sorting down, or along another dimension than the last")
    count = builder.op("Shape", x, start=rank - 1, end=rank)
    return builder.ops("TopK", x, count, outputs=2, axis=-1, largest=0, sorted=1)[1]


@rule("aten._assert_tensor_metadata.default")
def _nothing(call: "Call") -> None:
    """What the trace asserts holds for every input that the interface admits."""


@rule("aten.contiguous.default", "aten.alias.default", "aten.to.dtype_layout", "aten.to.dtype", "aten._to_copy.default")
def _cast(call: "Call") -> str:
    source, wanted = call.arguments["self"].meta["val"].dtype, call.result.dtype
    x = call.tensor("self")
    return x if source == wanted else call.builder.op("Cast", x, to=TYPES[wanted])


@rule(str(operator.getitem))
def _getitem(call: "Call") -> Any:
    return call["arg0"][call["arg1"]]


@rule("aten.matmul.default")
def _matmul(call: "Call") -> str:
    return call.builder.op("MatMul", call.tensor("self"), call.tensor("other"))


def _reduced(call: "Call", kind: str) -> str:
    if not call["dim"]:
        raise BackendError(f"the exporter has no rule for {kind} over all dimensions")
    axes = call.builder.constant(call["dim"], np.int64)
    return call.builder.op(kind, call.tensor("self"), axes, keepdims=int(call["keepdim"]))


@rule("aten.mean.dim")
def _mean(call: "Call") -> str:
    return _reduced(call, "ReduceMean")


@rule("aten.amax.default")
def _amax(call: "Call") -> str:
    return _reduced(call, "ReduceMax")


@rule("aten.sum.dim_IntList")
def _sum(call: "Call") -> str:
    return _reduced(call, "ReduceSum")


@rule("aten.linalg_vector_norm.default")
def _vector_norm(call: "Call") -> str:
    if call["ord"] != 2:
        raise BackendError(f"the exporter has no rule for norms of order {call['ord']}")
    return _reduced(call, "ReduceL2")


@rule("aten.clamp_min.default")
def _clamp_min(call: "Call") -> str:
    return call.builder.op("Max", call.tensor("self"), _operand(call, "min"))


@rule("aten.clamp.default")
def _clamp(call: "Call") -> str:
    return call.builder.op("Clip", call.tensor("self"), _operand(call, "min"), _operand(call, "max"))


@rule("aten.argmax.default")
def _argmax(call: "Call") -> str:
    """The first of equal maxima, spelt out because engines differ in which one they take."""
    if call["dim"] is None or call["keepdim"]:
        raise BackendError("the exporter has no rule for argmax over all dimensions or with keepdim")
    builder, x, rank = call.builder, call.tensor("self"), len(call.shape("self"))
    axis = call["dim"] % rank
    if axis != rank - 1:
        raise BackendError("the exporter has no rule for argmax over another dimension than the last")
    axes = builder.constant([axis], np.int64)
    length = builder.op("Squeeze", builder.op("Shape", x, start=axis, end=axis + 1))
    places = builder.op("Range", builder.constant(0, np.int64), length, builder.constant(1, np.int64))
    top = builder.op("Equal", x, builder.op("ReduceMax", x, axes, keepdims=1))
    return builder.op("ReduceMin", builder.op("Where", top, places, length), axes, keepdims=0)
